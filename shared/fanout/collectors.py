"""The collectors that one service sends copies to: their destinations, the routes to them, and the account of each."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Generic

import msgspec

from shared.bus.bodies.nodes_message import Node
from shared.bus.kept_counts import Sheet
from shared.client import ALL_STREAMS, Client
from shared.datagrams.gathered import Gathered, Mask
from shared.datagrams.routing import ALL_ROWS, Router, Selection, takes_all
from shared.fanout.catch_up.past_routes import PastRoutes
from shared.fanout.health import Checkup, Symptom
from shared.fanout.kernel_copies import KernelRules
from shared.fanout.sending.fair_shares import FairShares
from shared.fanout.sending.perhaps_twice import PerhapsTwice
from shared.fanout.served_collector import PASSED, UNSEEN, D, Departed, Served, count_received_before, count_rows
from shared.fanout.streams import Unserved
from shared.ledger.accounts import Accounts
from shared.ledger.counters import (
    BASELINE,
    BY_KERNEL,
    BY_KERNEL_LATE,
    BY_KERNEL_UNSEEN,
    DEFERRED,
    ELSEWHERE,
    EXPECTED,
    FILTERED,
    HELD,
    LEFT,
    LEFT_BEHIND,
    MISSED,
    OFFERED,
    OVER_SHARE,
    PERHAPS_TWICE,
    SAMPLED_OUT,
    SENT,
    SHARED_OUT,
    STOPPED,
    TEMPLATES_HELD,
    TEMPLATES_LOST,
    UNPLANNED,
    UNSERVED,
    UNSURE,
    WITHHELD,
    WITHHELD_BY_ADMIN,
)
from shared.ledger.equations import dropped


class Collectors(Generic[D]):
    """Every collector whose copies this process sends.

    `published` counts each stream's datagrams (see `Streams`); `reach` makes a collector's destination, which counts
    its work in the account that it is given; `rules` knows what the kernel has copied already.
    """

    def __init__(
        self,
        streams: Iterable[str],
        published: Mapping[str, int],
        reach: Callable[[Client, Counter[str]], D],
        rules: KernelRules,
        new_counts: Callable[[], Counter[str]] = Counter,
    ) -> None:
        self.set_streams(streams)
        self._published = published
        self._new_counts = new_counts
        self._routed = new_counts()
        """Datagrams that came, by stream, whether anybody got them or not."""
        self._reach = reach
        self._served: dict[str, Served[D]] = {}
        self.departed = Departed[D]()
        self._elsewhere: dict[str, Client] = {}
        self._known: dict[str, tuple[Client, Counter[str]]] = {}
        """Collectors that the last process has served, and their accounts, until the first registry comes."""
        self.rules = rules
        self.by_kernel_late = 0
        """Copies that the kernel sent after its rules should have changed."""
        self._router = Router()
        self.past = PastRoutes(self)
        self._deferred: Callable[[str], int] = lambda _name: 0
        self.joined: list[tuple[Client, Client | None]] = []
        """Collectors that need templates anew, and as what each was served until now, for the caller to clear."""
        self.shares = FairShares[tuple[D, Selection]]()
        self._perhaps_twice = PerhapsTwice()

    def set_streams(self, streams: Iterable[str]) -> None:
        """Set the streams that exist, for collectors that want all of them."""
        self._streams = tuple(streams)

    def defer_by(self, deferred: Callable[[str], int]) -> None:
        """Use `deferred` to find how many of the datagrams that are owed to a collector wait in the journal."""
        self._deferred = deferred

    def note_nodes(self, nodes: Sequence[Node]) -> None:
        """Note what the uplink tells of the nodes of a cluster, this one first."""
        shared = {name: each.account for name, each in self._served.items() if not each.destination.client.node}
        self._perhaps_twice.note(nodes, shared, self.departed.names)

    @property
    def counters(self) -> dict[str, int]:
        """Counters of collectors that are not served any more, and of all."""
        return {
            LEFT: self.departed.lost,
            ELSEWHERE: len(self._elsewhere),
            PERHAPS_TWICE: self._perhaps_twice.left,
            BY_KERNEL_LATE: self.by_kernel_late,
        }

    def restore(self, sheet: Sheet) -> None:
        """Go on from what the last process has left, before the first registry comes."""
        self._routed.update(sheet.tables.get("routed/", {}))
        for client in sheet.clients:
            account = self._new_counts()
            account.update(sheet.tables.get(f"collector/{client.name}", {}))
            marks = Counter(sheet.tables.get(f"marks/{client.name}", {}))
            self._count_since(client, account, marks)
            # The last process had in its hands all that had come and has no outcome, routed or not.
            account[OFFERED] = account[EXPECTED] - account[MISSED] - account[UNSERVED]
            account[STOPPED] += account[HELD]
            account[TEMPLATES_LOST] += account[TEMPLATES_HELD]
            account[HELD] = account[TEMPLATES_HELD] = 0
            done = account[SENT] + account[BY_KERNEL] + account[WITHHELD] + dropped(account) - account[UNSERVED]
            done += account[FILTERED] + account[SAMPLED_OUT] + account[SHARED_OUT] + account[WITHHELD_BY_ADMIN]
            done += account[LEFT_BEHIND] + self._deferred(client.name)
            account[UNSURE] += max(0, account[OFFERED] - done)
            self._known[client.name] = client, account

    @property
    def elsewhere(self) -> Collection[Client]:
        """The collectors that other nodes serve, or none."""
        return self._elsewhere.values()

    @property
    def clients(self) -> list[Client]:
        """The collectors that are served."""
        return [served.destination.client for served in self._served.values()]

    def tables(self) -> dict[str, Counter[str]]:
        """Return what is to be kept for the next process."""
        tables = {"routed/": self._routed}
        for name, served in self._served.items():
            tables[f"collector/{name}"], tables[f"marks/{name}"] = served.account, served.marks
        return tables

    def replace(self, clients: Iterable[Client], elsewhere: Iterable[Client] = ()) -> None:
        """Serve these collectors from now on; other nodes of the cluster serve those `elsewhere`.

        One that has changed, but not its address and port, keeps its destination and its account. So does one that left
        a moment ago: its waiting copies stayed until now.
        """
        before, self._served = self._served, {}
        for client in clients:
            self._served[client.name] = self._serve(client, before.pop(client.name, None))
        for name, served in before.items():
            self._settle(served)
            self.departed.add(name, served)
        self.departed.close_old()
        self._elsewhere = {client.name: client for client in elsewhere}
        resumes = [client.resume for client in self.clients if client.resume]
        self._perhaps_twice.until_ns = max(self._perhaps_twice.until_ns, *(each.twice_until_ns for each in resumes), 0)
        self._known = {}
        self._routed.update(dict.fromkeys(self.streams_wanted(), 0))
        self._router.replace(self.clients)
        self.rules.follow(self.clients)
        self.past.refresh()

    def _serve(self, client: Client, known: Served[D] | None) -> Served[D]:
        if known and known.destination.client == client:
            return known
        before, fresh = known.destination.client if known else None, True
        if known and msgspec.structs.replace(known.destination.client, resume=client.resume) == client:
            fresh = False  # it is level now
        if known:
            self._settle(known)
        else:
            known = self.departed.pop(client.name)
        if known and known.destination.client.socket_address == client.socket_address:
            known.destination.adopt(client)
            known.destination.held.paused = False
            if client.withheld:
                known.destination.held.drop(WITHHELD_BY_ADMIN)
        else:
            if known:
                self.departed.close(known, dropped(known.account))
            known, before = self._new(client), None
            fresh = not known.returning
        if fresh and not client.withheld:
            self.joined.append((client, None if before and before.withheld else before))
        self._begin(known)
        return known

    def _new(self, client: Client) -> Served[D]:
        before, account = self._known.get(client.name, (None, self._new_counts()))
        if before and before.socket_address != client.socket_address:
            before, account = None, self._new_counts()
        returning = before is not None and before.generation == client.generation
        return Served(self._reach(client, account), account, self._new_counts(), Checkup(account), returning)

    def _begin(self, served: Served[D]) -> None:
        """Let what comes from now on be counted for a collector."""
        client, marks = served.destination.client, served.marks
        marks[BASELINE] = self._of_streams(self._published, client)
        marks[UNSEEN] = self._of_streams(self._routed, client)
        marks[PASSED] = 0

    def _settle(self, served: Served[D]) -> None:
        """Count in a collector's account what has come since `_begin`."""
        self._count_since(served.destination.client, served.account, served.marks)
        self._begin(served)

    def _count_since(self, client: Client, account: Counter[str], marks: Mapping[str, int]) -> None:
        # All collectors of a stream are offered the same, so nothing is counted for one that gets nothing of a batch.
        offered = self._of_streams(self._routed, client) - marks.get(UNSEEN, 0)
        account[EXPECTED] += self._of_streams(self._published, client) - marks.get(BASELINE, 0)
        account[OFFERED] += offered
        if not takes_all(client):
            account[FILTERED] += max(0, offered - marks.get(PASSED, 0))  # less is of a batch that was being routed

    def streams_wanted(self) -> set[str]:
        """The streams that any collector wants, also one of another node: it may be ours in a moment.

        A stream that a collector names need not be known here: another service may have read of it before us.
        """
        named = {stream for client in (*self.clients, *self._elsewhere.values()) for stream in client.streams}
        return named.union(self._streams) - {ALL_STREAMS} if ALL_STREAMS in named else named

    def _of_streams(self, counts: Mapping[str, int], client: Client) -> int:
        return sum(count for stream, count in counts.items() if client.wants(stream))

    def count_missed(self, stream: str, missed: int, joining: Collection[str] = ()) -> None:
        """Count datagrams that the bus lost of a stream, for each collector that would have been offered them."""
        self.shares.note_loss()
        behind = self.past.behind(stream)
        for client in self._router.clients(stream):
            served = self._served[client.name]
            if client.name in behind:
                served.account[OFFERED] += missed
            elif client.name in joining:
                served.marks[BASELINE] += missed
            else:
                served.account[MISSED] += missed
                self._count_unseen(client, stream, missed)

    def count_left_behind(self, name: str, count: int) -> None:
        """Count datagrams that waited in the journal for a collector, and that it does not get.

        Until the first registry is applied, the account is that of the last process.
        """
        served, (_, before) = self._served.get(name), self._known.get(name, (None, Counter[str]()))
        if count:
            (served.account if served else before)[LEFT_BEHIND] += count

    def count_unserved(self, unserved: Unserved, joining: Collection[str] = ()) -> None:
        """Count datagrams that no process served; those that came before this one, for whom the last one served."""
        stream, count, before, published = unserved
        behind = self.past.behind(stream) if published else ()
        for client in self._router.clients(stream):
            served = self._served[client.name]
            if client.name in behind:
                served.account[OFFERED] += count
            elif served.returning or not (before or client.name in joining):
                served.account[UNSERVED] += count
                self._count_unseen(client, stream, count)
            else:
                served.marks[BASELINE] += count

    def _count_unseen(self, client: Client, stream: str, count: int) -> None:
        if self.rules.serve(client, stream):
            self._served[client.name].account[BY_KERNEL_UNSEEN] += count

    def route(self, batch: Gathered, joining: Collection[str] = ()) -> list[tuple[D, Selection]]:
        """Return the rows for each collector that gets any, and count others; those that are `joining` get none yet."""
        routed = []
        behind = self.past.behind(batch.stream)
        copied = self.rules.copied(batch)
        leave_out, give_back = (copied.leave_out, copied.give_back) if copied else (None, None)
        yielding = self.past.yielding(batch.stream, joining)
        late_ns = self._perhaps_twice.until_ns
        if late_ns and late_ns <= min(each.received_ns for each in batch.batches):
            late_ns = 0
        for client, selected in self._router.route(batch, leave_out, give_back, yielding):
            served, selection = self._served[client.name], selected
            if copied:
                selection = copied.divide(client, selected)
            if client.name in behind:
                continue
            if copied:
                if selection.by_kernel:
                    served.account[BY_KERNEL] += selection.by_kernel
                if selection.unplanned:
                    served.account[UNPLANNED] += selection.unplanned
            if selection is not ALL_ROWS:
                served.marks[PASSED] += len(batch) - selection.filtered
                served.account[SHARED_OUT] += selection.shared_out
                served.account[SAMPLED_OUT] += selection.sampled_out
            if client.name in joining:
                self._pass_over(served, count_rows(batch, selection), selection)
            elif client.withheld:
                served.account[WITHHELD_BY_ADMIN] += count_rows(batch, selection)
            elif selection.indices is None or len(selection.indices):
                routed.append((served.destination, selection))
                if late_ns and not client.node:
                    served.account[PERHAPS_TWICE] += count_received_before(late_ns, batch, selection)
        for name in behind:
            self._served[name].marks[PASSED] += len(batch)
        self.by_kernel_late += copied.late if copied else 0
        self._routed[batch.stream] += len(batch)  # last: a kill in between makes too few filtered, and hides no loss
        return self._share_out(batch, routed) if self.shares.watching else routed

    def __contains__(self, name: str) -> bool:
        return name in self._served

    def serves_others(self, names: Collection[str]) -> bool:
        """Return whether collectors are served beside these, which all are."""
        return len(self._served) > len(names)

    def __getitem__(self, name: str) -> Served[D]:
        """Return a collector that is served."""
        return self._served[name]

    def _share_out(self, batch: Gathered, routed: list[tuple[D, Selection]]) -> list[tuple[D, Selection]]:
        """Return what is within the fair share of each address, and count the rest as dropped."""
        wishes = [
            (destination.client.address, count_rows(batch, selection), (destination, selection))
            for destination, selection in routed
        ]
        within, over = self.shares.divide(wishes)
        for destination, selection in over:
            self._served[destination.client.name].account[OVER_SHARE] += count_rows(batch, selection)
        return within

    def _pass_over(self, served: Served[D], count: int, selection: Selection) -> None:
        """Leave rows of a selection out of an account: they came before its collector joined."""
        served.marks[BASELINE] += count
        served.marks[UNSEEN] += count
        if selection is not ALL_ROWS:
            served.marks[PASSED] -= count

    def route_templates(
        self, batch: Gathered, names: Collection[str], joining: Collection[str]
    ) -> list[tuple[D, Mask, Mask]]:
        """Return the destinations of some collectors, unless withheld, and what `Router.takers` says of each."""
        taken = self._router.takers(batch, names, self.past.yielding(batch.stream, joining))
        return [(self._served[each.name].destination, rows, own) for each, rows, own in taken if not each.withheld]

    def picking(self, stream: str) -> dict[str, str]:
        """Return the collectors that get only some of what their prefixes let pass of a stream, and their groups."""
        return self._router.picking(stream)

    def refresh(self) -> None:
        """Let each destination check its way again."""
        for served in self._served.values():
            served.destination.refresh()
            served.destination.held.count_templates()
        self.departed.close_old()

    def examine(self, now: float) -> Iterator[tuple[Client, Symptom | None, int]]:
        """Examine each collector; yield those that have a trouble, or have lost datagrams, with how many."""
        for served in self._served.values():
            destination = served.destination
            symptom = served.checkup.examine(served.account, now, unreachable=destination.unreachable)
            if symptom is not None or served.checkup.lost:
                yield destination.client, symptom, served.checkup.lost

    def accounts(self) -> Accounts:
        """Return one account a collector."""
        return {f"collector/{name}": self._account(served) for name, served in self._served.items()}

    def _account(self, served: Served[D]) -> dict[str, int]:
        served.destination.held.count_templates()
        account = Counter(served.account)
        self._count_since(served.destination.client, account, served.marks)
        if deferred := self._deferred(served.destination.client.name):
            account[DEFERRED] = deferred
        return dict(account)

    def close(self) -> None:
        """Close all destinations."""
        for served in self._served.values():
            served.destination.close()
        self._served = {}
        self.departed.close_all()

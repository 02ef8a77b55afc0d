import ipaddress
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.bus.bodies.offload_messages import KernelCopies, KernelServed
from shared.bus.messages import Envelope
from shared.client import Client, Withheld
from shared.datagrams.gathered import Gathered
from shared.datagrams.limits import MAX_ROWS
from shared.datagrams.routing import shares_of
from shared.datagrams.sampling import find_buckets, find_share
from shared.fanout import kernel_copies
from shared.fanout.collectors import Collectors
from shared.fanout.kernel_copies import KernelRules
from shared.fanout.streams import Unserved
from shared.ledger.equations import discrepancies
from tests.builders import make_batch, make_client, make_envelope

NAMES = ("a", "b", "c")
TERMS: tuple[dict[str, Any], ...] = (
    {},
    {"prefixes": ("192.0.2.0/30",)},
    {"prefixes": ("192.0.2.2/31", "2001:db8::/127")},
    {"prefixes": ("192.0.2.2/31",), "port": 10},
    {"streams": ("other",)},
    {"source": "original"},
    {"withheld": Withheld("", 0.0)},
    {"group": "g"},
    {"group": "g", "port": 10},
    {"sample": 2},
    {"sample": 3, "prefixes": ("192.0.2.0/30",)},
)
SOURCES = [*(f"192.0.2.{number}" for number in range(6)), "2001:db8::1", "2001:db8::2"]
EXACT = len(TERMS) - 2
"""Terms from here on take samples."""
NO_SHARES: Mapping[str, bytes] = {}


def told(
    generation: int, serial: int, clients: list[Client], boot: int = 1, shares: Mapping[str, bytes] = NO_SHARES
) -> tuple[Envelope, KernelCopies]:
    """A generation that serves clients, in one piece."""
    served = [
        KernelServed(client, tuple(set(client.streams) & {"messages", "other"}), shares.get(client.name, b""))
        for client in clients
    ]
    body = KernelCopies(generation, serial, "reply/offload.1.a/", 0, 1, served)
    return make_envelope(boot=boot, sender="offload.1", kind="offload.copies"), body


def matches(client: Client, source: str) -> bool:
    """Return whether a datagram of the stream `messages` from this source is one that a client wants, by itself."""
    wanted = not client.prefixes or any(
        ipaddress.ip_address(source) in ipaddress.ip_network(prefix) for prefix in client.prefixes
    )
    return client.wants("messages") and wanted


def is_in_share(source: str, share: bytes) -> bool:
    """Return whether a source is in a bucket of a member's share."""
    return bool(find_share(share, find_buckets(make_batch([b""], [source])))[0])


def place(client: Client) -> tuple[str, str, int]:
    """A client's name and place."""
    return client.name, client.address, client.port


@dataclass
class Datagram:
    """A datagram, the generation of its mark, and the entries by which the kernel has sent a copy."""

    source: str
    mark: int = 0
    copied: list[Client] = field(default_factory=list)


class Site:
    """A registry, a planner whose rules follow it late, a kernel that copies by them, and a sender of copies.

    The planner keeps what it promises: it tells the sender of a generation before its rules go in, and waits until the
    sender serves the registry that it was made of.
    """

    def __init__(self) -> None:
        self.registry: dict[str, Client] = {}
        self.rules, self.published = KernelRules("relay"), Counter[str]()
        self.collectors = Collectors[Any](["messages", "other"], self.published, self._reach, self.rules)
        self.collectors.replace([])
        self.today: dict[str, Client] = {}
        self.planned: tuple[int, int, dict[str, Client]] | None = None
        """A generation that is told, the revision of the registry that it was made of, and its entries."""
        self.in_force: tuple[int, dict[str, Client]] = (0, {})
        self.shares: dict[int, dict[str, bytes]] = {}
        """By generation, of members of the group."""
        self.numbers: Counter[tuple[int, str]] = Counter()
        """Datagrams that a rule with sampling has matched."""
        self.queue: list[Datagram] = []
        self.generation = self.serial = self.entry = self.revision = self.told = 0

    def _reach(self, client: Client, account: Counter[str]) -> Any:
        held = SimpleNamespace(paused=False, drop=lambda _: None, count_templates=lambda: None)
        reached = SimpleNamespace(client=client, account=account, held=held, close=lambda: None)
        reached.adopt = lambda fresh: setattr(reached, "client", fresh)
        return reached

    def register(self, name: str, terms: int) -> None:
        """Sign a collector up, or up anew with other terms."""
        self.entry, self.revision = self.entry + 1, self.revision + 1
        fields: dict[str, Any] = {"streams": ("messages",), "generation": self.entry} | TERMS[terms]
        self.registry[name] = make_client(name, fields.pop("port", 9), **fields)

    def leave(self, name: str) -> None:
        """Sign a collector off."""
        self.revision += 1
        self.registry.pop(name, None)

    def tell(self) -> None:
        """Let the sender serve the registry as it is."""
        self.today = {name: client for name, client in self.registry.items() if client.source == "relay"}
        self.collectors.replace(self.today.values())
        self.told = self.revision

    def plan(self, left_to_us: int) -> None:
        """Make rules, but for one collector, of the registry as it is, and tell the sender of them."""
        self.process(len(self.queue))  # at the latest: the number may have been in use before
        self.generation, self.serial = self.generation % 7 + 1, self.serial + 1
        names = [name for number, name in enumerate(sorted(self.registry)) if number != left_to_us]
        entries = {name: self.registry[name] for name in names if not self.registry[name].withheld}
        self.planned = self.generation, self.revision, entries
        members = [client for client in self.registry.values() if client.group]
        shares = shares_of(members) if members else {}
        self.shares[self.generation] = shares
        assert self.rules.note(*told(self.generation, self.serial, list(entries.values()), shares=shares))

    def swap(self) -> None:
        """Put the rules in, if they are told and the sender serves the registry they were made of, or a later one."""
        if self.planned and self.told >= self.planned[1]:
            self.in_force, self.planned = (self.planned[0], self.planned[2]), None

    def arrive(self, source: str, marked: bool) -> None:
        """Let a datagram arrive, which the kernel copies unless it came in fragments."""
        generation, entries = self.in_force
        datagram = Datagram(source, generation if marked else 0)
        for name, entry in entries.items() if marked else ():
            share = self.shares[generation].get(name)
            if matches(entry, source) and (share is None or is_in_share(source, share)):
                self.numbers[generation, name] += 1
                if self.numbers[generation, name] % entry.sample == 1 % entry.sample:
                    datagram.copied.append(entry)
        self.queue.append(datagram)

    def process(self, count: int, joining: Collection[str] = ()) -> None:
        """Let the sender take some datagrams; check what each collector has got of them, and what is counted."""
        taken, self.queue = self.queue[:count], self.queue[count:]
        if not taken:
            return
        marks = np.array([each.mark for each in taken], np.uint16)
        batch = replace(make_batch([b""] * len(taken), [each.source for each in taken]), generations=marks)
        self.published["messages"] += len(taken)
        before, sent = self.counted, Counter[tuple[str, int]]()
        for destination, selection in self.collectors.route(Gathered([batch]), joining):
            rows = range(len(taken)) if selection.indices is None else selection.indices.tolist()
            destination.account["sent"] += len(rows)
            sent.update((destination.client.name, row) for row in rows)
            assert not destination.client.withheld
            assert destination.client.name not in joining
        for name, client in self.today.items():
            for row, datagram in enumerate(taken):
                by_kernel = [place(entry) for entry in datagram.copied].count(place(client))
                wanted = matches(client, datagram.source)
                assert by_kernel + sent[name, row] <= 1, f"{name} has got a datagram twice"
                assert wanted or not sent[name, row], f"{name} has got what it does not want"
                if client.group or name in joining:
                    continue
                if wanted and not (client.sample > 1 or client.withheld or self.samples(name, datagram.mark)):
                    assert by_kernel + sent[name, row] == 1, f"{name} has not got a datagram"
        for row, datagram in enumerate(taken):
            self._check_group(datagram, {name: sent[name, row] for name in self.today}, joining)
        # Of a copy that the kernel has made besides for another member, the sender that its rule was of tells.
        besides = any(len(self._by_kernel(datagram)) > 1 for datagram in taken)
        if not besides and not any(self.samples(name, mark) for name in NAMES for mark in set(marks.tolist())):
            made = sum(
                entry.source == "relay" or self.wants(entry, datagram.source)
                for datagram in taken
                for entry in datagram.copied
            )
            assert self.counted - before == made, "the counters of the rules tell another number"

    def _check_group(self, datagram: Datagram, sent: Mapping[str, int], joining: Collection[str]) -> None:
        """One member of the group has got it; more only if they were in none when the rules were made.

        None may have if all are joining.
        """
        members = {name for name, client in self.today.items() if client.group}
        by_kernel = self._by_kernel(datagram)
        if members and not any(self.samples(name, datagram.mark) for name in members):
            got = len(by_kernel) + sum(sent[name] for name in members)
            allowed = members <= {*joining} if not got else not all(entry.group for entry in by_kernel)
            assert got == 1 or allowed, f"{got} of a group have got it"

    def _by_kernel(self, datagram: Datagram) -> list[Client]:
        """Return the entries by which the kernel has sent a copy to members of the group."""
        members = [place(client) for client in self.today.values() if client.group]
        return [entry for entry in datagram.copied if place(entry) in members]

    def wants(self, entry: Client, source: str) -> bool:
        """Return whether today's collector at the place of an entry wants a datagram from this source."""
        client = self.today.get(entry.name)
        return client is not None and place(client) == place(entry) and matches(client, source)

    @property
    def counted(self) -> int:
        """Copies by the kernel, as the sender has counted them, but for those of accounts that have ended."""
        accounts = self.collectors.accounts().values()
        return sum(account.get("by_kernel", 0) for account in accounts) + self.collectors.by_kernel_late

    def samples(self, name: str, mark: int) -> bool:
        """Return whether a rule with sampling has decided about a collector's datagrams with this mark."""
        entries = self.rules._rules[mark].streams.get("messages", {}) if mark else {}
        return name in entries and entries[name].sample > 1


registering = st.tuples(st.just("register"), st.sampled_from(NAMES), st.sampled_from(range(len(TERMS))))
changing = registering | st.tuples(st.just("leave"), st.sampled_from(NAMES))
arriving = st.lists(
    st.tuples(st.just("arrive"), st.sampled_from(SOURCES), st.sampled_from([True, True, False])), min_size=1, max_size=9
)
planning = st.tuples(st.just("plan"), st.integers(0, 5))
tell, swap = [("tell",)], [("swap",)]
process = st.tuples(st.just("process"), st.integers(1, 30), st.sets(st.sampled_from(NAMES), max_size=2))
together = st.one_of(
    st.lists(st.one_of(changing, planning, process, st.just(*tell), st.just(*swap)), min_size=1, max_size=1),
    st.tuples(changing, arriving, process).map(lambda found: [found[0], *tell, *found[1], found[2]]),
    st.tuples(changing, planning, arriving).map(lambda found: [found[0], *tell, found[1], *swap, *found[2]]),
    st.tuples(planning, arriving).map(lambda found: [found[0], *tell, *swap, *found[1]]),
)


stories = st.lists(together, min_size=4, max_size=16)


one_joins_a_group_when_both_have_got_a_copy = [
    [("register", "b", 7), ("plan", 2), *tell, *swap, ("arrive", "192.0.2.0", True)],
    [("leave", "a"), ("register", "a", 7), *tell, ("process", 1, set())],
]


@settings(max_examples=80)
@given(stories)
@example(one_joins_a_group_when_both_have_got_a_copy)
def test_each_collector_gets_each_datagram_once(found: list[Any]) -> None:
    """By the kernel or by us, whatever joins, leaves, changes and moves meanwhile, and however late rules follow."""
    site = Site()
    for move, *arguments in [
        *(("register", name, 0) for name in NAMES),
        *tell,
        *(each for some in found for each in some),
    ]:
        getattr(site, move)(*arguments)
    site.process(len(site.queue))
    assert list(discrepancies(site.collectors.accounts())) == []


@pytest.mark.soak
@settings(max_examples=10_000)
@given(stories)
def test_each_collector_gets_each_datagram_once_in_many_stories(found: list[Any]) -> None:
    """The same, for minutes."""
    test_each_collector_gets_each_datagram_once.hypothesis.inner_test(found)  # type: ignore[attr-defined]


def routed(site: Site, marks: list[int], *, source: str = "192.0.2.1") -> dict[str, list[int]]:
    """The rows that are left to us for each collector, of datagrams with these marks."""
    batch = make_batch([b""] * len(marks), [source])
    site.published["messages"] += len(marks)
    gathered = Gathered([replace(batch, generations=np.array(marks, np.uint16))])
    return {
        destination.client.name: list(range(len(marks)) if selection.indices is None else selection.indices)
        for destination, selection in site.collectors.route(gathered)
    }


def site_of(*terms: int, in_rules: bool = True) -> Site:
    """A site with collectors of these terms, whose rules serve all of them as generation 1."""
    site = Site()
    for name, number in zip(NAMES, terms, strict=False):
        site.register(name, number)
    site.tell()
    if in_rules:
        site.plan(-1)
        site.swap()
    return site


def counts(site: Site, name: str) -> dict[str, int]:
    """The counters of a collector's account, but for what came."""
    account = site.collectors.accounts()[f"collector/{name}"]
    return {cause: count for cause, count in account.items() if count and cause not in ("expected", "offered")}


def test_collector_that_changes_its_kind_of_copies_gets_one() -> None:
    """At the same place the other sender's entry of before is known too: the kernel has sent that copy."""
    site = site_of(5)
    site.register("a", 0)
    site.tell()
    assert routed(site, [1, 0, 1]) == {"a": [1]}
    assert counts(site, "a") == {"by_kernel": 2}
    assert site.collectors.by_kernel_late == 0


def test_copies_of_rules_that_have_not_followed_are_counted_by_themselves() -> None:
    """A collector that left, moved or wants less still gets copies by the kernel for a moment: nobody is owed these."""
    site = site_of(0, 0, 0)
    site.leave("a")
    site.register("b", 3)
    site.register("c", 1)
    site.tell()
    assert routed(site, [1, 1, 0], source="192.0.2.5") == {}
    assert site.collectors.by_kernel_late == 6
    assert counts(site, "c") == {"filtered": 3}
    assert routed(site, [1, 1, 0], source="192.0.2.2") == {"b": [0, 1, 2], "c": [2]}
    assert site.collectors.by_kernel_late == 10
    assert counts(site, "c") == {"filtered": 3, "by_kernel": 2}


def test_stream_that_a_collector_may_no_longer_have_is_not_its_own() -> None:
    """An entry whose streams were narrowed keeps its generation: copies of the others are late, whoever gets them."""
    site = site_of(0, 0)
    site.registry["a"] = msgspec.structs.replace(site.registry["a"], streams=("other",))
    site.tell()
    assert routed(site, [1, 0]) == {"b": [1]}
    assert counts(site, "a") == {}
    assert site.collectors.by_kernel_late == 1


def test_copies_withheld_by_an_admin_are_told_from_those_of_the_kernel() -> None:
    """Copies that the kernel has sent in spite of an order are counted as sent by it, and the rest as withheld."""
    site = site_of(0)
    site.registry["a"] = msgspec.structs.replace(site.registry["a"], withheld=Withheld("", 0.0))
    site.tell()
    assert routed(site, [1, 1, 0]) == {}
    assert counts(site, "a") == {"by_kernel": 2, "withheld_by_admin": 1}


@pytest.mark.parametrize("terms", [EXACT, EXACT + 1])
def test_samples_are_taken_of_each_path_by_itself(terms: int) -> None:
    """Of what the kernel samples we count as many as its rule takes; of the rest each n-th one is sent by us.

    Else one path could have all of a sample, if its datagrams come as regularly as the sample is taken.
    """
    site = site_of(terms)
    one_in = TERMS[terms]["sample"]
    marks = ([1] * (one_in - 1) + [0]) * 60
    for first in range(0, len(marks), 7):
        for row in routed(site, marks[first : first + 7]).get("a", []):
            assert marks[first + row] == 0
        if first % 21 == 0:
            site.tell()  # whatever else changes, both go on
    assert counts(site, "a") == {
        "by_kernel": -(-60 * (one_in - 1) // one_in),
        "sampled_out": len(marks) - -(-60 * (one_in - 1) // one_in) - -(-60 // one_in),
    }


def test_entry_of_rules_that_sampled_leaves_nothing_to_us() -> None:
    """Nobody can tell which of its datagrams the kernel has copied: what it passed over counts as sampled out."""
    site = site_of(EXACT)
    site.register("a", 0)
    site.tell()
    assert routed(site, [1, 1, 1, 1, 0, 1]) == {"a": [4]}
    assert counts(site, "a") == {"by_kernel": 3, "sampled_out": 2}


def test_datagrams_that_never_came_may_have_been_copied() -> None:
    """Of a collector that the kernel serves, datagrams that are lost on the way to us are told apart."""
    site = site_of(0, 0, in_rules=False)
    a, _ = site.registry.values()
    site.published["messages"] += 2
    site.collectors.count_missed("messages", 1)
    site.rules.note(*told(3, 1, [a]))
    site.rules.note(*told(4, 2, []))
    site.collectors.count_missed("messages", 1)
    routed(site, [0, 3, 0])
    site.published["messages"] += 6
    site.collectors.count_missed("messages", 3)
    site.collectors.count_unserved(Unserved("messages", 3, before=False))
    assert counts(site, "a") == {"by_kernel": 1, "missed": 5, "dropped_unserved": 3, "by_kernel_unseen": 7}
    assert counts(site, "b") == {"missed": 5, "dropped_unserved": 3}
    for marks in ([4], [0]):
        routed(site, marks)
        site.published["messages"] += 1
        site.collectors.count_missed("messages", 1)
    assert counts(site, "a")["by_kernel_unseen"] == 7


def test_collectors_with_the_same_rows_left_share_them() -> None:
    """Those that the same generations serve share what is left, as a plan for sending is shared."""
    site = site_of(0, 0, 0, in_rules=False)
    entries = list(site.registry.values())
    site.rules.note(*told(1, 1, entries[:2]))
    batch = replace(make_batch([b""] * 4), generations=np.array([0, 1, 0, 1], np.uint16))
    selections = [selection for _, selection in site.collectors.route(Gathered([batch]))]
    assert selections[0] is selections[1]
    assert selections[2].indices is None


def test_rules_that_nobody_has_told_of_cost_their_datagrams() -> None:
    """Once they are given up nothing of them is sent, which is counted; the rest of a batch is sent as ever."""
    site = site_of(0, EXACT, in_rules=False)
    marks = np.array([0, 5, 0, 6], np.uint16)
    assert not site.rules.know(marks)
    assert site.rules.give_up(marks) == [5, 6]
    assert site.rules.know(marks)
    assert routed(site, [0, 5, 0, 6]) == {"a": [0, 2], "b": [0]}
    assert counts(site, "a") == {"dropped_unplanned": 2}
    assert counts(site, "b") == {"dropped_unplanned": 2, "sampled_out": 1}
    site.rules.note(*told(5, 1, [site.registry["a"]]))
    assert routed(site, [5]) == {"b": [0]}
    assert site.rules.give_up(marks) == [6]


def test_generation_is_replaced_by_a_later_one_of_its_number() -> None:
    """A higher serial replaces it, or another start of offload; one that came before, again, replaces nothing."""
    site = site_of(0, 0, in_rules=False)
    a, b = site.registry.values()
    for boot, serial, clients, left in (
        (1, 5, [a], ["b"]),
        (1, 4, [b], ["b"]),
        (1, 5, [b], ["b"]),
        (1, 6, [b], ["a"]),
        (2, 1, [a], ["b"]),
        (2, 2, [], ["a", "b"]),
    ):
        assert site.rules.note(*told(9, serial, clients, boot))
        assert list(routed(site, [9])) == left


def test_generation_in_pieces_is_known_with_the_last_of_them() -> None:
    """Until all pieces have come, in order, those before it are in force; a list that lacks one is discarded."""
    site = site_of(0, 0, in_rules=False)
    envelope, body = told(3, 1, list(site.registry.values()))
    pieces = [
        msgspec.structs.replace(body, piece=number, pieces=2, served=[served])
        for number, served in enumerate(body.served)
    ]
    assert not site.rules.note(envelope, pieces[1])
    assert not site.rules.note(envelope, pieces[0])
    assert not site.rules.know(np.array([3], np.uint16))
    assert site.rules.note(envelope, pieces[1])
    assert routed(site, [3]) == {}


def test_memory_of_rules_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of entries the generation that was used longest ago is forgotten, and never the last one."""
    monkeypatch.setattr(kernel_copies, "MAX_ENTRIES", 6)
    site = site_of(0, 0, 0, in_rules=False)
    clients = list(site.registry.values())
    for generation in (1, 2):
        site.rules.note(*told(generation, 1, clients))
    routed(site, [1])
    site.rules.note(*told(3, 1, clients))
    known = [generation for generation in (1, 2, 3) if site.rules.know(np.array([generation], np.uint16))]
    assert known == [1, 3]
    monkeypatch.setattr(kernel_copies, "MAX_ENTRIES", 2)
    site.rules.note(*told(4, 1, clients))
    assert site.rules.know(np.array([4], np.uint16))
    assert not site.rules.know(np.array([3], np.uint16))


def test_a_full_batch_of_as_many_generations_as_rows_is_divided() -> None:
    """Each row is judged by its own mark, though it changes from row to row."""
    site = site_of(0, in_rules=False)
    for generation in range(1, MAX_ROWS, 2):
        site.rules.note(*told(generation, 1, list(site.registry.values())))
    for generation in range(2, MAX_ROWS, 2):
        site.rules.note(*told(generation, 1, []))
    assert routed(site, list(range(MAX_ROWS))) == {"a": list(range(0, MAX_ROWS, 2))}

"""Batches to plans to raw sockets: each collector's allowed rows, the way to it, and rows that wait for the way."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final
from weakref import WeakValueDictionary

import numpy as np

from services.transmitter.destination import Destination
from services.transmitter.few_rows import FEW_ROWS, FewFrames, Frame, frames_of
from services.transmitter.packet_socket import PacketSocket, PacketSockets
from services.transmitter.packets.addressing import Identification
from services.transmitter.plan import FramePlan, largest_payload
from services.transmitter.policy import Admitted, Audit, Policy, Verdicts
from services.transmitter.privileges import RawSockets
from shared.client import Client
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered, portions
from shared.datagrams.routing import Selection
from shared.fanout.sending.backlog import BacklogMemory
from shared.fanout.sending.next_hops import Egress, EgressKind, NextHops
from shared.fanout.sending.send_threads import MEMBERS, SendThreads
from shared.ledger.counters import DESTINATION_REFUSED, NO_ROUTE, OTHER_FAMILY, RATE_LIMITED, SOURCE_REFUSED
from shared.log import get_logger
from shared.settings.model import Settings
from shared.settings.own_listeners import FollowedListeners

REFRESH_SECONDS: Final = 1.0
HOLDING_SECONDS: Final = 0.05
"""Time by which datagrams that have waited too long may be dropped late."""

log = get_logger()

Key = tuple[int, int, EgressKind, bool, PacketSocket]
"""The key of copies that can share a plan: IP version, MTU, kind of way and whether it takes runs, and socket."""

Framed = tuple[Indices | None, list[Frame] | None]
"""Rows, kept so that no others get their id, and their frames; None: they are too many."""


@dataclass(frozen=True, slots=True)
class Share:
    """A collector, the way there, and its rows of a batch (None: all)."""

    destination: Destination
    egress: Egress
    rows: Indices | None


class Sender:
    """Sends copies through raw sockets, those of `sockets` that are not kept for frames. Knows nothing of the bus.

    `held` has the rows that wait for next hops.
    """

    def __init__(self, settings: Settings, sockets: RawSockets, held: BacklogMemory) -> None:
        self.next_hops = NextHops()
        self.policy = Policy(settings.transmitter, time.monotonic)
        self.audit = Audit(log.warning, time.monotonic)
        self._segmentation = settings.transmitter.segmentation
        self._own_listeners = FollowedListeners(settings.streams)
        self._packet_sockets = PacketSockets(sockets.packet, sockets.ip4, sockets.ip6)
        self._threads = SendThreads()
        self._few = FewFrames()
        self._plans = [FramePlan() for _ in range(MEMBERS)]
        self._numbers: WeakValueDictionary[str, Identification] = WeakValueDictionary()
        self._held = held
        self._holding: set[Destination] = set()
        self._refresh_at = 0.0

    def apply_settings(self, settings: Settings) -> None:
        """Read our own listeners from these settings."""
        self._own_listeners = FollowedListeners(settings.streams, self._own_listeners)

    def reach(self, client: Client, account: Counter[str]) -> Destination:
        """Find out whether a collector may be sent copies; the way there is found with the first of them."""
        permitted = self.policy.allows_destination(client.address)
        numbers = self._numbers.setdefault(client.address, Identification())
        return Destination(client, account, self.next_hops, numbers, self._held, permitted=permitted)

    def send(self, batch: Gathered, routed: list[tuple[Destination, Selection]]) -> None:
        """Give each collector its rows. Collectors that are reached in the same way share a plan."""
        verdicts = Verdicts(self.policy, batch)
        by_key: dict[Key, list[Share]] = {}
        framed: dict[tuple[int, int, bool], Framed] = {}
        # A limit of frames a second favours the first: so each collector is first equally often, in the long run.
        first = random.randrange(len(routed)) if routed and self.policy.limited else 0
        for destination, selection in routed[first:] + routed[:first]:
            wanted = len(batch) if selection.indices is None else len(selection.indices)
            egress = destination.egress
            account = destination.held.account_of(templates=batch.templates)
            if not wanted or not self._may_go(destination, egress, wanted, account):
                continue
            admitted = verdicts.admit(selection.indices, destination.version, egress.scope)
            rows = self._admit(destination, admitted, wanted, account)
            if rows is not None and not len(rows):
                continue
            if destination.must_wait(egress) or not self._release(destination, egress):
                destination.held.hold(batch, rows)
                self._holding.add(destination)
                continue
            packet_socket = self._packet_sockets.for_egress(egress, destination.version)
            share = Share(destination, egress, rows)
            if len(batch) <= FEW_ROWS and destination.version == 4 and egress.kind is EgressKind.FRAMES:
                rest = self._send_few(batch, packet_socket, share, framed)
                if rest is None:
                    continue
                share = rest
            by_key.setdefault(_key(destination, egress, packet_socket), []).append(share)
        for key, shares in by_key.items():
            self._send_all(batch, key, shares)

    def _send_few(
        self,
        batch: Gathered,
        packet_socket: PacketSocket,
        share: Share,
        framed: dict[tuple[int, int, bool], Framed],
    ) -> Share | None:
        """Send a collector its few rows; return what is left to be sent. `framed` has what was planned of the batch."""
        segmentation, mtu = self._cuts_runs(share.egress.takes_runs, packet_socket), share.egress.mtu
        key = id(share.rows), mtu, segmentation
        if key not in framed:
            framed[key] = share.rows, frames_of(batch, share.rows, mtu, segmentation=segmentation)
        _, frames = framed[key]
        if frames is None:
            return share
        to, destination = share.destination.addressing(share.egress), share.destination
        self._few.build(frames)
        self._few.address(to, packet_socket.name(to), destination.numbers)
        account = destination.held.account_of(templates=batch.templates)
        sent = packet_socket.send_few(self._few, frames, account)
        return None if sent == len(frames) else replace(share, rows=self._few.rest(sent))

    def _send_all(self, batch: Gathered, key: Key, shares: list[Share]) -> None:
        """Send to collectors that are reached in the same way: those with the same rows, then all others."""
        by_rows: dict[int, list[Share]] = {}
        for share in shares:
            by_rows.setdefault(id(share.rows), []).append(share)
        alone: list[Share] = []
        for same in by_rows.values():
            if len(same) > 1 or same[0].rows is None or batch.longest > largest_payload(*key[:2]):
                rows = _rows_of(same[0]) or len(batch)
                self._threads.share(lambda member, part: self._send_same(member, batch, key, part), same, rows)
            else:
                alone += same
        for portion in portions(alone, _rows_of):
            rows = sum(map(_rows_of, portion))
            self._threads.share(lambda member, part: self._send_each(member, batch, key, part), portion, rows)

    def _may_go(self, destination: Destination, egress: Egress, wanted: int, account: Counter[str]) -> bool:
        """Return whether anything may go to a collector; if not, drop its rows under the cause."""
        client, cause = destination.client, egress.cause
        if not cause and not self._packet_sockets.have_one_for(egress, destination.version):
            cause = NO_ROUTE
        loops = self._own_listeners.receive(client.address, client.port, lambda _: egress.local)
        if not destination.permitted or loops:
            cause = DESTINATION_REFUSED
            self.audit.refuse(cause, wanted, collector=client.name, address=client.address, port=client.port)
        if cause:
            account[cause] += wanted
        return not cause

    def _admit(
        self, destination: Destination, admitted: Admitted, wanted: int, account: Counter[str]
    ) -> Indices | None:
        """Return the rows that go to a collector (None: all); drop the others, each under its cause."""
        rows = admitted.rows
        if admitted.other_family:
            account[OTHER_FAMILY] += admitted.other_family
        if admitted.refused:
            account[SOURCE_REFUSED] += admitted.refused
            self.audit.refuse(SOURCE_REFUSED, admitted.refused, collector=destination.client.name)
        left = wanted - admitted.other_family - admitted.refused
        granted = self.policy.grant(left)
        if granted == left:
            return rows
        account[RATE_LIMITED] += left - granted
        self.audit.refuse(RATE_LIMITED, left - granted, collector=destination.client.name)
        return np.arange(granted) if rows is None else rows[:granted]

    def _cuts_runs(self, way_takes_runs: bool, packet_socket: PacketSocket) -> bool:
        return self._segmentation and way_takes_runs and packet_socket.gso.usable

    def _build(self, member: int, batch: Gathered, key: Key, rows: Indices | None, parts: Sequence[int]) -> FramePlan:
        plan, (version, mtu, kind, takes_runs, exit_) = self._plans[member], key
        segmentation = self._cuts_runs(takes_runs, exit_)
        plan.build(batch, rows, version, mtu, link=kind is EgressKind.FRAMES, segmentation=segmentation, parts=parts)
        return plan

    def _send_same(self, member: int, batch: Gathered, key: Key, shares: Sequence[Share]) -> None:
        """Send the same rows to each, by this member's own plan: a collector's address goes into its headers."""
        plan = self._build(member, batch, key, shares[0].rows, (0,))
        behind = []
        for share in shares:
            dealt = self._send_plan(plan, key, [share])
            if dealt < plan.rows:  # runs were refused: the rest goes one by one
                behind.append(replace(share, rows=plan.rest(dealt)))
        for share in behind:
            self._send_same(member, batch, key, [share])

    def _send_each(self, member: int, batch: Gathered, key: Key, shares: Sequence[Share]) -> None:
        """Send its own rows to each, by one plan for all of them."""
        every = [share.rows for share in shares if share.rows is not None]
        firsts = [0, *accumulate(len(rows) for rows in every[:-1])]
        plan = self._build(member, batch, key, np.concatenate(every), firsts)
        dealt = self._send_plan(plan, key, shares)
        if dealt < plan.rows:
            left = [replace(share, rows=plan.rest(dealt, part)) for part, share in enumerate(shares)]
            self._send_each(member, batch, key, [share for share in left if _rows_of(share)])

    def _send_plan(self, plan: FramePlan, key: Key, shares: Sequence[Share]) -> int:
        """Address a plan's parts to a collector each, and send it; return the number of rows handled."""
        exit_ = key[-1]
        addressings = [share.destination.addressing(share.egress) for share in shares]
        names = [exit_.name(each) for each in addressings]
        plan.address(addressings, names, [share.destination.numbers for share in shares])
        return exit_.send(plan, [share.destination for share in shares])

    def _release(self, destination: Destination, egress: Egress) -> bool:
        """Send a collector's waiting rows, before any newer ones; return whether newer ones need not wait."""
        while not (paced := destination.held.paced_until > 0 and destination.held.paced(time.monotonic())):
            if not destination.held:
                break
            key = _key(destination, egress, self._packet_sockets.for_egress(egress, destination.version))
            held = destination.held.pop_oldest()
            self._send_same(0, held.batch, key, [Share(destination, egress, held.rows)])
        return not paced

    def work(self) -> float:
        """Apply network changes, send waiting rows that can be sent now, drop those that have waited too long.

        Return the seconds after which that is due again, at the latest.
        """
        self.next_hops.apply_events()
        now = time.monotonic()
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_SECONDS
            self.next_hops.refresh()
            self._packet_sockets.refresh()
        self._own_listeners.tick()
        for destination in [destination for destination in self._holding if destination.held]:
            egress = destination.egress
            if egress.kind is EgressKind.NONE:
                destination.held.drop(egress.cause)
            elif destination.held.paused or destination.must_wait(egress):
                destination.held.expire(now)
            else:
                self._release(destination, egress)
        self._holding = {destination for destination in self._holding if destination.held}
        paced = [destination.held.paced_until - now for destination in self._holding]
        waiting = self._holding or self.next_hops.stale or not self._own_listeners.settled
        return min(
            HOLDING_SECONDS if waiting else REFRESH_SECONDS,
            max([seconds for seconds in paced if seconds > 0], default=REFRESH_SECONDS),
        )

    def close(self) -> None:
        """Close our own sockets; the raw sockets stay with their owner."""
        self.next_hops.close()


def _key(destination: Destination, egress: Egress, packet_socket: PacketSocket) -> Key:
    return destination.version, egress.mtu, egress.kind, egress.takes_runs, packet_socket


def _rows_of(share: Share) -> int:
    return 0 if share.rows is None else len(share.rows)

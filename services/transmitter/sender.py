"""Batches to plans to raw sockets: what each collector may have, how it is reached, and what waits for that."""

import time
from collections import Counter
from typing import Final

import numpy as np
import structlog

from services.transmitter.copies import Copies
from services.transmitter.neighbourhood import Neighbourhood, Way, WayKind
from services.transmitter.packet_socket import Exits
from services.transmitter.plan import FramePlan
from services.transmitter.policy import Admitted, Audit, Policy, Verdicts
from services.transmitter.privileges import RawSockets
from shared.batch import Indices
from shared.gathering import Gathered
from shared.ledger import DESTINATION_REFUSED, OTHER_FAMILY, RATE_LIMITED, SOURCE_REFUSED
from shared.loops import OwnListeners, udp_listeners
from shared.registry import Client
from shared.routing import Selection
from shared.settings import Settings

REFRESH_SECONDS: Final = 1.0
HOLDING_SECONDS: Final = 0.05
"""How late datagrams that have waited too long may be dropped."""

log = structlog.get_logger()

Key = tuple[int, int, int, WayKind, bool]
"""Copies that share a plan: identity of their rows, IP version, MTU, how they leave, whether runs go together."""


class Sender:
    """Sends copies through raw sockets; of `sockets` those that are not kept for frames. Knows nothing of the bus."""

    def __init__(self, settings: Settings, sockets: RawSockets) -> None:
        self.neighbourhood = Neighbourhood()
        self.policy = Policy(settings.transmitter, time.monotonic)
        self.audit = Audit(log.warning, time.monotonic)
        self._segmentation = settings.transmitter.segmentation
        self._own_listeners = OwnListeners(udp_listeners(settings))
        self._exits = Exits(sockets.packet, sockets.ip4, sockets.ip6)
        self._plan = FramePlan()
        self._holding: set[Copies] = set()
        self._refresh_at = 0.0

    def reach(self, client: Client, account: Counter[str]) -> Copies:
        """Find out whether a collector may be sent copies; the way there is found with the first of them."""
        permitted = self.policy.allows_destination(client.address)
        return Copies(client, account, self.neighbourhood, permitted=permitted)

    def send(self, batch: Gathered, routed: list[tuple[Copies, Selection]]) -> None:
        """Give each collector its rows. Collectors that get the same rows in the same way share the plan."""
        verdicts = Verdicts(self.policy, batch)
        shared: dict[Key, tuple[Indices | None, list[tuple[Copies, Way]]]] = {}
        for copies, selection in routed:
            wanted = len(batch) if selection.indices is None else len(selection.indices)
            way = copies.way
            if not wanted or not self._may_go(copies, way, wanted):
                continue
            admitted = verdicts.admit(selection.indices, copies.version, local=way.local)
            rows = self._admit(copies, admitted, wanted)
            if rows is not None and not len(rows):
                continue
            if copies.must_wait(way):
                copies.hold(batch, rows)
                self._holding.add(copies)
                continue
            self._release(copies, way)
            exit_ = self._exits.of(way, copies.version)
            key = id(rows), copies.version, way.mtu, way.kind, exit_.segmentation
            shared.setdefault(key, (rows, []))[1].append((copies, way))
        for rows, members in shared.values():
            self._transmit(batch, rows, members)

    def _may_go(self, copies: Copies, way: Way, wanted: int) -> bool:
        """Whether anything may go to a collector; what does not is dropped under the cause."""
        client = copies.client
        cause = way.cause
        loops = self._own_listeners.receive(client.address, client.port, lambda _: way.local)
        if not copies.permitted or loops:
            cause = DESTINATION_REFUSED
            self.audit.refuse(cause, wanted, collector=client.name, address=client.address, port=client.port)
        if cause:
            copies.account[cause] += wanted
        return not cause

    def _admit(self, copies: Copies, admitted: Admitted, wanted: int) -> Indices | None:
        """Return the rows that go to a collector (None: all); the others are dropped, each under its cause."""
        account, rows = copies.account, admitted.rows
        if admitted.other_family:
            account[OTHER_FAMILY] += admitted.other_family
        if admitted.refused:
            account[SOURCE_REFUSED] += admitted.refused
            self.audit.refuse(SOURCE_REFUSED, admitted.refused, collector=copies.client.name)
        left = wanted - admitted.other_family - admitted.refused
        granted = self.policy.grant(left)
        if granted == left:
            return rows
        account[RATE_LIMITED] += left - granted
        self.audit.refuse(RATE_LIMITED, left - granted, collector=copies.client.name)
        return np.arange(granted) if rows is None else rows[:granted]

    def _transmit(self, batch: Gathered, rows: Indices | None, members: list[tuple[Copies, Way]]) -> None:
        """Send the same rows to collectors that are reached in the same way."""
        plan, (first, way) = self._plan, members[0]
        segmentation = self._segmentation and self._exits.of(way, first.version).segmentation
        plan.build(batch, rows, first.version, way.mtu, link=way.kind is WayKind.FRAMES, segmentation=segmentation)
        behind: list[tuple[Copies, Way, Indices]] = []
        for copies, way in members:
            exit_, target = self._exits.of(way, copies.version), copies.target(way)
            plan.address(target, exit_.name(target), copies.numbers)
            dealt = exit_.send(plan, copies.account)
            if dealt < plan.rows:  # runs were refused: the rest goes one by one
                behind.append((copies, way, plan.rest(dealt)))
        for copies, way, rest in behind:
            self._transmit(batch, rest, [(copies, way)])

    def _release(self, copies: Copies, way: Way) -> None:
        """Send what a collector had waiting, before anything newer."""
        for held in copies.release():
            self._transmit(held.batch, held.rows, [(copies, way)])

    def work(self) -> float:
        """Follow what changes on the network, send what can be sent now, drop what has waited too long.

        Return after how many seconds that is due again, at the latest.
        """
        self.neighbourhood.follow()
        now = time.monotonic()
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_SECONDS
            self.neighbourhood.refresh()
            self._exits.refresh()
        for copies in [copies for copies in self._holding if copies.holds]:
            way = copies.way
            if way.kind is WayKind.NONE:
                copies.drop_held(way.cause)
            elif copies.must_wait(way):
                copies.expire(now)
            else:
                self._release(copies, way)
        self._holding = {copies for copies in self._holding if copies.holds}
        return HOLDING_SECONDS if self._holding else REFRESH_SECONDS

    def close(self) -> None:
        """Close what is ours; the raw sockets are whose they were."""
        self.neighbourhood.close()

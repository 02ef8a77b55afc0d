"""The transmitter's part of the loop: batches to plans to raw sockets, and frames that were asked for."""

import math
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import ClassVar, Final, Self

import numpy as np
import structlog

from services.transmitter.copies import Copies
from services.transmitter.frames import Frames
from services.transmitter.neighbourhood import Neighbourhood, Way, WayKind
from services.transmitter.packet_socket import Exits
from services.transmitter.plan import FramePlan
from services.transmitter.policy import Admitted, Audit, Policy, Verdicts
from services.transmitter.privileges import RawSockets
from shared.batch import Indices
from shared.copying import CopyService
from shared.gathering import Gathered
from shared.ledger import DESTINATION_REFUSED, OTHER_FAMILY, RATE_LIMITED, SOURCE_REFUSED
from shared.loops import OwnListeners
from shared.registry import Client, Source
from shared.routing import Selection
from shared.settings import Settings
from shared.wire import TRANSMIT_TOPIC, Message, TransmitRequest

FRAME_SOCKETS: Final = 2
"""AF_PACKET sockets kept for frames that were asked for: as they are, and with a check sequence of their own."""
REFRESH_SECONDS: Final = 1.0
HOLDING_SECONDS: Final = 0.05
"""How late datagrams that have waited too long may be dropped."""

log = structlog.get_logger()

Key = tuple[int, int, int, WayKind, bool]
"""Copies that share a plan: identity of their rows, IP version, MTU, how they leave, whether runs go together."""


class Transmission(CopyService[Copies]):
    """Serves the collectors whose `source` is `original`, and whoever may ask for frames."""

    source: ClassVar[Source] = "original"

    def __init__(self, name: str, settings: Settings, sockets: RawSockets, facts: dict[str, int]) -> None:
        super().__init__(name, settings)
        self._raw = sockets
        self._facts = facts
        self._policy = Policy(settings.transmitter, time.monotonic)
        self._audit = Audit(log.warning, time.monotonic)
        self._own_listeners = OwnListeners(settings)
        self._plan = FramePlan()
        self._holding: set[Copies] = set()
        self._refresh_at = 0.0

    def __enter__(self) -> Self:
        raw = self._raw
        self._neighbourhood = Neighbourhood()
        self._exits = Exits(raw.packet[FRAME_SOCKETS:], raw.ip4, raw.ip6)
        self._frames = Frames(raw.packet[:FRAME_SOCKETS], self._neighbourhood, self._policy, self._audit, self.publish)
        return super().__enter__()

    def topics(self) -> Iterable[str]:
        """Without sockets none, by which others see that there is nobody to serve them."""
        return (*super().topics(), TRANSMIT_TOPIC) if self._raw else ()

    def descriptors(self) -> Iterable[int]:
        """What tells that a route, a link or a neighbour has changed."""
        return (self._neighbourhood.fileno(),)

    def take(self, message: Message) -> None:
        """Begin sending frames that are asked for."""
        if isinstance(message.body, TransmitRequest) and message.topic == TRANSMIT_TOPIC:
            self._frames.take(message.body)

    def reach(self, client: Client, account: Counter[str]) -> Copies:
        """Find out whether a collector may be sent copies; the way there is found with the first of them."""
        permitted = self._policy.allows_destination(client.address)
        return Copies(client, account, self._neighbourhood, permitted=permitted)

    def send(self, batch: Gathered, routed: list[tuple[Copies, Selection]]) -> None:
        """Give each collector its rows. Collectors that get the same rows in the same way share the plan."""
        verdicts = Verdicts(self._policy, batch)
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
        loops = way.local and self._own_listeners.take(client.address, client.port, local=True)
        if not copies.permitted or loops:
            cause = DESTINATION_REFUSED
            self._audit.refuse(cause, wanted, collector=client.name, address=client.address, port=client.port)
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
            self._audit.refuse(SOURCE_REFUSED, admitted.refused, collector=copies.client.name)
        left = wanted - admitted.other_family - admitted.refused
        granted = self._policy.grant(left)
        if granted == left:
            return rows
        account[RATE_LIMITED] += left - granted
        self._audit.refuse(RATE_LIMITED, left - granted, collector=copies.client.name)
        return np.arange(granted) if rows is None else rows[:granted]

    def _transmit(self, batch: Gathered, rows: Indices | None, members: list[tuple[Copies, Way]]) -> None:
        """Send the same rows to collectors that are reached in the same way."""
        plan, (first, way) = self._plan, members[0]
        segmentation = self.settings.transmitter.segmentation and self._exits.of(way, first.version).segmentation
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
        """Follow what changes on the network, send what can be sent now, drop what has waited too long."""
        self._neighbourhood.follow()
        now = time.monotonic()
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_SECONDS
            self._neighbourhood.refresh()
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
        return min(self._frames.work(), HOLDING_SECONDS if self._holding else math.inf)

    def own_account(self) -> dict[str, int]:
        """What the process may do, and what became of frames and requests."""
        return {**self._facts, **self._frames.counters, **self._audit.counters}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._frames.close()
        super().__exit__(kind, error, trace)
        self._neighbourhood.close()
        self._raw.close()

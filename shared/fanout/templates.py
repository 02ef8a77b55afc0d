"""Templates of flow exporters for collectors that can't have them by copies: those that join, and those with a share.

A collector that joins is sent all templates that the workers have kept, and from there on copies. Each worker answers
in one order with its batches. So what comes of a worker after its answer continues the templates, and what comes before
is not for collectors that are *joining*. One that was served already gets the templates beside its copies.

Collectors of a group, and those that get one datagram in N, are sent all templates that come besides. The share of a
member that is joining stays with the others.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Generic

import numpy as np

from shared.bus.bodies.template_messages import Renewals, TemplateDatagram, Templates, renewals_topic, templates_topic
from shared.bus.continuity import Worker
from shared.bus.messages import Message
from shared.bus.zmq_sockets import Subscriber
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.datagrams.gathered import Gathered, Mask
from shared.datagrams.routing import ALL_ROWS, Selection
from shared.fanout.collectors import Collectors
from shared.fanout.served_collector import D
from shared.fanout.streams import FollowedStreams
from shared.log import get_logger
from shared.settings.entries import Stream

PATIENCE_SECONDS: Final = 5.0
"""Time for the workers to answer; one of an earlier release does not. Copies flow without templates then."""
PAUSE_SECONDS: Final = (0.02, 0.25)
PAUSE_SHARE: Final = 4
"""Pause between two questions, at least and at most, and in times that the last answers took: they may be long.
Collectors that join meanwhile share the next one."""
ANSWERING: Final = "ingest."
"""Beginning of the names of those who keep templates; uplink does not read what other sites have sent."""
BURST: Final = 64
BURSTS: Final = 20
"""Datagrams that leave at once, and the bursts in which all leave unless these are too short: `Backlog.pace` is between
them, and copies wait behind."""
MAX_WORKERS: Final = 256
"""Workers and streams of which renewals wait."""
MAX_CAME: Final = 4096
"""Renewals of a worker and stream that wait for their datagrams: none come while the worker is short of memory."""
NUMBER_AT: Final = {9: 12, 10: 8}
"""Place of the number in the header of NetFlow v9 and IPFIX."""

NOBODY: Final = frozenset[str]()

log = get_logger()


@dataclass(slots=True)
class _Round:
    """A question about the templates of a stream: who gets the answers, and who has answered.

    Collectors that are `joining` get nothing else of a worker before that.
    """

    since: int = 0
    """The first revision of the registry in which any of them may have joined."""
    joining: set[str] = field(default_factory=set)
    served: set[str] = field(default_factory=set)
    due: dict[Worker, int] = field(default_factory=dict)
    """The piece that comes next of a worker that has begun to answer."""
    answered: set[Worker] = field(default_factory=set)
    asked_at: float = 0.0

    def add(self, name: str, *, joining: bool) -> None:
        (self.joining if joining else self.served).add(name)


class TemplateDelivery(Generic[D]):
    """Asks for templates when collectors join, and sends them what comes.

    `send` sends, and counts; `send_waiting` sends the copies that have come and wait for more.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        collectors: Collectors[D],
        send: Callable[[Gathered, list[tuple[D, Selection]]], None],
        send_waiting: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._subscriber = subscriber
        self._collectors = collectors
        self._send = send
        self._send_waiting = send_waiting
        self._came: dict[tuple[str, Worker], list[TemplateDatagram]] = {}
        """Renewals, until the batch that has their datagrams comes: shares are the same for both then."""
        self._clock = clock
        self._streams: tuple[str, ...] = ()
        self._followed = 0
        """The revision of the registry whose collectors are known here."""
        self._renewed: dict[str, dict[str, str]] = {}
        """Streams whose renewals are subscribed to, and for whom: collectors, and their groups."""
        self._rounds: dict[str, _Round] = {}
        self._next: dict[str, _Round] = {}
        """Collectors for which the workers are not asked yet, by stream."""
        self._keep: Callable[[str, str, Sequence[TemplateDatagram]], bool] = lambda _name, _stream, _datagrams: False
        self._withheld: set[tuple[str, str]] = set()
        """Collectors that catch up, with the stream, which were not sent renewals that came meanwhile."""
        self._due_at: dict[str, float] = {}
        """The time before which the workers are not asked again, by stream."""

    def __bool__(self) -> bool:
        """Return whether any collector is joining, or waits for templates."""
        return bool(self._rounds or self._next)

    def set_streams(self, streams: Iterable[Stream]) -> None:
        """Set the streams whose exporters may have templates."""
        self._streams = tuple(stream.name for stream in streams if stream.protocol in ("netflow", "ipfix"))

    def keep_by(self, keep: Callable[[str, str, Sequence[TemplateDatagram]], bool]) -> None:
        """Use `keep` to put off what is kept of a stream for a collector; it returns False for one that gets it now."""
        self._keep = keep

    def ask(self, name: str, stream: str) -> None:
        """Ask for the templates of a stream for a collector that is served already."""
        if stream in self._streams:
            self._next.setdefault(stream, _Round(self._followed)).add(name, joining=False)

    def awaits(self, name: str, stream: str) -> bool:
        """Return whether a collector waits for templates of a stream that were asked for, or are to be."""
        rounds = self._rounds.get(stream), self._next.get(stream)
        return any(each is not None and (name in each.joining or name in each.served) for each in rounds)

    def end_past(self, name: str, stream: str) -> None:
        """Ask for templates that came while a collector caught up: what it got meanwhile was of the time before."""
        if (name, stream) in self._withheld:
            self._withheld.discard((name, stream))
            self.ask(name, stream)

    @property
    def joining_since(self) -> float:
        """The first revision of the registry of which a collector gets no copies yet; infinite: there is none."""
        rounds = (*self._rounds.values(), *self._next.values())
        return min((each.since for each in rounds if each.joining), default=math.inf)

    def follow_collectors(self, revision: int) -> None:
        """Ask for the templates that collectors need that have joined by a revision of the registry.

        Follow what comes if any has a share.
        """
        since, self._followed = min(self._followed + 1, revision), revision
        joined, self._collectors.joined = self._collectors.joined, []
        self._withheld = {each for each in self._withheld if each[0] in self._collectors}
        for stream in self._streams:
            for client, before in joined:
                if client.wants(stream):
                    joining = before is None or not before.wants(stream)
                    self._next.setdefault(stream, _Round(since)).add(client.name, joining=joining)
        for stream in {*self._streams, *self._renewed}:
            self._follow_renewals(stream, self._collectors.picking(stream) if stream in self._streams else {})
        self._ask()

    def _follow_renewals(self, stream: str, members: dict[str, str]) -> None:
        """Subscribe to renewals of a stream while anybody gets them; anew, when exporters may have changed hands."""
        before = self._renewed.pop(stream, {})
        if before and before != members:
            self._subscriber.unsubscribe(renewals_topic(stream))
        if members and before != members:
            self._subscriber.subscribe(renewals_topic(stream))
        if members:
            self._renewed[stream] = members
        else:
            self._came = {key: came for key, came in self._came.items() if key[0] != stream}

    def _ask(self) -> None:
        """Ask for the templates of each stream for which that is due."""
        now = self._clock()
        for stream in [each for each in self._next if each not in self._rounds]:
            if now >= self._due_at.get(stream, 0.0):
                self._rounds[stream] = asked = self._next.pop(stream)
                asked.asked_at = now
                self._question(stream, asked)

    def _question(self, stream: str, asked: _Round) -> None:
        """Ask for the templates of a stream; where exporters change hands with the answers, renewals begin anew too."""
        if any(self._renewed.get(stream, {}).get(name) for name in asked.joining):
            self._subscriber.unsubscribe(renewals_topic(stream))
            self._subscriber.subscribe(renewals_topic(stream))
        self._subscriber.subscribe(templates_topic(stream))

    def settle(self, streams: FollowedStreams) -> None:
        """End the rounds that all living workers have answered, or for which there was time enough; begin others."""
        if not self:
            return
        known, now = streams.workers, self._clock()
        workers = {worker for worker in known if worker[0].startswith(ANSWERING)}
        for stream, asked in list(self._rounds.items()):
            late = now >= asked.asked_at + PATIENCE_SECONDS
            if not late and not (known and workers <= asked.answered):
                continue
            if late and workers:
                names = sorted(name for name, _ in workers - asked.answered)
                log.warning("no templates of flow exporters came from some workers", stream=stream, workers=names)
            self._subscriber.unsubscribe(templates_topic(stream))
            shortest, longest = PAUSE_SECONDS
            self._due_at[stream] = now + min(longest, max(shortest, PAUSE_SHARE * (now - asked.asked_at)))
            del self._rounds[stream]
        if self._next:
            self._ask()

    def before_batch(self, stream: str, worker: Worker) -> frozenset[str]:
        """Send what is to be sent before a batch of a worker; return the collectors that get no copies of it yet."""
        waiting = self.joining(stream, worker)
        if self._came and (came := self._came.pop((stream, worker), None)):
            names = self._renewed.get(stream, {}).keys() - waiting
            behind = names.intersection(self._collectors.past.behind(stream))
            self._withheld |= {(name, stream) for name in behind}
            self._deliver(stream, came, names - behind, waiting, came=True)
        return waiting

    def joining(self, stream: str, worker: Worker) -> frozenset[str]:
        """Return the collectors that get no copies yet of what comes from a worker now."""
        if not (self and worker[0].startswith(ANSWERING)):
            return NOBODY
        asked, following = self._rounds.get(stream), self._next.get(stream)
        names = NOBODY.union(asked.joining) if asked and worker not in asked.answered else NOBODY
        return names | following.joining if following else names

    def take(self, message: Message) -> None:
        """Send what a worker has kept to the collectors that wait for it; keep what has come for those with a share."""
        body, worker = message.body, (message.envelope.sender, message.envelope.boot)
        if isinstance(body, Renewals):
            if body.stream in self._renewed:
                came = self._came.setdefault((body.stream, worker), [])
                came += body.datagrams
                del came[:-MAX_CAME]
                if len(self._came) > MAX_WORKERS:  # a worker that was killed right behind them has sent nothing else
                    del self._came[next(iter(self._came))]
        elif isinstance(body, Templates) and (asked := self._rounds.get(body.stream)):
            self._take_piece(asked, worker, body)

    def _take_piece(self, asked: _Round, worker: Worker, body: Templates) -> None:
        """Send a piece of a worker's answer to those who wait for it; ask again where the bus has dropped one."""
        if worker in asked.answered:
            return
        due = asked.due.pop(worker, None) if body.piece else 0
        if body.piece == due:
            names = asked.joining | asked.served
            now = {name for name in names if not self._keep(name, body.stream, body.datagrams)}
            following = self._next.get(body.stream)
            self._deliver(body.stream, body.datagrams, now, following.joining if following else (), came=False)
            asked.due[worker] = due + 1
            if body.piece + 1 >= body.pieces:
                asked.answered.add(worker)
        elif due is not None:
            self._subscriber.unsubscribe(templates_topic(body.stream))
            self._question(body.stream, asked)

    def send(self, stream: str, datagrams: Sequence[TemplateDatagram], name: str) -> None:
        """Send a collector templates of exporters that it gets."""
        self._deliver(stream, datagrams, {name}, (), came=False)

    def _deliver(
        self,
        stream: str,
        datagrams: Sequence[TemplateDatagram],
        names: Collection[str],
        joining: Collection[str],
        *,
        came: bool,
    ) -> None:
        """Send datagrams to some collectors; those that just `came` go as copies to who has their exporter's."""
        if not (datagrams and names):
            return
        self._send_waiting()
        size = max(BURST, -(-len(datagrams) // BURSTS))
        for start in range(0, len(datagrams), size):
            burst = _Burst(stream, datagrams[start : start + size])
            routed: list[tuple[D, Selection]] = []
            aside: list[tuple[D, Selection]] = []
            for destination, passing, own in self._collectors.route_templates(burst.numbered, names, joining):
                copied = came and destination.client.sample == 1
                for rows, to in ((own & ~np.bool_(copied), routed), (passing & ~own, aside)):
                    if rows.any():
                        to.append((destination, _select(rows)))
                        destination.held.count_templates(int(np.count_nonzero(rows)))
            if routed:
                self._send(burst.numbered, routed)
            if aside:
                self._send(burst.aside, aside)
            if start + size < len(datagrams):
                for destination, _ in (*routed, *aside):
                    destination.held.pace()
            for destination, _ in (*routed, *aside):
                destination.held.count_templates()


class _Burst:
    """Datagrams that leave together, with their exporter's numbers, or with those for collectors of templates alone."""

    def __init__(self, stream: str, datagrams: Sequence[TemplateDatagram]) -> None:
        self._stream, self._datagrams = stream, datagrams
        self.numbered = self._gather([each.payload for each in datagrams])

    @cached_property
    def aside(self) -> Gathered:
        """The same datagrams with the other numbers."""
        return self._gather([_renumber(each.payload, each.aside) for each in self._datagrams])

    def _gather(self, payloads: Sequence[bytes]) -> Gathered:
        addresses, ports = [each.address for each in self._datagrams], [each.port for each in self._datagrams]
        rows = make_rows([len(payload) for payload in payloads], addresses, ports)
        return Gathered([DatagramBatch(self._stream, 0, rows, b"".join(payloads))], templates=True)


def _renumber(payload: bytes, number: int) -> bytes:
    at = NUMBER_AT.get(int.from_bytes(payload[:2]), len(payload))
    return payload[:at] + number.to_bytes(4) + payload[at + 4 :] if at < len(payload) else payload


def _select(rows: Mask) -> Selection:
    return ALL_ROWS if rows.all() else Selection(np.flatnonzero(rows))

"""Collectors that are owed the past: the sender reads it for them from the journal, and paces what it sends them.

A collector that has left, or was away, comes back to live copies by a `Pursuit` of each of its streams. The gateway
keeps where each has got to, by the reports of this module, and tells it back with the registry.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from math import inf
from typing import Final, Generic

from shared.bus.bodies.template_messages import TemplateDatagram
from shared.bus.continuity import Position, Worker
from shared.bus.kept_counts import KeptFile
from shared.bus.messages import Datagrams, Envelope, Message, status_topic
from shared.bus.zmq_sockets import Publisher, Subscriber
from shared.client import Client, Place
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.catch_up.absences import Absences
from shared.fanout.catch_up.journal_questions import JournalQuestions, Pursued
from shared.fanout.catch_up.owed import Owed
from shared.fanout.catch_up.past_sender import BURST_SECONDS, STEP_ROWS, PastSender
from shared.fanout.catch_up.progress import LeftOff, Progress, possible_places, with_beginnings, with_successors
from shared.fanout.catch_up.pursuit import GENERATION, Pursuit, PursuitState
from shared.fanout.catch_up.rings import Rings
from shared.fanout.collectors import Collectors
from shared.fanout.served_collector import D
from shared.fanout.streams import FollowedStreams
from shared.fanout.templates import TemplateDelivery
from shared.log import get_logger
from shared.settings.model import Settings

JOURNAL: Final = "journal."
JOURNAL_STATUS: Final = status_topic(JOURNAL)[:-1]
TURN_SECONDS: Final = 0.0005
"""Time for which live copies wait for those of the past, but for one send more; then live ones have as much alone."""
IDLE_SECONDS: Final = 0.05
"""Time after which one is looked at again that gets nothing now."""
STRAY_NS: Final = 10_000_000_000
"""An unknown worker that began this long before a collector left is one of which that has had nothing."""
TABLE: Final = "past/"
ALIVE: Final = "alive/"
ALIVE_NS: Final = "alive_ns"

log = get_logger()


class CatchUp(Generic[D]):
    """Brings the collectors of one sender back to live copies.

    `send` gives collectors their rows, as of live batches; `keep` keeps counters that are new, such as places.
    """

    def __init__(
        self,
        publisher: Publisher,
        subscriber: Subscriber,
        streams: FollowedStreams,
        collectors: Collectors[D],
        kept: KeptFile,
        send: Callable[[Gathered, list[tuple[D, Selection]]], None],
        keep: Callable[[], None],
        templates: TemplateDelivery[D],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.due_at = inf
        """The time at which there is more to do."""
        self._subscriber = subscriber
        self._streams = streams
        self._collectors = collectors
        self._kept = kept
        self._absences = Absences(collectors, streams.positions)
        self._clock = clock
        self._questions = JournalQuestions(publisher, clock, joined=True)
        self._pursued: dict[tuple[str, str], Pursued] = {}
        """By collector and stream."""
        self.rings = Rings(clock)
        self.owed = Owed(self._pursued, self.rings, streams.positions, collectors.past)
        self._past = PastSender(
            *(collectors, send, templates, streams.positions, self._pursued.values(), self._put_away, keep, clock)
        )
        self._tables: dict[tuple[str, str], Counter[str]] = {}
        self._progress = Progress(publisher, "relay" if publisher.sender.startswith("forwarder.") else "original")
        self._alive: Counter[str] = kept.new_counts()
        self._away_ns = 0
        """The time at which the last process ended, about; 0: there was none."""
        self._begun: Mapping[str, int] = {}
        """The collectors that are served, by generation."""
        self._left_off = LeftOff()
        self._before: tuple[Client, ...] = ()
        """The collectors that the last process served, until the first registry comes."""
        self._served_before: Mapping[str, int] = {}
        """Likewise, for longer, by generation."""
        self._templates = templates
        collectors.defer_by(self.owed.deferred)
        templates.keep_by(self.keep_templates)

    def use(self, settings: Settings) -> None:
        """Use the journaled streams of these settings, and their pace."""
        self._journaled, self._per_second = frozenset(settings.journaled), settings.journal.catch_up_per_second
        self.rings.use(self._journaled)
        self._watch()

    def restore(self, clients: Iterable[Client], tables: Mapping[str, Mapping[str, int]]) -> None:
        """Go on with the pursuits that the last process has left, before the collectors' accounts are restored."""
        self._before = tuple(clients)
        self._served_before = generations = {client.name: client.generation for client in self._before}
        self._away_ns = tables.get(ALIVE, {}).get(ALIVE_NS, 0)
        for table, kept in tables.items():
            if table.startswith(TABLE):
                _, stream, name = table.split("/", 2)
                if kept.get(GENERATION) == generations.get(name, -1):
                    counts = self._kept.new_counts()
                    counts.update(kept)
                    self._begin(name, kept[GENERATION], stream, 0, counts)

    def tables(self) -> dict[str, Counter[str]]:
        """Return what is to be kept for the next process."""
        past = {f"{TABLE}{stream}/{name}": counts for (name, stream), counts in self._tables.items()}
        return {ALIVE: self._alive, **past}

    def note_leaving(self, clients: Mapping[str, Client]) -> None:
        """Note the places of collectors that leave, and end their pursuits: `clients` have them no more, or as others.

        One that stays may leave a stream.
        """
        for client in (*self._collectors.clients, *self._before):
            new = clients.get(client.name)
            if new is None or new.generation != client.generation:
                self._leave(client)
        self._before = ()
        for (name, stream), pursued in list(self._pursued.items()):
            new = clients.get(name)
            if new is None or new.generation != pursued.generation or not new.wants(stream):
                self._end(name, stream)

    def keep_to(self, streams: Collection[str]) -> None:
        """End the pursuits on all streams but these: nothing will be known of the others."""
        for name, stream in [key for key in self._pursued if key[1] not in streams]:
            self._end(name, stream)

    def _leave(self, client: Client) -> None:
        streams = self._journaled_of(client)
        if streams:
            places, since_ns = list[Place](), time.time_ns()
            for stream in sorted(streams):
                places += self._places(client.name, stream, since_ns)
                if pursued := self._pursued.get((client.name, stream)):
                    since_ns = min(since_ns, pursued.pursuit.since_ns or since_ns)
            living = self._streams.workers
            places.sort(key=lambda place: (place.worker, place.boot) in living)  # of too many the last are kept
            self._progress.note_left(client, since_ns - STRAY_NS, places)
        left = [place for each in self._unjournaled(client) for place in self._places(client.name, each, 0)]
        self._left_off.note(client, left)
        self._progress.forget_level(client.name)

    def _unjournaled(self, client: Client) -> frozenset[str]:
        """Return the streams that a collector wants of which there is a ring alone."""
        return frozenset(self._streams_of(client) - self._journaled)

    def _places(self, name: str, stream: str, now_ns: int) -> Iterator[Place]:
        """Yield the places that a collector has reached in a stream: behind live copies, unless it catches up."""
        if pursued := self._pursued.get((name, stream)):
            yield from pursued.pursuit.places()
            return
        received_ns = max(now_ns - STRAY_NS, self._streams.wanted_since(stream))
        for worker, position in self._streams.positions(stream).items():
            yield Place(stream, *worker, position.next_sequence, position.reached, received_ns)

    def follow(self, clients: Mapping[str, Client], *, first: bool) -> None:
        """Begin the pursuits that these collectors need; with `first` they are the first of this process."""
        for name, stream in self._pursued if first else ():  # the last process has left them
            self._collectors.past.set_behind(name, stream)
        for client in clients.values():
            returning = first and self._collectors[client.name].returning
            for stream in self._streams_to_begin(client) if not returning else self._journaled_of(client):
                if (client.name, stream) not in self._pursued and self._begins(client, returning):
                    self._pursue(client, stream, returning=returning)
        self._begun = {client.name: client.generation for client in clients.values()}
        here = cache(lambda streams: [place for stream in streams for place in self._places("", stream, 0)])
        self._progress.follow(self._collectors.elsewhere)
        self._left_off.follow(self._collectors.elsewhere, lambda client: here(self._unjournaled(client)))
        self._watch()

    def _watch(self) -> None:
        self._absences.watch(
            self._collectors.clients,
            lambda client: [each for each in self._journaled_of(client) if (client.name, each) not in self._pursued],
        )

    def _streams_to_begin(self, client: Client) -> set[str]:
        streams = self._streams_of(client)
        return streams.intersection(client.resume.streams or streams) if client.resume else streams

    def _begins(self, client: Client, returning: bool) -> bool:
        """Return whether a collector that does not catch up has to begin to: it is new, or this process is."""
        if returning:  # it was served by the last process; what is kept of that tells if it was level
            return client.catch_up
        return client.resume is not None and self._begun.get(client.name) != client.generation

    def _pursue(self, client: Client, stream: str, *, returning: bool) -> None:
        followed = self._streams.positions(stream)
        counts = self._kept.new_counts()
        places: Iterable[Place]
        if returning or client.resume is None:
            since = max(1, self._away_ns - STRAY_NS)
            pursued = self._begin(client.name, client.generation, stream, since, counts)
            places = (Place(stream, *each, at.next_sequence, at.reached, since) for each, at in followed.items())
            pursued.pursuit.begin(places, followed)
        else:
            resume = self._progress.resume(client.name, client.resume)
            pursued = self._begin(client.name, client.generation, stream, max(1, resume.since_ns), counts)
            living = self._streams.workers
            places = with_successors(stream, resume.places, living)
            lacked = sum(place.lacked for place in resume.places if place.stream == stream)
            if pursued.pursuit.by_window:
                sent = self._served_before.get(client.name) == client.generation
                places = possible_places(resume.places, living, self.rings[stream], followed, sent=sent)
                if (here := self._left_off.places(client.name, resume.generation)) is not None:
                    places, lacked = with_beginnings(stream, here, followed, self.rings[stream].let_go)
            self._collectors.past.count_discovered(client.name, lacked)
            self._collectors.past.count_unread(client.name, lacked, 0)
            pursued.pursuit.begin(places, followed)
            if stream in self.rings.kept:  # one that was taken over: it is level within some seconds, whatever comes
                pursued.pace = pursued.pursuit.behind(followed)
                pursued.twice_until_ns = resume.twice_until_ns
        log.info("a collector begins to catch up", collector=client.name, stream=stream)

    def _begin(self, name: str, generation: int, stream: str, since_ns: int, counts: Counter[str]) -> Pursued:
        counts[GENERATION] = generation
        pursued = Pursued(name, generation, Pursuit(stream, since_ns, counts, self._clock))
        pursued.pursuit.by_window = stream not in self._journaled
        if not self._pursued:
            self._subscriber.subscribe(self._questions.topic)
            self._subscriber.subscribe(JOURNAL_STATUS)
            self._questions.begin()
        self._pursued[name, stream], self._tables[name, stream] = pursued, counts
        self.rings.open(stream)
        if name in self._collectors:
            self._collectors.past.set_behind(name, stream)
        self._past.ask_templates(pursued)
        self.due_at = 0.0
        return pursued

    def _end(self, name: str, stream: str) -> None:
        """End a pursuit; what was still to come by it is left behind."""
        self._kept.suspend()  # until it is kept without this table: what comes is sent live
        pursuit = self._pursued.pop((name, stream)).pursuit
        del self._tables[name, stream]
        self._collectors.count_left_behind(name, pursuit.deferred(self._streams.positions(stream)))
        self._collectors.past.end_behind(name, stream)
        if not any(of == stream for _, of in self._pursued):
            self.rings.close(stream)
        if not self._pursued:
            self._subscriber.unsubscribe(self._questions.topic)
            self._subscriber.unsubscribe(JOURNAL_STATUS)
            self.due_at = inf

    def _journaled_of(self, client: Client) -> set[str]:
        """Return the streams with a journal that a collector wants."""
        return {stream for stream in self._journaled if client.wants(stream)}

    def _streams_of(self, client: Client) -> set[str]:
        """Return the streams with a journal or a ring that a collector wants."""
        return {stream for stream in self._journaled | self.rings.kept if client.wants(stream)}

    def note_live(self, envelope: Envelope, body: Datagrams, batch: DatagramBatch, joining: Collection[str]) -> None:
        """Keep a live batch for those that catch up on its stream."""
        numbered = self.rings.add(envelope, body, batch)
        if numbered and self._pursued:
            self._past.note_live(self._pursued.values(), numbered, joining)
            self.due_at = min(self.due_at, self._clock())
        self._absences.note_live((envelope.sender, envelope.boot), batch.stream, envelope.total)

    def before_sending(self, stream: str) -> None:
        """Begin to catch up with collectors whose last live copies are found not to have arrived."""
        self._put_away(self._absences.before_sending(stream))

    def after_sending(self, stream: str) -> None:
        """Likewise with those that live copies of a stream did not reach just now."""
        self._put_away(self._absences.after_sending(stream))

    def look_for_absent(self) -> None:
        """Likewise with those that copies wait for in vain."""
        self._put_away(self._absences.waiting())

    def _put_away(self, names: Iterable[str]) -> None:
        for name in names:
            self._past.take_back(name)
            if not self._absences.watches(name):
                continue
            self._kept.suspend()  # until its place is kept, too
            client, owed_from = self._collectors[name].destination.client, self._absences.leave(name)
            log.info("a collector is away: what it misses comes later, from the journal", collector=name)
            for stream in self._journaled_of(client):
                if (name, stream) not in self._pursued:
                    since = max(time.time_ns() - STRAY_NS, self._streams.wanted_since(stream))
                    pursued = self._begin(name, client.generation, stream, since, self._kept.new_counts())
                    places = (Place(stream, *worker, 0, total, since) for worker, total in owed_from(stream).items())
                    pursued.pursuit.begin(places, self._streams.positions(stream), self._absences.unsent_from(stream))
                    self._past.note_away(pursued)
            self._watch()

    def handle(self, message: Message) -> bool:
        """Handle a message of the journal; return whether it is one."""
        if handled := self._questions.handle(message):
            self.due_at = 0.0
        return handled

    def step(self) -> None:
        """Ask the journal, send what is due, and let those that are level have live copies."""
        now = self._clock()
        if not self._pursued:
            self.due_at = inf
            return
        share = self._per_second / max(1, sum(not each.away for each in self._pursued.values()))
        self._past.allow(self._pursued.values(), share, now)
        here = self._questions.look(now)
        most, followed = -1.0, dict[str, dict[Worker, Position]]()
        for key in [key for key, each in self._pursued.items() if not each.away or now >= each.try_at]:
            if self._templates.awaits(*key):  # they go first
                continue
            pursued = self._pursued[key] = self._pursued.pop(key)  # next time the others come first
            positions = followed.setdefault(key[1], self._streams.positions(key[1]))
            pursued.pursuit.behind_live = bool(self._collectors.rules)
            if self._past.send_due(pursued, self.rings[key[1]], positions):
                most = max(most, pursued.allowance, 0.0)
            if here and key[1] in self._journaled:
                self._questions.ask(pursued, now, len(self._pursued))
            self._settle(pursued, positions, vain=self._questions.are_vain(pursued, now, len(self._pursued)))
            if most >= 0 and self._clock() >= now + TURN_SECONDS:
                most = STEP_ROWS
                break
        pause = min(BURST_SECONDS / 2, (STEP_ROWS / 2 - most) / share) if most >= 0 else IDLE_SECONDS
        self.due_at, rested_at = now + max(0.001, pause), 2 * self._clock() - now
        if rested_at > self.due_at and self._collectors.serves_others({name for name, _ in self._pursued}):
            self.due_at = rested_at

    def _settle(self, pursued: Pursued, followed: Mapping[Worker, Position], *, vain: bool) -> None:
        """Find out whether a collector is level now; `vain`: no more is to be awaited of the journal."""
        pursuit = pursued.pursuit
        window, gone = self.rings[pursuit.stream], vain or pursuit.stream not in self._journaled
        steps = pursuit.give_up(window, followed, at_once=gone)
        if vain and (missing := sum(each.missing for each in steps)):
            told = "the journal gives nothing: a collector goes on without what it may have"
            cure = "look at the journal's log, and at its disk"
            log.warning(told, collector=pursued.name, stream=pursuit.stream, datagrams=missing, cure=cure)
        self._past.perform(pursued, steps)
        if self._collectors[pursued.name].destination.held:
            return  # it may still be found to be away
        if pursued.check(window, followed, at_once=gone) is PursuitState.LIVE:
            log.info("a collector has caught up", collector=pursued.name, stream=pursuit.stream)
            self._end(pursued.name, pursuit.stream)
            self._past.send_rest(pursued)
            self._watch()
            if not any(name == pursued.name for name, _ in self._pursued):
                self._progress.note_level(pursued.name, pursued.generation)

    def _tidy(self) -> None:
        for stream, window in self.rings.items():
            totals = [each.pursuit.totals for (_, of), each in self._pursued.items() if of == stream]
            workers = self._streams.positions(stream)
            window.forget({worker: min((each.get(worker, 0) for each in totals), default=inf) for worker in workers})

    def keep_templates(self, name: str, stream: str, datagrams: Iterable[TemplateDatagram]) -> bool:
        """Keep templates of a stream for a collector that catches up on it; return whether it does."""
        if (pursued := self._pursued.get((name, stream))) is not None:
            pursued.templates.add(datagrams, pursued.pursuit.newest_ns)
        return pursued is not None

    def tell_again(self, fresh: Iterable[str]) -> None:
        """Tell a gateway that has just come which collectors have left, and where they have got to."""
        self._progress.tell_again(fresh)

    def report(self) -> None:
        """Tell the gateway which collectors are behind, or level again. Due every second."""
        self._alive[ALIVE_NS] = time.time_ns()
        self._tidy()
        pursued: dict[str, list[Pursued]] = {}
        for each in self._pursued.values():
            pursued.setdefault(each.name, []).append(each)
        self._progress.report(pursued.values(), self._streams.positions, self._past.paces, self._resumes)
        self._past.paces.clear()

    def _resumes(self, name: str) -> bool:
        """Return whether the registry still has something to resume for a collector."""
        return name in self._collectors and self._collectors[name].destination.client.resume is not None

"""The journaled streams that are sent, and the questions to the journal for those that are not live."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from services.uplink.outgoing.batches import BusBatches
from services.uplink.outgoing.journaled import JournaledStream
from services.uplink.packs import Pack
from shared.bus.bodies.journal_messages import JournalPortion
from shared.bus.kept_counts import KeptCounts
from shared.bus.messages import Message, Status, status_topic
from shared.bus.zmq_sockets import Publisher, Subscriber
from shared.fanout.catch_up.journal_questions import JournalQuestions, JournalReports
from shared.fanout.catch_up.pursuit import Step

JOURNAL: Final = "journal."
LOOK_SECONDS: Final = 0.05
"""Between two looks at a stream that is not live."""
ALIVE: Final = "alive/"
ALIVE_NS: Final = "alive_ns"


class JournalReading:
    """Reads on for each stream as there is room."""

    def __init__(
        self,
        publisher: Publisher,
        subscriber: Subscriber,
        new_counts: Callable[[], KeptCounts],
        window_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.streams: dict[str, JournaledStream] = {}
        self.given_up = False
        """True where datagrams were missing that the journal has not given in time, until it gives something again."""
        self._subscriber = subscriber
        self._new_counts = new_counts
        self._window_bytes = window_bytes
        self._clock = clock
        self._questions, self._reports = JournalQuestions(publisher, clock), JournalReports()
        self._alive = new_counts()

    def begin(
        self, streams: Iterable[str], batches: BusBatches, tables: Mapping[str, Mapping[str, int]]
    ) -> dict[str, int]:
        """Go on where the last process has stopped; return how many datagrams of each stream are still to be sent."""
        alive_ns, owed = tables.get(ALIVE, {}).get(ALIVE_NS, 0), {}
        for stream in streams:
            journaled = JournaledStream(
                stream,
                lambda stream=stream: batches.positions(stream),  # type: ignore[misc]
                self._new_counts,
                self._window_bytes,
                self._clock,
            )
            owed[stream] = journaled.begin(tables, alive_ns)
            self.streams[stream] = journaled
        if self.streams:
            self._subscriber.subscribe(self._questions.topic)
            self._subscriber.subscribe(status_topic(JOURNAL)[:-1])
        return owed

    def handle(self, message: Message) -> None:
        """Take what the journal says."""
        if isinstance(message.body, Status):
            if not message.envelope.sender.startswith(JOURNAL):
                return
            told = self._reports.read(message.envelope, message.body)
            for stream, journaled in self.streams.items():
                journaled.confirm(*told(stream))
        else:
            self._questions.handle(message)
            if isinstance(message.body, JournalPortion) and not message.body.error:
                self.given_up = False

    @property
    def awaits(self) -> bool:
        """Return whether an answer of the journal is to come."""
        return any(each.pursued and each.pursued.question for each in self.streams.values())

    @property
    def behind(self) -> bool:
        """Return whether any stream is not live."""
        return any(each.pursued for each in self.streams.values())

    @property
    def due_at(self) -> float:
        """Return the time at which a stream is to be looked at that is not live."""
        return self._clock() + LOOK_SECONDS if self.behind else float("inf")

    def steps(self, room: Callable[[], bool]) -> Iterator[tuple[JournaledStream, Step]]:
        """Ask the journal, and yield what goes next, as long as there is room."""
        now = self._clock()
        here = self._questions.look(now)
        for journaled in self.streams.values():
            for step in journaled.steps(room):
                yield journaled, step
            if journaled.pursued and room():
                if here:
                    self._questions.ask(journaled.pursued, now)
                vain = self._questions.are_vain(journaled.pursued, now)
                for step in journaled.settle(gone=vain):
                    self.given_up |= vain and step.missing > 0
                    yield journaled, step

    def note_settled(self, pack: Pack) -> None:
        """Note that a message needs not be sent any more: the place that is kept goes on."""
        if journaled := self.streams.get(pack.origin.stream):
            journaled.cursors.settle(pack)

    def keep_up(self) -> None:
        """Note the time, for the next process, and let go of what is not needed any more. Due each second."""
        self._alive[ALIVE_NS] = time.time_ns()
        for journaled in self.streams.values():
            journaled.tidy()

    def tables(self) -> dict[str, KeptCounts]:
        """Return what is to be kept for the next process."""
        found = {ALIVE: self._alive}
        for journaled in self.streams.values():
            found |= journaled.cursors.tables()
        return found

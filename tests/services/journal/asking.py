"""A reader of the journal, played by the test: it asks portion by portion, as a sender of copies does."""

import itertools

from shared.bus.bodies.journal_messages import (
    JOURNAL_TOPIC,
    JournalPlace,
    JournalPortion,
    JournalRead,
    Replayed,
    WorkerPosition,
)
from tests.builders import BusEnds, Datagram, take, wait_wanted

Batch = tuple[Replayed, list[Datagram]]


class PlayedReader:
    """Asks for a stream's past; `place` is that of the last portion."""

    def __init__(self, bus: BusEnds, name: str = "forwarder.1", stream: str = "messages") -> None:
        self.publisher = bus.publisher(name)
        self._topic, self._stream = f"replay/{name}.{self.publisher.boot:x}/", stream
        self._answers = bus.subscriber(self._topic)
        self._ids = itertools.count(1)
        self.place: JournalPlace | None = None
        wait_wanted(self.publisher, self._topic)  # here, and so on its way to the journal

    def ask(
        self, *positions: WorkerPosition, since_ns: int = 0, rows: int = 8192, payload: int = 1 << 20
    ) -> tuple[list[Batch], JournalPortion]:
        """Return the batches of a portion, and its end."""
        wait_wanted(self.publisher, JOURNAL_TOPIC)
        number = next(self._ids)
        request = JournalRead(
            number, self._topic, self._stream, since_ns, list(positions), rows, payload, self.place
        )  # fmt: skip
        self.publisher.publish(JOURNAL_TOPIC, request)
        batches: list[Batch] = []
        while True:
            message = take(self._answers)
            if isinstance(message.body, JournalPortion) and message.body.id == number:
                assert len(batches) == message.body.batches
                self.place = message.body.place
                return batches, message.body
            if isinstance(message.body, Replayed) and message.body.read == number:
                assert message.batch is not None
                batches.append((message.body, list(message.batch.datagrams())))

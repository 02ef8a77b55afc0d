"""Batches that other sites are to have, as they come by the bus, and what the journal says."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from shared.bus.continuity import Position, Worker
from shared.bus.kept_counts import KeptCounts, KeptFile
from shared.bus.messages import Datagrams, Message, Status
from shared.bus.zmq_sockets import Subscriber
from shared.datagrams.batch import DatagramBatch
from shared.fanout.resumption import Resumption
from shared.fanout.streams import ORIGIN_COUNTERS, FollowedStreams, Unserved
from shared.ledger.accounts import Accounts

OWN_WORKERS: Final = ("ingest.",)
"""The workers whose batches may leave: what came from another site has `uplink.` as its worker, and stays here."""


class Taken(NamedTuple):
    """A batch that is to be sent, with the message that brought it; datagrams that were `missed` before it."""

    message: Message
    batch: DatagramBatch
    missed: int = 0


class BusBatches:
    """Batches as they come by the bus, also those that workers held while an uplink was restarted."""

    def __init__(
        self, name: str, subscriber: Subscriber, directory: Path, kept: KeptFile, others: Callable[[Message], None]
    ) -> None:
        self._subscriber = subscriber
        self._others = others
        """Takes messages that are none of a worker's."""
        self._streams = FollowedStreams(subscriber, directory, kept, OWN_WORKERS)
        self._resumption = Resumption(name, subscriber, kept.new_counts)
        self._gaps: set[str] = set()
        self.more = False
        """True if the last `read` has left some."""

    def begin(self, streams: Iterable[str], tables: Mapping[str, Mapping[str, int]]) -> None:
        """Subscribe to these streams, and go on where the last process has stopped, which has left these tables."""
        self._streams.restore(tables)
        self._streams.subscribe_to(streams)
        self._resumption.begin(self._streams.workers_left, tables)

    def fileno(self) -> int:
        """Return the descriptor of the subscriber."""
        return self._subscriber.fileno()

    def read(self, most: int) -> Iterator[Taken]:
        """Yield what has come."""
        handled = 0
        while handled < most and (message := self._subscriber.receive()):
            for each in self._resumption.order(message):
                yield from self._take(each)
            handled += 1
        for each in self._resumption.overdue():
            yield from self._take(each)
        self.more = handled == most

    def read_others(self) -> None:
        """Take what others than workers say; what these publish now they hold for the next process."""
        while message := self._subscriber.receive():
            if not message.envelope.sender.startswith(OWN_WORKERS):
                self._others(message)

    def _take(self, message: Message) -> Iterator[Taken]:
        body = message.body
        if isinstance(body, Status) and message.envelope.sender.startswith(OWN_WORKERS):
            self._gaps |= self._streams.reconcile(message.envelope, body).keys()
        elif isinstance(body, Datagrams) and message.batch is not None:
            count = len(message.batch)
            missed = self._streams.note_batch(message.topic, message.envelope, count)
            if missed is not None and count:
                yield Taken(message, message.batch, missed)
            elif missed:
                self._gaps.add(body.stream)
        else:
            self._others(message)

    @property
    def counters(self) -> dict[str, int]:
        """Messages that came twice, and datagrams that never came, since this process was started."""
        return self._streams.counters

    def unserved(self) -> list[Unserved]:
        """Return what was there while no uplink was, or before it was heard, as found since the last call."""
        return self._streams.pop_unserved()

    def pop_gaps(self) -> set[str]:
        """Return the streams of which a mark or a status has told a gap since the last call: no batch tells of it."""
        found, self._gaps = self._gaps, set()
        return found

    def positions(self, stream: str) -> dict[Worker, Position]:
        """Return the places in a stream that workers' counts have reached, as far as they came by the bus."""
        return self._streams.positions(stream)

    def hand_over(self) -> None:
        """Ask workers to hold what they publish from now on: this process ends."""
        self._resumption.hand_over(self._streams.publishing)

    @property
    def handed_over(self) -> bool:
        """Return whether all that live do."""
        return self._resumption.handed_over(self._streams.publishing)

    def keep_up(self) -> None:
        """Do what is due each second."""
        self._streams.sort_out_silent_workers()
        self._streams.came_and_gone.clear()  # forwarder or transmitter tells of these

    def tables(self) -> dict[str, KeptCounts]:
        """Return what is to be kept for the next process."""
        return {**self._resumption.tables(), **self._streams.tables()}

    def room(self) -> dict[str, tuple[str, ...]]:
        """Return the counters that a table may come to have, by its kind."""
        return {"origin": ORIGIN_COUNTERS}

    def accounts(self) -> Accounts:
        """Return one account an origin."""
        return self._streams.accounts()

    def close(self) -> None:
        """Look after workers no more."""
        self._streams.close()

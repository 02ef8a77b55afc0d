"""Sources of the batches that other sites are to have: the bus now, a journal when there is one.

A source is *patient* if what is not read now can be read later. Of an impatient one, such as the bus, everything is
read at once, and what finds no room is lost and counted.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Protocol

from services.uplink.packs import Pack
from shared.bus.kept_counts import KeptCounts, KeptFile
from shared.bus.messages import Message, Status
from shared.bus.zmq_sockets import Subscriber
from shared.datagrams.batch import DatagramBatch
from shared.fanout.resumption import Resumption
from shared.fanout.streams import ORIGIN_COUNTERS, FollowedStreams
from shared.ledger.accounts import Accounts

OWN_WORKERS: Final = ("ingest.",)
"""The workers whose batches may leave: what came from another site has `uplink.` as its worker, and stays here."""


class Taken(NamedTuple):
    """A batch that is to be sent, with the message that brought it."""

    message: Message
    batch: DatagramBatch


class BatchSource(Protocol):
    """Batches of workers of this host, each once, in order."""

    patient: ClassVar[bool]

    def fileno(self) -> int:
        """Return the descriptor that wakes whoever waits for batches; it is edge-triggered."""

    def read(self, most: int) -> Iterator[Taken]:
        """Yield what has come, of up to `most` messages."""

    def acknowledged(self, pack: Pack) -> None:
        """Note that JetStream keeps these batches: a journal's cursor may go on."""

    def accounts(self) -> Accounts:
        """Return the accounts of what came, and of what never did."""


class BusBatches:
    """Batches as they come by the bus, also those that workers held while an uplink was restarted."""

    patient: ClassVar[bool] = False

    def __init__(self, name: str, subscriber: Subscriber, directory: Path, kept: KeptFile) -> None:
        self._subscriber = subscriber
        self._streams = FollowedStreams(subscriber, directory, kept, OWN_WORKERS)
        self._resumption = Resumption(name, subscriber, kept.new_counts)
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

    def _take(self, message: Message) -> Iterator[Taken]:
        if isinstance(message.body, Status):
            self._streams.reconcile(message.envelope, message.body)
        elif message.batch is not None:
            count = len(message.batch)
            if self._streams.note_batch(message.topic, message.envelope, count) is not None and count:
                yield Taken(message, message.batch)

    def acknowledged(self, pack: Pack) -> None:
        """Do nothing: what has passed on the bus can't be read again."""

    def unserved(self) -> Iterator[tuple[str, int]]:
        """Yield streams, and datagrams that were there while no uplink was, since the last call."""
        for each in self._streams.pop_unserved():
            yield each.stream, each.datagrams

    def hand_over(self) -> None:
        """Ask workers to hold what they publish from now on: this process ends."""
        self._resumption.hand_over()

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

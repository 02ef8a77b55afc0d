"""Batches that wait until all that has come is taken, so that those of a stream are handled as one."""

from dataclasses import dataclass, field

from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import MAX_GATHERED, MAX_GATHERED_PAYLOAD, Gathered


@dataclass(slots=True)
class _Waiting:
    """Batches of a stream, with their rows and bytes of payload together."""

    batches: list[DatagramBatch] = field(default_factory=list)
    rows: int = 0
    payload: int = 0


class WaitingBatches:
    """Batches that wait, by stream, all for the same: those that are `joining` get nothing of them."""

    def __init__(self) -> None:
        self.joining: frozenset[str] = frozenset()
        self._waiting: dict[str, _Waiting] = {}

    @property
    def streams(self) -> list[str]:
        """The streams of which any waits."""
        return list(self._waiting)

    def has_room(self, batch: DatagramBatch, joining: frozenset[str]) -> bool:
        """Return whether a batch may wait together with those that do."""
        waiting = self._waiting.get(batch.stream)
        return joining == self.joining and (waiting is None or waiting.rows + len(batch) <= MAX_GATHERED)

    def add(self, batch: DatagramBatch, joining: frozenset[str]) -> bool:
        """Let a batch wait; return whether its stream should wait for more."""
        self.joining = joining
        waiting = self._waiting.setdefault(batch.stream, _Waiting())
        waiting.batches.append(batch)
        waiting.rows += len(batch)
        waiting.payload += len(batch.payload)
        return waiting.payload < MAX_GATHERED_PAYLOAD

    def gather(self, stream: str) -> Gathered:
        """Return what waits of a stream."""
        return Gathered(self._waiting.pop(stream).batches)

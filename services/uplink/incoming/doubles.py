"""Datagrams of flow exporters that feed two sites: what came from one site comes from the other once more. No I/O.

Two datagrams are one if they come from one address, have one length, and begin with the same 40 bytes. There NetFlow,
IPFIX and sFlow have the exporter's domain, its number of the datagram, and the time. So an exporter that begins its
numbers anew, or numbers apart what it sends to each site, is not taken for another one. Other datagrams have no such
number: syslog may say the same twice, and mean it. What comes twice from one site is no double either.
"""

import secrets
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import DatagramBatch
from shared.datagrams.export_headers import HEAD_WORDS, KINDS, Words, read_heads

WAYS: Final = 4
"""Places for a mark; the next one is taken in turn, so that the oldest goes first."""
BUCKET_BYTES: Final = WAYS * (8 + 1) + 1
OWN: Final = ""
"""This site, among those that datagrams come from."""
HEAD_BYTES: Final = 4 * HEAD_WORDS
HEAD_ENDS: Final = np.arange(4, HEAD_BYTES + 4, 4)
Mask = npt.NDArray[np.bool_]
Marks = npt.NDArray[np.uint64]


class Doubles:
    """Remembers the last datagrams of one stream, of this protocol, in a table of at most so many bytes.

    What is forgotten passes once more. Nothing is kept back but what another site has sent.
    """

    def __init__(self, protocol: str, most_bytes: int) -> None:
        self._kinds = KINDS[protocol]
        buckets = 1 << max(4, (most_bytes // BUCKET_BYTES).bit_length() - 1)
        self._marks = np.zeros((buckets, WAYS), np.uint64)
        self._origins = np.zeros((buckets, WAYS), np.uint8)
        self._next = np.zeros(buckets, np.uint8)
        self._sites: dict[str, int] = {}
        self._factors = np.array([secrets.randbits(64) | 1 for _ in range(2)], np.uint64)

    def find(self, site: str, batch: DatagramBatch) -> Mask | None:
        """Note a batch of a site; return which rows another site has sent already, or None where there is none."""
        heads = read_heads(batch)
        found = [kind.read(batch, heads).rows for kind in self._kinds]
        rows = found[0] if len(found) == 1 else np.concatenate(found)
        if not len(rows):
            return None
        marks = self._mark(batch, heads, rows)
        buckets = (marks >> np.uint64(20)).astype(np.int64) & (len(self._marks) - 1)
        number = self._sites.setdefault(site, len(self._sites) % 256)
        same = self._marks[buckets] == marks[:, None]
        doubles = (same & (self._origins[buckets] != number)).any(axis=1)
        known = same.any(axis=1)
        if not known.all():
            self._remember(buckets[~known], marks[~known], number)
        if not doubles.any():
            return None
        mask = np.zeros(len(batch), np.bool_)
        mask[rows[doubles]] = True
        return mask

    def _remember(self, buckets: npt.NDArray[np.int64], marks: Marks, number: int) -> None:
        """Put marks into their buckets; where several of a batch have one bucket, a turn for each."""
        for _ in range(WAYS):
            ways = self._next[buckets]
            self._marks[buckets, ways], self._origins[buckets, ways] = marks, number
            self._next[buckets] = (ways + 1) % WAYS
            left = ~(self._marks[buckets] == marks[:, None]).any(axis=1)
            buckets, marks = buckets[left], marks[left]

    def _mark(self, batch: DatagramBatch, heads: Words, rows: npt.NDArray[np.int64]) -> Marks:
        """Return a number for each of these rows that tells it from all others; how it is made is a secret."""
        lengths = batch.rows["length"][rows]
        heads = heads[rows]
        if int(lengths.min()) < HEAD_BYTES:  # what is behind the end is undefined
            heads = np.where(lengths[:, None] >= HEAD_ENDS, heads, np.uint32(0))
        sources = np.ascontiguousarray(batch.words[rows, 1:]).view(np.uint64)
        marks: Marks = lengths.astype(np.uint64) * self._factors[0]
        for words in (heads.view(np.uint64), sources):
            for column in words.T:
                marks += column
                marks ^= marks >> np.uint64(29)
                marks *= self._factors[1]
        marks ^= marks >> np.uint64(32)
        return marks | np.uint64(1)


def without(batch: DatagramBatch, rows: Mask) -> DatagramBatch:
    """Return a batch without these rows; its payloads stand end to end."""
    kept, view, offsets = np.flatnonzero(~rows), memoryview(batch.payload), batch.offsets.tolist()
    lengths = batch.length_list
    payload = b"".join([view[offsets[row] : offsets[row] + lengths[row]] for row in kept.tolist()])
    return DatagramBatch(batch.stream, batch.received_ns, batch.rows[kept], payload)

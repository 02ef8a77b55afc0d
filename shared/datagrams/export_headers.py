"""The headers of NetFlow v5 and v9, IPFIX and sFlow v5 as columns: the exporter of a datagram, and its number. No I/O.

A datagram that is longer or shorter than its header says, or of another version, is not taken for one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import DatagramBatch
from shared.ledger.counters import EXPORTER_MISSED, EXPORTER_MISSED_FLOWS, EXPORTER_MISSED_RECORDS

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

V5_HEADER, V5_RECORD, V9_HEADER, IPFIX_HEADER = 24, 48, 20, 16
AGENT_WORDS: Final = {1: 1, 2: 4}
"""Words of an sFlow agent's address, by its type: IPv4 or IPv6."""
HEAD_WORDS: Final = 10
"""Words of the longest of these headers, sFlow's."""


@dataclass(frozen=True, slots=True)
class Headers:
    """The datagrams of a protocol, n of a batch: their rows, and one column a fact.

    `keys`, uint32, shape (n, 6), tell exporters apart. The others are int64, shape (n,): the number that a datagram
    bears, the numbers that it takes, and the exporter's uptime in milliseconds, all 0 where it does not say.
    """

    rows: Integers
    keys: Words
    number: Integers
    count: Integers
    uptime: Integers


def read_heads(batch: DatagramBatch) -> Words:
    """Return the first words of each payload, big-endian, shape (n, HEAD_WORDS): a copy.

    The end of a shorter one is undefined.
    """
    buffer, rows, size = np.frombuffer(batch.payload, np.uint8), len(batch), 4 * HEAD_WORDS
    apart = batch.stride
    if not apart and rows and int(batch.lengths.min()) == (longest := int(batch.lengths.max())):
        apart = longest
    if apart >= size:
        octets = np.ascontiguousarray(buffer[: rows * apart].reshape(rows, apart)[:, :size])
    else:
        octets = gather(buffer, batch.offsets[:-1], size)
    return octets.view(">u4").astype(np.uint32)


def gather(buffer: Bytes, at: Integers, size: int) -> Bytes:
    """Return `size` bytes from each of these places, shape (n, size), a copy; the last byte repeats past the end."""
    if not len(buffer):
        return np.zeros((len(at), size), np.uint8)
    found: Bytes = buffer[np.minimum(at[:, None] + np.arange(size), len(buffer) - 1)]
    return found


def _headers(
    chosen: Integers, keys: Words, words: Words, number: int, count: Integers | None = None, uptime: int | None = None
) -> Headers:
    """Return headers with number and uptime from words of the chosen heads; without a `count` each takes one number."""
    none = np.zeros(len(chosen), np.int64)
    return Headers(
        chosen,
        keys,
        words[:, number].astype(np.int64),
        none + 1 if count is None else count,
        none if uptime is None else words[:, uptime].astype(np.int64),
    )


def _by_source(batch: DatagramBatch, chosen: Integers, part: Words, tag: int) -> Words:
    """Return keys of a source address and the number by which it tells its parts apart."""
    keys = np.empty((len(chosen), 6), np.uint32)
    keys[:, :4] = np.ascontiguousarray(batch.rows["address"][chosen]).view(np.uint32)
    keys[:, 4], keys[:, 5] = part, tag
    return keys


def netflow_v5(batch: DatagramBatch, heads: Words) -> Headers:
    """Read NetFlow v5: the number counts flows, by source address, engine type and engine id."""
    count = (heads[:, 0] & 0xFFFF).astype(np.int64)
    ours = (heads[:, 0] >> 16 == 5) & (count > 0)
    chosen = np.flatnonzero(ours & (batch.lengths == V5_HEADER + V5_RECORD * count))
    words = heads[chosen]
    keys = _by_source(batch, chosen, words[:, 5] >> np.uint32(16), 5)
    return _headers(chosen, keys, words, 4, count[chosen], uptime=1)


def netflow_v9(batch: DatagramBatch, heads: Words) -> Headers:
    """Read NetFlow v9 (RFC 3954, 5.1): the number counts datagrams, by source address and source id."""
    chosen = np.flatnonzero((heads[:, 0] >> 16 == 9) & (batch.lengths >= V9_HEADER))
    words = heads[chosen]
    return _headers(chosen, _by_source(batch, chosen, words[:, 4], 9), words, 3, uptime=1)


def ipfix(batch: DatagramBatch, heads: Words) -> Headers:
    """Read IPFIX (RFC 7011, 3.1): the number counts data records, by source address and observation domain.

    The header does not give the number of records in a datagram: `count` is 0.
    """
    ours = (heads[:, 0] >> 16 == 10) & (batch.lengths >= IPFIX_HEADER)
    chosen = np.flatnonzero(ours & ((heads[:, 0] & 0xFFFF) == batch.lengths))
    words = heads[chosen]
    nothing = np.zeros(len(chosen), np.int64)
    return _headers(chosen, _by_source(batch, chosen, words[:, 3], 10), words, 2, nothing)


def sflow(batch: DatagramBatch, heads: Words, kind: int) -> Headers:
    """Read sFlow v5 of agents with an address of one kind: the number counts datagrams, by agent and sub-agent."""
    sub_agent = 2 + AGENT_WORDS[kind]
    ours = (heads[:, 0] == 5) & (heads[:, 1] == kind)
    chosen = np.flatnonzero(ours & (batch.lengths >= 4 * (sub_agent + 4)))
    words = heads[chosen]
    keys = np.zeros((len(chosen), 6), np.uint32)
    keys[:, : AGENT_WORDS[kind]], keys[:, 4], keys[:, 5] = words[:, 2:sub_agent], words[:, sub_agent], kind
    return _headers(chosen, keys, words, sub_agent + 1, uptime=sub_agent + 2)


class Kind(NamedTuple):
    """A kind of datagram: the function that reads it from a batch and its heads, and the counter for its gaps.

    Sets stand behind its header of `header` bytes; 0: it has none.
    """

    read: Callable[[DatagramBatch, Words], Headers]
    unit: str
    header: int = 0


KINDS: Final[Mapping[str, tuple[Kind, ...]]] = {
    "netflow": (Kind(netflow_v5, EXPORTER_MISSED_FLOWS), Kind(netflow_v9, EXPORTER_MISSED, V9_HEADER)),
    "ipfix": (Kind(ipfix, EXPORTER_MISSED_RECORDS, IPFIX_HEADER),),
    "sflow": tuple(Kind(partial(sflow, kind=kind), EXPORTER_MISSED) for kind in AGENT_WORDS),
}

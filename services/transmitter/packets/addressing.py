"""A collector's address for copies, and the numbers that its packets carry. No I/O."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final

import numpy as np
import numpy.typing as npt

from services.transmitter.packets.headers import LINK_HEADER, Headers, Sums, sum_addresses
from shared.datagrams.sampling import Hashes


@dataclass(frozen=True, slots=True)
class Addressing:
    """The target of copies: a collector's address (4 or 16 bytes) and port, and the marks of its packets.

    `ethernet` is the 14 bytes of link header; empty where raw IP packets are sent.
    """

    version: int
    address: bytes
    port: int
    hop_limit: int
    dscp: int
    link_index: int = 0
    ethernet: bytes = b""


class AddressingColumns:
    """The fields of targets to fill in: for one target a value, for several a column with one a unit."""

    def __init__(self, addressings: Sequence[Addressing], counts: npt.NDArray[np.int64]) -> None:
        first = addressings[0]
        addresses, ethernets = (
            b"".join(each.address for each in addressings),
            b"".join(each.ethernet for each in addressings),
        )
        self.address: Headers = np.frombuffer(addresses, f"V{len(first.address)}")
        self.ethernet: Headers | None = np.frombuffer(ethernets, f"V{LINK_HEADER}") if first.ethernet else None
        numbers = np.array([(each.port, each.hop_limit, each.dscp) for each in addressings], np.uint32)
        sums = sum_addresses(np.frombuffer(addresses, np.uint8).reshape(len(addressings), -1))
        if len(addressings) > 1:
            index = np.repeat(np.arange(len(addressings)), counts)
            self.address, numbers, sums = self.address[index], numbers[index], sums[index]
            self.ethernet = None if self.ethernet is None else self.ethernet[index]
        self.port, self.hop_limit, self.dscp = numbers.T
        self.address_sum = sums


class Identification:
    """The numbers that tell the packets to an address apart, so that fragments of different datagrams never mix.

    Fragments are put together by addresses, not ports (RFC 791, 3.2): all collectors at an address share one series.
    IPv4 has only 16 bits, so fragmented datagrams count by source address, in buckets (as in Linux, net/ipv4/route.c).
    A number repeats after 65,535 fragmented datagrams of an address or of those that share its bucket. It is never 0:
    raw IP replaces 0 with another number in each fragment.
    """

    BUCKETS: Final = 1024

    def __init__(self) -> None:
        self._turn = Lock()  # collectors at one address may be served by different threads
        self._next = secrets.randbits(32)
        self._by_bucket: npt.NDArray[np.uint32] | None = None

    def draw(self, count: int) -> int:
        """Take `count` numbers in a row; return the first of them."""
        with self._turn:
            start = self._next
            self._next = (start + count) & 0xFFFFFFFF
        return start

    def draw_for_fragments(self, sources: Hashes) -> Sums:
        """Return a number from 1 to 65,535 for each fragmented datagram, given the hashes of their source addresses."""
        taken = np.empty(len(sources), np.uint32)
        with self._turn:
            if self._by_bucket is None:
                drawn = np.frombuffer(secrets.token_bytes(2 * self.BUCKETS), np.uint16)
                self._by_bucket = drawn.astype(np.uint32) % 0xFFFF + 1
            for number, bucket in enumerate((sources % np.uint64(self.BUCKETS)).tolist()):
                taken[number] = last = self._by_bucket[bucket]
                self._by_bucket[bucket] = last % 0xFFFF + 1
        return taken

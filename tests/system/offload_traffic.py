"""Numbered datagrams at a rate, and all copies of them, read as frames where the collectors' cable ends."""

import errno
import socket
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

from shared.datagrams.limits import MAX_ROWS
from shared.datagrams.mmsg import IOVEC, MMSGHDR, ReceiveArena, addresses_of, send
from tests.background import Background
from tests.benchmarks.site import Sink
from tests.services.offload.site import EXPORTERS, PORT, RELAY, OffloadSite, packed
from tests.system.offload_collectors import Place

ADDRESSES: Final = (*EXPORTERS[4], *EXPORTERS[6])
VECTOR: Final = 64
"""Datagrams that an exporter has ready; those of a burst are neighbours."""
BURST: Final = 16
LARGE: Final = 3000
"""Bytes of a datagram that comes in fragments."""
HEAD: Final = 96
"""Bytes of a frame that are looked at: up to the number in the payload."""
ETHERTYPES: Final = {4: 0x0800, 6: 0x86DD}
DIGESTED: Final = 1 << 16
"""Copies that are looked at together."""
DISCARD: Final = 9
"""The port of datagrams that have a next hop confirmed."""
PACKET_STATISTICS: Final = 6
SOL_PACKET: Final = 263

COPY: Final = np.dtype([("key", "u4"), ("number", "i8"), ("large", "?"), ("source", "u1")])
"""A copy: the key of its place, with the exporter in the lowest bits; its number, and the last byte of its source."""


def is_large(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which datagrams come in fragments."""
    return np.equal(numbers % 21, 7)


def key_of(place: Place, exporter: int = 0) -> int:
    """Return the key of a place, and of the copies there of an exporter's datagrams."""
    return (packed(place[0])[-1] << 16 | place[1]) << 4 | exporter


class Traffic(Background):
    """Exporters that send bursts of numbered datagrams in turn, so many a second, until told to stop."""

    def __init__(self, site: OffloadSite, opened: ExitStack, rate: float, draw: np.random.Generator) -> None:
        super().__init__()
        self._rate, self._draw = rate, draw
        self.sent = np.zeros(len(ADDRESSES), np.int64)
        """By exporter: datagrams that have been sent, or are just being sent."""
        self.refused = 0
        self._vectors = []
        for number in range(len(ADDRESSES)):
            version = 4 if number < len(EXPORTERS[4]) else 6
            sock = opened.enter_context(site.exporting(number % len(EXPORTERS[4]), version))
            sock.connect((RELAY[version], PORT))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            payloads, pieces, headers = np.zeros((VECTOR, LARGE), np.uint8), np.zeros(VECTOR, IOVEC), None
            payloads[:, 0] = number
            pieces["base"] = addresses_of(payloads, LARGE, VECTOR)
            headers = np.zeros(VECTOR, MMSGHDR)
            headers["iov"], headers["iovlen"] = addresses_of(pieces, IOVEC.itemsize, VECTOR), 1
            self._vectors.append((sock, payloads, pieces, headers))

    def run(self) -> None:
        """Send until told to stop."""
        began, count = time.monotonic(), 0
        while not self.stopping.is_set():
            if count > (time.monotonic() - began) * self._rate:
                time.sleep(0.001)
                continue
            burst = int(self._draw.integers(1, BURST + 1))
            self._send(int(self._draw.integers(len(ADDRESSES))), burst)
            count += burst

    def _send(self, exporter: int, burst: int) -> None:
        sock, payloads, pieces, headers = self._vectors[exporter]
        numbers = np.arange(self.sent[exporter], self.sent[exporter] + burst)
        payloads[:burst, 1:5] = numbers.astype(">u4").view(np.uint8).reshape(-1, 4)
        pieces["len"][:burst] = np.where(is_large(numbers), LARGE, 60 + numbers * 37 % 1400)
        self.sent[exporter] += burst  # before they leave: whoever reads it later knows of all that have left
        start = 0
        while start < burst:
            taken, error = send(sock.fileno(), headers, start, burst)
            if error and error != errno.EAGAIN:
                self.refused, start = self.refused + 1, start + 1  # the cable is away
            elif error:
                time.sleep(0.0002)
            start += taken


@dataclass(slots=True)
class Came:
    """One exporter's datagrams at a place; `seen` has how often each number came."""

    seen: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1 << 14, np.uint8))
    foremost: int = -1
    """The highest number that has come."""
    behind: int = -1
    """The highest of those that came behind a higher one: each of two ways by itself keeps the order."""
    large: int = -1
    """The highest of those in fragments, which come by one way."""
    total: int = 0

    def note(self, numbers: npt.NDArray[np.int64], large: npt.NDArray[np.bool_], *, one_way: bool) -> str:
        """Note copies as they came; return what is wrong with them."""
        highest = int(numbers.max())
        if highest >= len(self.seen):
            self.seen = np.concatenate([self.seen, np.zeros(max(highest + 1, len(self.seen)), np.uint8)])
        np.add.at(self.seen, numbers, 1)
        self.total += len(numbers)
        twice = numbers[self.seen[numbers] > 1]
        if len(twice):
            return f"{len(twice)} come twice: {twice[:9].tolist()}"
        before = np.maximum.accumulate(np.concatenate([[self.foremost], numbers]))
        self.foremost = int(before[-1])
        late = np.concatenate([[self.behind], numbers[numbers < before[:-1]]])
        whole = np.concatenate([[self.large], numbers[large]])
        self.behind, self.large = int(late[-1]), int(whole[-1])
        if one_way and len(late) > 1:
            return f"{len(late) - 1} out of order where one sender makes all copies: {late[1:9].tolist()}"
        if (np.diff(late) <= 0).any():
            at = int(np.flatnonzero(np.diff(late) <= 0)[0])
            return f"out of order in more than one way: {late[max(0, at - 3) : at + 6].tolist()}"
        if (np.diff(whole) <= 0).any():
            return f"fragments out of order: {whole[1:][np.diff(whole) <= 0][:9].tolist()}"
        return ""


class Frames(Background):
    """Reads all frames that come to the collectors' host, and looks at each copy's number, source and order."""

    def __init__(self, site: OffloadSite, opened: ExitStack) -> None:
        super().__init__()
        self._site, self._opened = site, opened
        self._places: dict[Place, socket.socket] = {}
        self.came: defaultdict[int, Came] = defaultdict(Came)
        self.faults: list[str] = []
        self.relayed: set[int] = set()
        """Keys of places whose copies come from the relay's own address."""
        self._ipv6: set[int] = set()
        self._kept: list[npt.NDArray[np.void]] = []
        self.dropped = 0
        self._heads = np.zeros((MAX_ROWS, HEAD), np.uint8)
        self._socks = {}
        for version, ethertype in ETHERTYPES.items():
            sock = opened.enter_context(site.siem.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype)))
            try:
                sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 28)  # SO_RCVBUFFORCE
            except PermissionError:
                pytest.skip("only root can have a receive buffer in which all copies wait")
            sock.setblocking(False)
            self._socks[version] = sock
        self._lock = threading.Lock()

    def expect(self, version: int, place: Place, *, relayed: bool) -> None:
        """Open a socket at a place, so that the host does not refuse what comes."""
        if place not in self._places:
            family = socket.AF_INET6 if version == 6 else socket.AF_INET
            sock = self._places[place] = self._opened.enter_context(self._site.siem.socket(family, socket.SOCK_DGRAM))
            sock.bind(place)
            Sink(sock).discard()
            if version == 6:
                self._ipv6.add(key_of(place))
            if relayed:
                self.relayed.add(key_of(place))

    def run(self) -> None:
        """Read until told to stop."""
        arena = ReceiveArena()
        while not self.stopping.is_set():
            found = sum(self._read(arena, version) for version in ETHERTYPES)
            if sum(map(len, self._kept)) >= DIGESTED or not found:
                self.digest()
            if not found:
                time.sleep(0.005)

    def _read(self, arena: ReceiveArena, version: int) -> int:
        sock = self._socks[version]
        count = arena.receive(sock.fileno(), self._heads.reshape(-1).data, HEAD)
        if count:
            heads = self._heads[:count]
            arena.restore(count)
            copies = _parse4(heads) if version == 4 else _parse6(heads)
            with self._lock:
                self._kept.append(copies)
        return count

    def digest(self) -> None:
        """Look at what has come."""
        with self._lock:
            kept, self._kept = self._kept, []
            if not kept:
                return
            copies = np.concatenate(kept)
            copies = copies[np.argsort(copies["key"], kind="stable")]
            starts = np.flatnonzero(np.diff(copies["key"], prepend=-1))
            for some in np.split(copies, starts[1:]) if len(copies) else ():
                self._note(some)

    def _note(self, some: npt.NDArray[np.void]) -> None:
        key = int(some["key"][0])
        exporter, place = key & 15, key >> 4 << 4
        relayed = place in self.relayed
        # A collector of the other IP version has all copies from one sender.
        one_way = (place in self._ipv6) != (exporter >= len(EXPORTERS[4]))
        wrong = self.came[key].note(some["number"], some["large"], one_way=one_way)
        source = packed(ADDRESSES[exporter])[-1]
        if not relayed and (some["source"] != source).any():
            wrong = wrong or f"copies come from {set(some['source'].tolist())}"
        if wrong:
            self.faults.append(f"{ADDRESSES[exporter]} at {(key >> 20) & 255}:{key >> 4 & 0xFFFF}: {wrong}")

    def total(self, place: Place) -> int:
        """The number of copies that have come to a place."""
        return sum(self.came[key_of(place, exporter)].total for exporter in range(len(ADDRESSES)))

    def lost(self) -> int:
        """Frames that this reader has lost."""
        for sock in self._socks.values():
            self.dropped += int.from_bytes(sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)[4:], "little")
        return self.dropped


def _parse4(heads: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    first = ((heads[:, 20] & 0x1F) == 0) & (heads[:, 21] == 0) & (heads[:, 23] == 17)
    heads = heads[first]
    return _copies(heads[:, 29], heads[:, 33], heads[:, 36:38], heads[:, 42:47])


def _parse6(heads: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    large = heads[:, 20] == 44
    first = large & (heads[:, 54] == 17) & (heads[:, 56] == 0) & ((heads[:, 57] & 0xF8) == 0)
    heads = np.concatenate([heads, np.zeros_like(heads[:, :8])], axis=1)
    heads[large, 54:HEAD] = heads[large, 62 : HEAD + 8]
    heads = heads[first | (heads[:, 20] == 17)]
    return _copies(heads[:, 37], heads[:, 53], heads[:, 56:58], heads[:, 62:67])


def _copies(*columns: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    source, address, port, payload = columns
    found = np.zeros(len(source), COPY)
    ports = port[:, 0].astype(np.uint32) << 8 | port[:, 1]
    found["key"] = (address.astype(np.uint32) << 16 | ports) << 4 | payload[:, 0]
    found["number"] = np.ascontiguousarray(payload[:, 1:5]).view(">u4")[:, 0] if len(source) else 0
    found["large"], found["source"] = is_large(found["number"]), source
    kept: npt.NDArray[np.void] = found[ports != DISCARD]
    return kept

"""The templates of flow exporters that a collector gets before the past: each exporter's before its first datagram.

They are as workers had them when the collector began to catch up. What they do not say of the time before comes in the
past itself. Numbers and clocks in their headers are set by that first datagram, so that it continues them. Pure.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from shared.bus.bodies.template_messages import TemplateDatagram
from shared.datagrams.batch import DatagramBatch

LATE_NS: Final = 10_000_000_000
"""Time by which a collector may have had datagrams from behind its place, at most."""


class _Header(NamedTuple):
    """Places in a header: its clocks, the number behind them, the domain behind that, and its end."""

    clock: int
    number: int
    domain: int
    end: int


_HEADERS: Final = {9: _Header(4, 12, 16, 20), 10: _Header(4, 8, 12, 16)}
"""By version: NetFlow v9 (RFC 3954, 5.1) and IPFIX (RFC 7011, 3.1)."""
Domain = tuple[bytes, int, bytes]
"""Address, version, and observation domain."""


class PastTemplates:
    """The templates that wait for a collector's pursuit of one stream."""

    def __init__(self) -> None:
        self._waiting: dict[Domain, list[TemplateDatagram]] = {}
        self._sent: dict[Domain, list[TemplateDatagram]] = {}
        self._addresses: set[bytes] = set()
        """Addresses of those that wait, and of some that did."""

    def add(self, datagrams: Iterable[TemplateDatagram], place_ns: int) -> None:
        """Take what a worker has kept, but nothing that was defined otherwise at a place in the past."""
        for each in datagrams:
            domain = _domain_of(each.address, each.payload)
            if domain and domain not in self._sent and each.since_ns <= place_ns + LATE_NS:
                self._waiting.setdefault(domain, []).append(each)
                self._addresses.add(each.address)

    def pop_for(self, batch: DatagramBatch) -> list[TemplateDatagram]:
        """Return the templates of the exporters in a batch that are to be sent before it."""
        if not self._waiting:
            return []
        found: list[TemplateDatagram] = []
        for address, payload in self._of_interest(batch):
            domain = _domain_of(address, payload)
            if domain and (kept := self._waiting.pop(domain, None)):
                self._sent[domain] = kept
                found += (_continued_by(payload, each) for each in kept)
        return found

    def _of_interest(self, batch: DatagramBatch) -> Iterator[tuple[bytes, bytes]]:
        addresses, starts = batch.rows["address"].tobytes(), batch.offsets.tolist()
        for row, start in enumerate(starts[: len(batch)]):
            address = addresses[16 * row : 16 * row + 16]
            if address in self._addresses:
                yield address, bytes(batch.payload[start : start + min(_LONGEST, batch.length_list[row])])

    def pop_rest(self) -> list[TemplateDatagram]:
        """Return those of exporters that were not in the past, as they are."""
        rest = [each for kept in self._waiting.values() for each in kept]
        self._waiting.clear()
        return rest

    def put_back(self) -> None:
        """Let all wait again: what was sent has not arrived."""
        self._waiting.update(self._sent)
        self._sent.clear()


_LONGEST: Final = max(header.end for header in _HEADERS.values())


def _domain_of(address: bytes, payload: bytes) -> Domain | None:
    version = int.from_bytes(payload[:2])
    header = _HEADERS.get(version)
    if header is None or len(payload) < header.end:
        return None
    return address, version, payload[header.domain : header.end]


def _continued_by(first: bytes, template: TemplateDatagram) -> TemplateDatagram:
    """Return a datagram with the clocks of another, and a number that this one continues."""
    clock, at, domain, _ = _HEADERS[int.from_bytes(first[:2])]
    number = int.from_bytes(first[at:domain]) - template.back & 0xFFFFFFFF
    payload = template.payload[:clock] + first[clock:at] + number.to_bytes(4) + template.payload[domain:]
    return TemplateDatagram(template.address, template.port, payload, template.aside)

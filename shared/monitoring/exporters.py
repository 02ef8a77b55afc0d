"""Exporters of the last seconds, from what the workers tell of them. No I/O."""

import ipaddress
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

from shared.bus.bodies.exporters_message import Exporters
from shared.client import Client
from shared.monitoring.picture import Exporter
from shared.net.addresses import unpack_address

MESSAGES: Final = 10
"""Messages of each worker and stream, one a second, that the shares are made of."""
MAX_FILTERS: Final = 256
"""Different lists of prefixes, a stream, that exporters are looked up in."""

MAX_KNOWN: Final = 65_536
"""Addresses whose collectors are remembered: to look one up in all filters takes a millisecond."""


class Shares:
    """The last messages of each worker and stream."""

    def __init__(self) -> None:
        self._told: defaultdict[tuple[str, str], deque[tuple[float, Exporters]]] = defaultdict(
            lambda: deque(maxlen=MESSAGES)
        )
        self._filters: dict[str, Counter[tuple[str, ...]]] = {}
        self._filters_of = -1
        self._known_takers: dict[tuple[str, str], int] = {}
        """Collectors of an address and stream, by these filters."""

    def note(self, worker: str, body: Exporters, now: float) -> None:
        """Take a message in."""
        self._told[worker, body.stream].append((now, body))

    def forget(self, before: float) -> None:
        """Forget workers that have told nothing since then."""
        for key, told in list(self._told.items()):
            if told[-1][0] < before:
                del self._told[key]

    def count_of(self, stream: str) -> int | None:
        """Return how many exporters the stream has had in a second lately; an exporter of two workers counts twice."""
        found = [max(body.exporters for _, body in told) for (_, of), told in self._told.items() if of == stream]
        return sum(found) if found else None

    def exporters(self, clients: Iterable[Client], version: int) -> tuple[Exporter, ...] | None:
        """Return the exporters, those that send most first; None: nobody has told of any.

        `clients` may get their datagrams; `version` changes with them.
        """
        if not self._told:
            return None
        if version != self._filters_of:
            self._filters, self._filters_of = _filters_by_stream(clients), version
            self._known_takers.clear()
        rates: defaultdict[bytes, list[float]] = defaultdict(lambda: [0.0, 0.0])
        workers: defaultdict[bytes, set[str]] = defaultdict(set)
        by_stream: defaultdict[bytes, Counter[str]] = defaultdict(Counter)
        totals: defaultdict[str, float] = defaultdict(float)
        missed: Counter[bytes] = Counter()
        numbered: set[str] = set()
        for (worker, stream), messages in self._told.items():
            seconds = sum(told.seconds for _, told in messages)
            if (last := messages[-1][1].missed) is not None:
                numbered.add(stream)
                missed.update(dict(last))
            for _, told in messages:
                totals[stream] += told.rows / seconds
                for address, count, size in told.most:
                    rates[address][0] += count * told.every / seconds
                    rates[address][1] += size * told.every / seconds
                    by_stream[address][stream] += count * told.every / seconds  # type: ignore[assignment]
                    workers[address].add(worker)
        found = [
            self._exporter(
                unpack_address(packed),
                rate,
                dict(by_stream[packed]),
                workers[packed],
                totals,
                missed[packed] if numbered & by_stream[packed].keys() else None,
            )
            for packed, rate in rates.items()
        ]
        return tuple(sorted(found, key=lambda exporter: -exporter.rate))

    def _exporter(
        self,
        address: str,
        rates: list[float],
        by_stream: dict[str, float],
        workers: set[str],
        totals: Mapping[str, float],
        missed: int | None,
    ) -> Exporter:
        streams = tuple(sorted(by_stream))
        whole = sum(totals[stream] for stream in streams)
        rate, byte_rate = rates
        share = min(1.0, rate / whole) if whole else 0.0
        takers = sum(self._takers(address, stream) for stream in streams)
        return Exporter(address, rate, byte_rate, share, streams, tuple(sorted(workers)), takers, by_stream, missed)

    def _takers(self, address: str, stream: str) -> int:
        known = self._known_takers.get((address, stream))
        if known is None:
            filters = self._filters.get(stream, Counter()) + self._filters.get("*", Counter())
            known = sum(count for prefixes, count in filters.items() if not prefixes or covers(prefixes, address))
            if len(self._known_takers) >= MAX_KNOWN:  # sources may be made up, ever new ones
                self._known_takers.clear()
            self._known_takers[address, stream] = known
        return known


def _filters_by_stream(clients: Iterable[Client]) -> dict[str, Counter[tuple[str, ...]]]:
    """Return how many collectors want each stream with each list of prefixes, the most frequent lists only."""
    found: defaultdict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for client in clients:
        for stream in client.streams:
            found[stream][client.prefixes] += 1
    return {stream: Counter(dict(counts.most_common(MAX_FILTERS))) for stream, counts in found.items()}


@lru_cache(maxsize=65_536)
def covers(prefixes: tuple[str, ...], address: str) -> bool:
    """Return whether an address is in one of the prefixes."""
    where = ipaddress.ip_address(address.partition("%")[0])
    return any(where in network for network in _networks(prefixes) if network.version == where.version)


@lru_cache(maxsize=4096)
def _networks(prefixes: tuple[str, ...]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(prefix, strict=False) for prefix in prefixes]

"""The policy on what may leave, for any client that asks; and the audit of refusals. No I/O; the clock is handed in."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shared.datagrams.batch import FEW_ROWS, ROW, Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.gso_runs import Mask
from shared.datagrams.prefix_set import Prefixes, halves_of
from shared.fanout.sending.route_scope import RouteScope
from shared.net.addresses import pack_address
from shared.process.log_limit import LogLimit
from shared.settings.tables import Transmitter

AUDIT_SECONDS: Final = 60.0
NOBODYS: Final = Prefixes(["0.0.0.0/8", "224.0.0.0/3", "::/128", "ff00::/8"])
"""Networks that no datagram can come from or go to: this network, multicast, reserved (RFC 6890), unspecified."""
LOOPBACK: Final = Prefixes(["127.0.0.0/8", "::1/128"])
"""Sources that are true only for a collector on this host."""
LINK_LOCAL: Final = Prefixes(["169.254.0.0/16", "fe80::/10"])
"""Sources that are true only for a collector without a router in between, which drops them (RFC 3927, RFC 4291)."""
FIRST_OCTET: Final = 16
"""Of an IPv4 source, in a row's bytes."""
BURST_SECONDS: Final = 0.1
"""Share of a second's allowance that may leave at once."""

Refusal = tuple[str, str]
"""A cause, and the sentence for the client."""


class Policy:
    """The rules of the settings."""

    def __init__(self, settings: Transmitter, clock: Callable[[], float]) -> None:
        self._interfaces = frozenset(settings.interfaces)
        self._ethertypes = settings.ethertype_numbers
        self._vlans = frozenset(settings.vlans)
        self._destinations = Prefixes(settings.destinations) if settings.destinations else None
        self._sources = Prefixes(settings.sources) if settings.sources else None
        self._rate = settings.frames_per_second
        self._clock = clock
        self._allowance = self._rate * BURST_SECONDS
        self._filled_at = clock()

    def allows_destination(self, address: str) -> bool:
        """Return whether copies may go to an address."""
        halves = np.frombuffer(pack_address(address), ">u8").astype(np.uint64).reshape(1, 2)
        covered = self._destinations is not None and bool(self._destinations.match(halves)[0])
        return covered and not NOBODYS.match(halves)[0]

    def refuse_interface(self, interface: str) -> Refusal | None:
        """Return why no client's frame may leave by an interface; None: it may."""
        if interface in self._interfaces:
            return None
        return "interface", f"{interface} is not in [transmitter] interfaces; add it there"

    def refuse_frame(self, vlans: Sequence[int], ethertype: int) -> Refusal | None:
        """Return why a client's frame with these tags may not leave; None: it may."""
        if refused := [vlan for vlan in vlans if vlan not in self._vlans]:
            return "vlan", f"VLAN {refused[0]} is not in [transmitter] vlans; add it there"
        if ethertype not in self._ethertypes:
            return "ethertype", f"ethertype {ethertype:#06x} is not in [transmitter] ethertypes; add it there"
        return None

    def refused_sources(self, batch: Gathered, scope: RouteScope) -> Mask | None:
        """Return the rows that may not be copied to a collector, as bool, shape (n,); None: all may."""
        # A full check only where an address begins as those of the networks above do.
        if self._sources is None and len(batch) <= FEW_ROWS and batch.all_ipv4:
            firsts = batch.packed[FIRST_OCTET :: ROW.itemsize]
            if min(firsts) > 0 and max(firsts) < 224 and not {127, 169}.intersection(firsts):
                return None
        elif self._sources is None and batch.all_ipv4:
            first = batch.rows["address"][:, 12]
            if not ((first - np.uint8(1) >= 223) | (first == 127) | (first == 169)).any():
                return None
        halves = halves_of(batch)
        refused = NOBODYS.match(halves)
        if scope is not RouteScope.HOST:
            refused |= LOOPBACK.match(halves)
        if scope is RouteScope.ROUTED:
            refused |= LINK_LOCAL.match(halves)
        if self._sources is not None:
            refused |= ~self._sources.match(halves)
        return refused if refused.any() else None

    @property
    def limited(self) -> bool:
        """Return whether there is a limit of frames a second."""
        return self._rate > 0

    def grant(self, wanted: int) -> int:
        """Return the number of `wanted` frames that may leave now, under the limit of frames a second."""
        if not self._rate:
            return wanted
        now = self._clock()
        most = max(1.0, self._rate * BURST_SECONDS)
        self._allowance = min(most, self._allowance + (now - self._filled_at) * self._rate)
        self._filled_at = now
        granted = min(wanted, math.floor(self._allowance))
        self._allowance -= granted
        return granted

    def give_back(self, unused: int) -> None:
        """Return unused frames to the allowance: they could not leave now."""
        self._allowance += unused


@dataclass(frozen=True, slots=True)
class Admitted:
    """The rows (None: all) that may be copied to a collector, and the numbers that may not, by reason."""

    rows: Indices | None
    other_family: int = 0
    refused: int = 0


class Verdicts:
    """The policy's verdicts on one batch, found out once for all collectors with the same question."""

    def __init__(self, policy: Policy, batch: Gathered) -> None:
        self._policy = policy
        self._batch = batch
        self._found: dict[tuple[int, int, RouteScope], Admitted] = {}
        self._refused: dict[RouteScope, Mask | None] = {}

    def admit(self, rows: Indices | None, version: int, scope: RouteScope) -> Admitted:
        """Return the rows of these that may be copied to a collector of an IP version."""
        key = id(rows), version, scope
        if key not in self._found:
            self._found[key] = self._admit(rows, version, scope)
        return self._found[key]

    def _admit(self, rows: Indices | None, version: int, scope: RouteScope) -> Admitted:
        if scope not in self._refused:
            self._refused[scope] = self._policy.refused_sources(self._batch, scope)
        refused = self._refused[scope]
        if refused is None and self._batch.all_ipv4 and version == 4:
            return Admitted(rows)
        wanted = np.arange(len(self._batch)) if rows is None else rows
        mine = self._batch.ipv4[wanted] == (version == 4)
        allowed = mine if refused is None else mine & ~refused[wanted]
        counts = np.count_nonzero(mine), np.count_nonzero(allowed)
        if counts[1] == len(wanted):
            return Admitted(rows)
        return Admitted(wanted[allowed], len(wanted) - int(counts[0]), int(counts[0] - counts[1]))


class Audit:
    """Counts refusals, and calls `say(event, **facts)` for each cause at most once a minute."""

    def __init__(self, say: Callable[..., object], clock: Callable[[], float]) -> None:
        self.counters: Counter[str] = Counter()
        self._say = say
        self._restraint = LogLimit(AUDIT_SECONDS, clock)

    def refuse(self, cause: str, count: int, **facts: Any) -> None:
        """Count a refusal; `facts` are those of the one that is logged."""
        self.counters[cause] += count
        if unsaid := self._restraint.admit(cause, count):
            self._say("refused by the policy", cause=cause, count=unsaid, **facts)

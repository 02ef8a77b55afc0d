"""Losses: each at the place on the datagrams' way where it happened, under its cause. No I/O."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple

from shared.ledger.accounts import is_origin, parse_arriving, parse_origin
from shared.ledger.counters import (
    AFTER_SENDING,
    BUFFER_FULL,
    BUS_FULL,
    DESTINATION_REFUSED,
    DISK_ERROR,
    DISK_FULL,
    DROPPED,
    EXPORTER_MISSED,
    EXPORTER_MISSED_FLOWS,
    EXPORTER_MISSED_RECORDS,
    KERNEL_DROPPED,
    LEFT,
    MISSED,
    NO_MEMORY,
    OTHER_FAMILY,
    OVER_SHARE,
    QUEUE_FULL,
    RATE_LIMITED,
    SERVER_LIMIT,
    SERVER_REFUSED,
    SERVER_SLOW,
    SOURCE_REFUSED,
    TOO_MANY_WORKERS,
    WITHHELD,
)
from shared.ledger.equations import is_loss

UPSTREAM: Final = "upstream"
"""The place whose counts fall now and then: what the kernel has dropped is taken off, once it is found there."""
PLACES: Final = (UPSTREAM, "kernel", "ingest", "bus", "uplink", "way out", "network", "journal")
"""Places on its way at which a datagram may be lost. `uplink` is between sites; `network` is all behind this host, as
far as ICMP tells.

What the journal does not keep is lost for those who look at the past, and no copy is lost by it.
"""

Kind = Literal["overflow", "unreachable", "policy"]
"""There was no room; there was no way, or nobody there; or settings say so."""
_OVERFLOW: Final = frozenset(
    name.removeprefix(DROPPED)
    for name in (
        *(KERNEL_DROPPED, MISSED, BUS_FULL, BUFFER_FULL, QUEUE_FULL, NO_MEMORY, OVER_SHARE),
        *(DISK_FULL, DISK_ERROR, SERVER_SLOW, TOO_MANY_WORKERS),
    )
)
_POLICY: Final = frozenset(
    name.removeprefix(DROPPED)
    for name in (
        *(WITHHELD, DESTINATION_REFUSED, SOURCE_REFUSED, OTHER_FAMILY, RATE_LIMITED),
        *(SERVER_REFUSED, SERVER_LIMIT),
    )
)


class Loss(NamedTuple):
    """A loss: its place on the way, the service that reports it, the stream or collector, the amount, and of what.

    `what` is the cause, or at the places `upstream`, `kernel` and `bus` the unit.
    """

    place: str
    service: str
    of: str
    lost: int
    what: str


def losses(accounts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[Loss]:
    """Return the losses that services report, in the order of the way. `accounts` are those of each service.

    What was lost from each start of a worker is one loss: they differ in nothing that is told.
    """
    lost = Counter[Loss]()
    for _, loss in losses_by_account(accounts):
        lost[loss._replace(lost=0)] += loss.lost
    return sorted(
        (loss._replace(lost=count) for loss, count in lost.items()), key=lambda loss: PLACES.index(loss.place)
    )


def losses_by_account(accounts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[tuple[str, Loss]]:
    """Yield the losses that services report, each with the name of its account."""
    for service, kept in sorted(accounts.items()):
        for name, account in sorted(kept.items()):
            yield from ((name, loss) for loss in _losses(service, name, account) if loss.lost > 0)


def _losses(service: str, name: str, account: Mapping[str, int]) -> Iterator[Loss]:
    """Yield the loss at each place where there may be one: mostly 0."""
    kind, _, of = name.partition("/")
    if kind == "stream":
        by_kernel = account.get(KERNEL_DROPPED, 0)
        # Datagrams that the kernel dropped are missing from the exporters' numbers too. Of flows and records it is not
        # known how many those are.
        upstream = {"datagrams": max(0, account.get(EXPORTER_MISSED, 0) - by_kernel)}
        upstream |= {"flows": account.get(EXPORTER_MISSED_FLOWS, 0), "records": account.get(EXPORTER_MISSED_RECORDS, 0)}
        for unit, lost in upstream.items():
            yield Loss(UPSTREAM, service, of, lost, unit)
        yield Loss("kernel", service, of, by_kernel, "datagrams")
        for cause, lost in causes(account).items():
            if cause != KERNEL_DROPPED:
                yield Loss("bus" if DROPPED + cause == BUS_FULL else "ingest", service, of, lost, cause)
    elif is_origin(name):
        worker, _, stream = parse_origin(name)
        yield Loss("bus", service, stream, account.get(MISSED, 0), f"datagrams of {worker}")
    elif kind == "sending":
        for cause, lost in causes(account).items():
            yield Loss("uplink", service, of, lost, cause)
    elif arriving := parse_arriving(name):
        site, worker, _, stream = arriving
        yield Loss("uplink", service, stream, account.get(MISSED, 0), f"datagrams of {worker} at {site}")
    elif kind == "collector":
        for place, cause, lost in losses_of_collector(account):
            if place != "bus":  # told of the stream: it is one loss, however many collectors it was for
                yield Loss(place, service, of, lost, cause)
    elif kind == "journal" and of:
        for cause, lost in causes(account).items():
            yield Loss("journal", service, of, lost, cause)
    else:
        yield Loss("way out", service, "collectors that left", account.get(LEFT, 0), cause_of(LEFT))


def causes(account: Mapping[str, int]) -> dict[str, int]:
    """Return what a stream or a collector has lost, by cause; together they are `shared.ledger.equations.lost`.

    A copy that was refused before it left, and one that was refused on its way, have the same cause.
    """
    found: dict[str, int] = {}
    for name in sorted(account):
        if is_loss(name) and (count := account[name]):
            cause = cause_of(name)
            found[cause] = found.get(cause, 0) + count
    return found


def cause_of(counter: str) -> str:
    """Return the cause that a counter of losses stands for.

    >>> cause_of("dropped_refused"), cause_of("refusals"), cause_of("missed")
    ('refused', 'refused', 'missed')
    """
    return AFTER_SENDING.get(counter) or counter.removeprefix(DROPPED)


def losses_of_collector(account: Mapping[str, int]) -> Iterator[tuple[str, str, int]]:
    """Yield place, cause and number of what a collector has lost."""
    for name in sorted(account):
        if is_loss(name):
            place = "network" if name in AFTER_SENDING else "bus" if name == MISSED else "way out"
            yield place, cause_of(name), account[name]


def kind_of(cause: str) -> Kind:
    """Return the kind of a cause.

    >>> kind_of("buffer_full"), kind_of("refused"), kind_of("rate_limited")
    ('overflow', 'unreachable', 'policy')
    """
    return "overflow" if cause in _OVERFLOW else "policy" if cause in _POLICY else "unreachable"

"""The equations between counters, and what a table of them has lost."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from shared.ledger.counters import (
    ACKNOWLEDGED,
    BASELINE,
    BY_KERNEL,
    DEFERRED,
    DROPPED,
    EXPECTED,
    FILTERED,
    HELD,
    KERNEL_DROPPED,
    LEFT_BEHIND,
    MISSED,
    NO_LOSS,
    OFFERED,
    PUBLISHED,
    REACHED,
    RECEIVED,
    REFUSALS,
    SAMPLED_OUT,
    SENT,
    SHARED_OUT,
    SUMMED,
    TAKEN,
    TEMPLATES,
    TEMPLATES_HELD,
    TEMPLATES_LOST,
    TEMPLATES_SENT,
    TRUNCATED,
    UNREACHABLES,
    UNSERVED,
    WITHHELD,
    WITHHELD_BY_ADMIN,
    WRITTEN,
)


def dropped(account: Mapping[str, int]) -> int:
    """Return the number dropped, all causes together."""
    return sum(count for name, count in account.items() if name.startswith(DROPPED))


def lost(account: Mapping[str, int]) -> int:
    """Return how many copies of a collector, or datagrams of a stream, are known to have reached nobody.

    Datagrams of a stream that nobody wants are not lost: nobody was to get them. Nor are doubles.
    """
    return sum(count for name, count in account.items() if is_loss(name))


@lru_cache(1024)
def is_loss(counter: str) -> bool:
    """Return whether a counter of a stream or a collector counts datagrams that are lost, each in one such counter."""
    return counter in (MISSED, WITHHELD, KERNEL_DROPPED, REFUSALS, UNREACHABLES) or (
        counter.startswith(DROPPED) and counter not in NO_LOSS
    )


class Discrepancy(NamedTuple):
    """An equation that does not hold: a total, and the sum of its parts."""

    account: str
    counter: str
    total: int
    parts: int

    def __str__(self) -> str:
        return f"{self.account}: {self.counter} is {self.total}, its parts add up to {self.parts}"


def discrepancies(accounts: Mapping[str, Mapping[str, int]]) -> Iterator[Discrepancy]:
    """Yield every equation that does not hold within one service's accounts; as text it is a sentence."""
    listeners: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, account in accounts.items():
        for total, counter, parts in _equations(name, account):
            if total != parts:
                yield Discrepancy(name, counter, total, parts)
        if name.startswith("listener/"):
            listeners[name.split("/")[1]].update({counter: account.get(counter, 0) for counter in SUMMED})
    for stream, sums in listeners.items():
        account = accounts.get(f"stream/{stream}", {})
        for counter in SUMMED:
            if account.get(counter, 0) != sums[counter]:
                yield Discrepancy(f"stream/{stream}", counter, account.get(counter, 0), sums[counter])


def _equations(name: str, account: Mapping[str, int]) -> Iterator[tuple[int, str, int]]:
    def parts(*names: str) -> int:
        return sum(account.get(part, 0) for part in names)

    if name.startswith("stream/"):
        yield parts(RECEIVED), RECEIVED, parts(PUBLISHED) + dropped(account)
    elif name.startswith("listener/"):
        yield parts(TRUNCATED), TRUNCATED, 0
    elif name.startswith("sending/"):
        yield parts(TAKEN), TAKEN, parts(ACKNOWLEDGED, HELD) + dropped(account)
    elif name.startswith(("origin/", "arriving/")):
        yield parts(REACHED), REACHED, parts(BASELINE, TAKEN, MISSED, UNSERVED)
    elif name.startswith("collector/"):
        yield parts(EXPECTED), EXPECTED, parts(OFFERED, MISSED, UNSERVED)
        kept_back = parts(FILTERED, SAMPLED_OUT, SHARED_OUT, HELD, DEFERRED, LEFT_BEHIND, WITHHELD, WITHHELD_BY_ADMIN)
        yield parts(TEMPLATES), TEMPLATES, parts(TEMPLATES_SENT, TEMPLATES_HELD, TEMPLATES_LOST)
        yield parts(OFFERED), OFFERED, kept_back + parts(SENT, BY_KERNEL) + dropped(account) - parts(UNSERVED)
    elif name.startswith("journal/"):
        yield parts(TAKEN), TAKEN, parts(WRITTEN) + dropped(account)
    elif name == "broker":
        # The broker hands on what it takes and may pass. Without keys both figures are libzmq's. What it lost others
        # tell: workers by what they published, subscribers by what has reached them (`shared.monitoring.balance`).
        for unit in ("", "_bytes"):
            for one, other in (("publishers", "subscribers"), ("subscribers", "publishers")):
                passed = parts(f"to_{other}{unit}", f"refused_from_{one}{unit}")
                yield parts(f"from_{one}{unit}"), f"from_{one}{unit}", passed

"""A collector that is served: its destination, and its account, which is complete up to a moment.

One that has left stays for a while, since it may come back to them.
"""

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

import numpy as np

from shared.client import Client
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.health import Checkup
from shared.fanout.sending.backlog import Backlog
from shared.ledger.counters import BASELINE
from shared.ledger.equations import dropped

RETURN_SECONDS: Final = 10.0
"""Time for which a collector that has left may come back to its socket, queue and account: its connection was lost."""
MAX_DEPARTED: Final = 256
"""Collectors kept for that; the first to leave go first."""
UNSEEN: Final = "unseen"
PASSED: Final = "passed"
MARKS: Final = (BASELINE, UNSEEN, PASSED)


class Destination(Protocol):
    """The way in which one collector is reached."""

    client: Client
    held: Backlog

    @property
    def unreachable(self) -> bool:
        """Return whether the way to it is known to be broken now."""

    def adopt(self, client: Client) -> None:
        """Serve another entry of the same address and port from now on."""

    def refresh(self) -> None:
        """Check, with every look, what may have changed on the way there."""

    def read_errors(self) -> None:
        """Note in the account what the network has answered to copies that have left."""

    def seek(self) -> None:
        """Find out whether it can be reached now, which it could not."""

    def close(self) -> None:
        """Release what is held for it."""


D = TypeVar("D", bound=Destination)


@dataclass(slots=True)
class Served(Generic[D]):
    """A collector being served; one that is `returning` was served by the last process too.

    Its account is complete up to a moment. `marks` tell what has to be added since then:
    - BASELINE: datagrams that its streams had carried by that moment;
    - UNSEEN: those of them that had reached this process;
    - PASSED: those that its prefixes have let pass since; 0 for a collector that takes every datagram.
    """

    destination: D
    account: Counter[str]
    marks: Counter[str]
    checkup: Checkup = field(default_factory=Checkup)
    returning: bool = False


@dataclass(slots=True)
class _Departed(Generic[D]):
    """A collector that has left, until when it may come back, and the drops that its account ended with."""

    served: Served[D]
    until: float
    dropped: int


class Departed(Generic[D]):
    """Collectors that have left, and may come back; `lost` counts the datagrams that waited for those that did not."""

    def __init__(self) -> None:
        self.lost = 0
        self._departed: dict[str, _Departed[D]] = {}

    @property
    def names(self) -> Collection[str]:
        """The names of all of them."""
        return self._departed.keys()

    def add(self, name: str, served: Served[D]) -> None:
        """Keep a collector that has just left, whose account has ended; its copies wait."""
        served.destination.held.paused = True
        self._departed[name] = _Departed(served, time.monotonic() + RETURN_SECONDS, dropped(served.account))

    def pop(self, name: str) -> Served[D] | None:
        """Return one that comes back; None: it is not here."""
        departed = self._departed.pop(name, None)
        return departed.served if departed else None

    def close(self, served: Served[D], dropped_before: int) -> None:
        """Close a destination whose account has ended with `dropped_before`; count what waited for it."""
        served.destination.close()
        self.lost += dropped(served.account) - dropped_before

    def close_old(self) -> None:
        """Close those that have been away for too long, and the first ones beyond a number."""
        now = time.monotonic()
        for name, departed in list(self._departed.items()):
            if departed.until <= now or len(self._departed) > MAX_DEPARTED:
                self.close(departed.served, departed.dropped)
                del self._departed[name]

    def close_all(self) -> None:
        """Wait no longer for any of them."""
        for departed in self._departed.values():
            self.close(departed.served, departed.dropped)
        self._departed = {}


def count_received_before(time_ns: int, batch: Gathered, selection: Selection) -> int:
    """Return how many of the selected rows were received before a time, in ns since 1970."""
    early = [each.received_ns < time_ns for each in batch.batches]
    if not any(early):
        return 0
    rows = np.repeat(early, [len(each) for each in batch.batches])
    return int(np.count_nonzero(rows if selection.indices is None else rows[selection.indices]))


def count_rows(batch: Gathered, selection: Selection) -> int:
    """Return how many rows of a batch are selected."""
    return len(batch) if selection.indices is None else len(selection.indices)

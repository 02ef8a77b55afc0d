"""A collector that is served: its destination, and its account, which is complete up to a moment."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

import numpy as np

from shared.client import Client
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.health import Checkup
from shared.fanout.sending.backlog import Backlog
from shared.ledger.counters import BASELINE

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
    """A collector being served.

    Its account is complete up to a moment. In `marks` are the datagrams that its streams had carried by then, BASELINE,
    those that had reached us, UNSEEN, and those since then that its prefixes let pass, PASSED, where it has any or
    takes only some of them. One that is `returning` was served by the last process too.
    """

    destination: D
    account: Counter[str]
    marks: Counter[str]
    checkup: Checkup = field(default_factory=Checkup)
    returning: bool = False


def count_received_before(time_ns: int, batch: Gathered, selection: Selection) -> int:
    """Return how many of the selected rows were received before a time, in ns since 1970."""
    rows = np.repeat([each.received_ns < time_ns for each in batch.batches], [len(each) for each in batch.batches])
    return int(np.count_nonzero(rows if selection.indices is None else rows[selection.indices]))


def count_rows(batch: Gathered, selection: Selection) -> int:
    """Return how many rows of a batch are selected."""
    return len(batch) if selection.indices is None else len(selection.indices)

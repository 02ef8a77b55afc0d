"""A collector that is served: its destination, and its account, which is complete up to a moment."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

import numpy as np

from shared.bus.bodies.nodes_message import Node
from shared.client import Client
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.health import Checkup
from shared.fanout.sending.backlog import Backlog
from shared.ledger.counters import BASELINE, PERHAPS_TWICE, SENT

LOOK_SECONDS: Final = 1.0
LOOKS: Final = 5
"""Looks at what was sent: one that misses this node after two seconds begins with what was received before these."""
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


class Overlaps:
    """Counts the copies of a node that another one may have sent too, as it served without this one for a while.

    That one begins where this one has last told it was, and tells of it later. So counted is all that was sent since a
    few seconds before it was last heard to serve with this node.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looks: deque[tuple[float, dict[str, int]]] = deque(maxlen=LOOKS)
        """By collector: the copies sent once, as far as is known; a second apart."""
        self._heard: dict[str, dict[str, int]] = {}
        """By node: likewise, a few seconds before it was last heard to serve with this one."""
        self._missed: dict[str, int] = {}

    def note(self, others: Sequence[Node], accounts: Mapping[str, Counter[str]]) -> None:
        """Note what the uplink tells of the other nodes; `accounts` are those of the collectors, by name."""
        now = self._clock()
        without = [node.name for node in others if node.missed > self._missed.get(node.name, node.missed)]
        if without:
            for name, account in accounts.items():
                before, once = min(self._heard.get(node, {}).get(name, 0) for node in without), _sent_once(account)
                account[PERHAPS_TWICE] += once - before if once >= before else once  # else the account has begun anew
            self._looks.clear()
        if not self._looks or now >= self._looks[-1][0] + LOOK_SECONDS:
            self._looks.append((now, {name: _sent_once(account) for name, account in accounts.items()}))
        for node in others:
            if without or (node.state == "live" and node.age_ms < 1000 * LOOK_SECONDS):
                self._heard[node.name] = self._looks[0][1]
            self._missed[node.name] = node.missed


def _sent_once(account: Counter[str]) -> int:
    return account[SENT] - account[PERHAPS_TWICE]


def count_received_before(time_ns: int, batch: Gathered, selection: Selection) -> int:
    """Return how many of the selected rows were received before a time, in ns since 1970."""
    rows = np.repeat([each.received_ns < time_ns for each in batch.batches], [len(each) for each in batch.batches])
    return int(np.count_nonzero(rows if selection.indices is None else rows[selection.indices]))


def count_rows(batch: Gathered, selection: Selection) -> int:
    """Return how many rows of a batch are selected."""
    return len(batch) if selection.indices is None else len(selection.indices)

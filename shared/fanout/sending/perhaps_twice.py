"""Copies that two nodes of a cluster may both have sent, as they served a collector without hearing of each other."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from shared.bus.bodies.nodes_message import Node
from shared.ledger.counters import PERHAPS_TWICE, SENT

LOOK_SECONDS: Final = 1.0
LOOKS: Final = 5
"""Looks at what was sent, for five seconds: another node misses this one after two, and goes on from before that."""


class PerhapsTwice:
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
        look = self._looks[0][1]
        for node in others:
            if node.name in without or (node.state == "live" and node.age_ms < 1000 * LOOK_SECONDS):
                self._heard[node.name] = look
            elif without:  # it may miss this node for longer, and tell so later: what is counted now is not once more
                heard = self._heard.get(node.name, look)
                self._heard[node.name] = {name: min(once, look.get(name, once)) for name, once in heard.items()}
            self._missed[node.name] = node.missed


def _sent_once(account: Counter[str]) -> int:
    return account[SENT] - account[PERHAPS_TWICE]

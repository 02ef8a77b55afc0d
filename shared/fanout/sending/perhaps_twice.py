"""Copies that two nodes of a cluster may both have sent, as they served a collector without hearing of each other."""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from shared.bus.bodies.nodes_message import Node
from shared.ledger.counters import PERHAPS_TWICE, SENT

LOOK_SECONDS: Final = 1.0
LOOKS: Final = 5
"""Looks at what was sent, for five seconds: another node misses this one after two, and goes on from before that."""
MAX_LEFT: Final = 4096
"""Collectors that this node has left which are known while another node is not heard; the first go first."""


class PerhapsTwice:
    """Counts the copies of a node that another one may have sent too, as it served without this one for a while.

    That one begins where this one has last told it was, and tells of it later. So counted is all that was sent since a
    few seconds before it was last heard to serve with this node.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, time_ns: Callable[[], int] = time.time_ns) -> None:
        self.until_ns = 0
        """Of what was received before, in ns since 1970, another node may have sent copies: if it comes, it is late."""
        self.left = 0
        """Such copies to collectors that this node had left when it heard of it; they are in no other account."""
        self._clock = clock
        self._time_ns = time_ns
        self._accounts: dict[str, Counter[str]] = {}
        """By collector: its last account, also of those that were left since a node that is not heard was heard."""
        self._carried: Counter[str] = Counter()
        """By collector: the copies sent once by earlier accounts, less those of its last one that are in `left`."""
        self._looks: deque[tuple[float, dict[str, int]]] = deque(maxlen=LOOKS)
        """By collector: the copies sent once, as far as is known; a second apart."""
        self._heard: dict[str, dict[str, int]] = {}
        """By node: likewise, a few seconds before it was last heard to serve with this one."""
        self._missed: dict[str, int] = {}

    def note(
        self, nodes: Sequence[Node], accounts: Mapping[str, Counter[str]], returning: Collection[str] = ()
    ) -> None:
        """Note what the uplink tells of the nodes, this one first; `accounts` are those of the collectors, by name.

        Those that are `returning` have left, and may come back to their last account.
        """
        now, (own, *others) = self._clock(), nodes
        self._follow(accounts)
        without = [node.name for node in others if node.missed > self._missed.get(node.name, node.missed)]
        if without or own.state != "live":
            self.until_ns = self._time_ns()
        if without:
            for name in self._accounts:
                before, once = min(self._heard.get(node, {}).get(name, 0) for node in without), self._once(name)
                self._count(name, max(0, once - before), left=name not in accounts)
            self._looks.clear()
        if not self._looks or now >= self._looks[-1][0] + LOOK_SECONDS:
            self._looks.append((now, {name: self._once(name) for name in self._accounts}))
        look = self._looks[0][1]
        for node in others:
            if node.name in without or _is_heard(node):
                self._heard[node.name] = look
            elif without:  # it may miss this node for longer, and tell so later: what is counted now is not once more
                heard = self._heard.get(node.name, look)
                self._heard[node.name] = {name: min(once, look.get(name, once)) for name, once in heard.items()}
            self._missed[node.name] = node.missed
        if len(self._accounts) > len(accounts):
            known = MAX_LEFT * (not all(map(_is_heard, others)))
            left = [name for name in self._accounts if name not in accounts and name not in returning]
            self._forget(left[: max(0, len(left) - known)])

    def _follow(self, accounts: Mapping[str, Counter[str]]) -> None:
        for name, account in accounts.items():
            if (before := self._accounts.get(name)) is not account:
                if before is not None:
                    self._carried[name] += _sent_once(before)
                self._accounts[name] = account

    def _once(self, name: str) -> int:
        return self._carried[name] + _sent_once(self._accounts[name])

    def _count(self, name: str, copies: int, *, left: bool) -> None:
        if left:  # nobody may ever see its account again
            self.left += copies
            self._carried[name] -= copies
        else:
            self._accounts[name][PERHAPS_TWICE] += copies

    def _forget(self, names: Sequence[str]) -> None:
        """Forget collectors, also as they were at earlier looks: if they come again, their accounts begin anew."""
        for name in names:
            del self._accounts[name], self._carried[name]
            for once in (*(once for _, once in self._looks), *self._heard.values()):
                once.pop(name, None)


def _is_heard(node: Node) -> bool:
    return node.state == "live" and node.age_ms < 1000 * LOOK_SECONDS


def _sent_once(account: Counter[str]) -> int:
    return account[SENT] - account[PERHAPS_TWICE]

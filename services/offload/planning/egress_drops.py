"""Packets that links and their queues drop while the kernel's copies leave by them. No I/O; readings are handed in.

The kernel tells of such drops by link, not by rule. Other traffic that leaves there is among them.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from shared.ledger.accounts import EGRESS, Accounts
from shared.ledger.counters import LINK_DROPS, QUEUE_DROPS
from shared.net.queues import Drops


class EgressDrops:
    """Counts by link, from readings of all links' counters, which `read` makes."""

    def __init__(self, read: Callable[[], Mapping[int, Drops]]) -> None:
        self._read = read
        self._before: dict[int, Drops] = {}
        """The last reading of the links that copies have left by since then."""
        self._counted: dict[str, Counter[str]] = {}
        self._quiet = False

    def note(self, links: Mapping[int, str], *, copied: bool = True) -> None:
        """Count what was dropped since the last reading; from now on copies leave by these links, with their names.

        Nothing is read where no copies have left since the reading before the last one: what they leave behind in a
        queue may be dropped a moment after they were counted.
        """
        unread, self._quiet = not copied and self._quiet, not copied
        if unread and links.keys() == self._before.keys():
            return
        found = self._read() if links else {}
        for index in links.keys() & found.keys():
            if index in self._before:
                counted = self._counted.setdefault(links[index], Counter({QUEUE_DROPS: 0, LINK_DROPS: 0}))
                for counter, now, before in zip(
                    (QUEUE_DROPS, LINK_DROPS), found[index], self._before[index], strict=True
                ):
                    counted[counter] += now - before if now >= before else now  # a new queue begins at 0
        self._before = {index: found[index] for index in links.keys() & found.keys()}

    def accounts(self) -> Accounts:
        """Return an account for each link."""
        return {f"{EGRESS}{name}": dict(counted) for name, counted in self._counted.items()}

"""Losses of the last minutes, told apart from those before. No I/O."""

from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from shared.ledger.accounts import Accounts
from shared.losses import PLACES, UPSTREAM, Loss, losses_by_account
from shared.monitoring.picture import RECENT_SECONDS, RecentLoss

STEP_SECONDS: Final = 5.0
"""The times between which `recent` losses are told apart."""


@dataclass(slots=True)
class Past:
    """The counts of a loss at the beginnings of the last steps, and now."""

    counts: deque[tuple[float, int]] = field(default_factory=deque)
    count: int = 0

    def note(self, now: float, count: int, *, began: int) -> None:
        """Note a count; the first one grew from `began`."""
        self.count = count
        if not self.counts:
            self.counts.append((now - STEP_SECONDS, began))
        if now - self.counts[-1][0] >= STEP_SECONDS:
            self.counts.append((now, count))
        while len(self.counts) > 1 and self.counts[1][0] <= now - RECENT_SECONDS:
            self.counts.popleft()

    @property
    def recent(self) -> int:
        """Return how much has come since the oldest count; all of it where counts began anew."""
        oldest = self.counts[0][1]
        return self.count - oldest if self.count >= oldest else self.count


class RecentLosses:
    """The past of every loss that services report."""

    def __init__(self) -> None:
        self._past: dict[tuple[str, int, Loss], Past] = {}
        """By account, boot id and loss. The boot id is 0 but for losses that may fall: with it these begin anew."""

    def note(
        self, accounts: Mapping[str, Accounts], boots: Mapping[str, int], seen: Collection[str], now: float
    ) -> Iterator[RecentLoss]:
        """Yield the losses of services as they are now; those of `seen` that are new began at 0."""
        kept = {key: past for key, past in self._past.items() if key[1] and boots.get(key[2].service) == key[1]}
        lost, recent = Counter[Loss](), Counter[Loss]()
        for account, found in losses_by_account(accounts):
            loss, falls = found._replace(lost=0), found.place == UPSTREAM
            key = account, boots[loss.service] if falls else 0, loss
            past = kept[key] = self._past.get(key) or Past()
            count = max(found.lost, past.count) if falls else found.lost
            past.note(now, count, began=0 if loss.service in seen else count)
            lost[loss] += found.lost
            recent[loss] += past.recent
        self._past = kept
        for loss in sorted(lost, key=lambda loss: PLACES.index(loss.place)):
            yield RecentLoss(loss._replace(lost=lost[loss]), recent[loss])

"""Beginnings and ends of losses, as lines of a service's log: one each, none for a datagram."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.log import LOSS_BEGAN, LOSS_ENDED, get_logger, suppressed
from shared.losses import UPSTREAM, Loss, losses
from shared.process.log_limit import LogBudget

QUIET_SECONDS: Final = 5.0
"""A loss is over after it has not grown for this long."""

log = get_logger()


@dataclass(slots=True)
class _Episode:
    """A loss that goes on: its start, the count before it, and the time at which it last grew."""

    began_at: float
    began: int
    grew_at: float


class LossLog:
    """Follows the losses in a service's accounts, and logs the beginning and the end of each."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._counts: dict[Loss, int] | None = None
        """The last count of each loss; the keys count nothing themselves."""
        self._open: dict[Loss, _Episode] = {}
        self._budget = LogBudget()

    def note(self, accounts: Mapping[str, Mapping[str, int]], now: float) -> None:
        """Take in the accounts as they are now; losses of the first ones are from before."""
        counts = {loss._replace(lost=0): loss.lost for loss in losses({self._service: accounts})}
        before, self._counts = self._counts, counts
        if before is None:
            return
        counts.update(
            {loss: max(known, counts.get(loss, 0)) for loss, known in before.items() if loss.place == UPSTREAM}
        )
        for loss, count in counts.items():
            known = before.get(loss, 0)
            if count != known:
                self._grow(loss, known if known <= count else 0, count, now)
        for loss, episode in list(self._open.items()):
            if now - episode.grew_at >= QUIET_SECONDS or loss not in counts:
                del self._open[loss]
                self._end(loss, episode, counts.get(loss))

    def _grow(self, loss: Loss, began: int, count: int, now: float) -> None:
        if episode := self._open.get(loss):
            episode.grew_at = now
            return
        self._open[loss] = _Episode(now, began, now)
        self._say(LOSS_BEGAN, loss, lost=count - began, total=count)

    def _end(self, loss: Loss, episode: _Episode, count: int | None) -> None:
        """Log the end; `count` is None where the account has gone, such as that of a collector that has left."""
        lost = {} if count is None else {"lost": max(0, count - episode.began), "total": count}
        self._say(LOSS_ENDED, loss, **lost, seconds=round(episode.grew_at - episode.began_at, 1))

    def _say(self, event: str, loss: Loss, **facts: float) -> None:
        if count := self._budget.admit():
            log.warning(event, place=loss.place, of=loss.of, cause=loss.what, **facts, **suppressed(count))

"""The ingest workers, as far as offload depends on them: each must read the marks of datagrams. No I/O."""

from collections.abc import Callable
from typing import Final

from shared.bus.messages import Envelope, Status
from shared.bus.status import Reports

SILENT_SECONDS: Final = 3.5
"""A worker that has not reported for so long has ended, or is stopped."""
MARK_SOCKETS: Final = "mark_sockets"
MARK_BLIND: Final = "mark_blind"
MARKS_UNREAD: Final = "marks_unread"


class Workers:
    """Follows the workers' reports."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._reports = Reports()
        self._seen: dict[str, float] = {}
        self._blind: dict[str, bool] = {}
        self._unread: dict[str, int] = {}
        self._told = self.reason()

    def note(self, envelope: Envelope, status: Status) -> bool:
        """Note a piece of a report; return whether `reason` has changed."""
        report = self._reports.add(envelope, status)
        if report is None or not report.service.startswith("ingest."):
            return False
        own = report.accounts.get("ingest", {})
        unread = own.get(MARKS_UNREAD, 0)
        grown = unread > self._unread.get(report.service, unread)
        self._unread[report.service] = unread
        self._seen[report.service] = self._clock()
        self._blind[report.service] = grown or not own.get(MARK_SOCKETS) or bool(own.get(MARK_BLIND))
        return self._changed()

    def expire(self) -> bool:
        """Forget workers that have ended; return whether `reason` has changed."""
        now = self._clock()
        for name in [name for name, seen in self._seen.items() if seen + SILENT_SECONDS < now]:
            if self._blind[name] or len(self._seen) > 1:  # the last that could read stays: it may be restarted
                del self._seen[name], self._blind[name]
        return self._changed()

    def reason(self) -> str:
        """Return why the kernel must not copy; empty: every worker reads marks."""
        if not self._seen:
            return "no ingest worker has reported that it reads marks"
        blind = sorted(name for name, blind in self._blind.items() if blind)
        return f"{blind[0]} does not read marks: what the kernel has copied would be sent again" if blind else ""

    def _changed(self) -> bool:
        before, self._told = self._told, self.reason()
        return before != self._told

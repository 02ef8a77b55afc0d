"""The processes that must know of the kernel's copies: workers that read marks, senders that ask. No I/O."""

from collections import Counter
from collections.abc import Callable
from typing import Final

from shared.bus.messages import Envelope, Status
from shared.bus.status import Report, Reports
from shared.ledger.counters import (
    BY_KERNEL_LATE,
    KERNEL_DROPPED,
    MARK_BLIND,
    MARK_SOCKETS,
    MARKS_READ,
    MARKS_UNREAD,
    RECEIVED,
)

STREAM: Final = "stream/"
SILENT_SECONDS: Final = 3.5
"""A process that has not reported for so long has ended, or is stopped."""
STEADY_SECONDS: Final = 2.0
"""Most time between reports, which are due each second, of a worker that reports steadily."""


class Workers:
    """Follows the reports of workers and senders."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._reports = Reports()
        self._seen: dict[str, float] = {}
        self._boots: dict[str, int] = {}
        self._read: dict[str, Counter[str]] = {}
        """By worker: the marks that it has read of each stream, or datagrams that the kernel has dropped."""
        self._received: dict[str, Counter[str]] = {}
        self._steady_since = 0.0
        """The time at which a worker last began to report, also after a pause, or was given up."""
        self._blind: dict[str, bool] = {}
        """By worker."""
        self._unread: dict[str, int] = {}
        self._older: dict[str, float] = {}
        """The times at which senders of copies have reported that do not ask for generations."""
        self._told = self.reason()

    def note(self, envelope: Envelope, status: Status) -> bool:
        """Note a piece of a report; return whether `reason` has changed."""
        report = self._reports.add(envelope, status)
        if report is None:
            return False
        self._reports.latest.clear()  # the accounts of 10,000 collectors take 24 MB: once for each start of a sender
        kind = report.service.partition(".")[0]
        if kind == "ingest":
            self._note_worker(report, envelope.boot)
        elif kind == "forwarder" or report.accounts.get(kind, {}).get("raw_sockets"):
            # A report may come before the subscription of its sender, which has just begun: its counters tell for sure.
            if BY_KERNEL_LATE in report.accounts.get(kind, {}):
                self._older.pop(report.service, None)
            else:
                self._older[report.service] = self._clock()
        return self._changed()

    def _note_worker(self, report: Report, boot: int) -> None:
        now = self._clock()
        if self._boots.get(report.service) != boot or now > self._seen.get(report.service, 0.0) + STEADY_SECONDS:
            self._steady_since, self._boots[report.service] = now, boot
        read = {name.removeprefix(STREAM): each for name, each in report.accounts.items() if name.startswith(STREAM)}
        self._read[report.service] = Counter(
            {stream: each.get(MARKS_READ, 0) + each.get(KERNEL_DROPPED, 0) for stream, each in read.items()}
        )
        self._received[report.service] = Counter({stream: each.get(RECEIVED, 0) for stream, each in read.items()})
        own = report.accounts.get("ingest", {})
        unread = own.get(MARKS_UNREAD, 0)
        grown = unread > self._unread.get(report.service, unread)
        self._unread[report.service] = unread
        self._seen[report.service] = now
        self._blind[report.service] = grown or not own.get(MARK_SOCKETS) or bool(own.get(MARK_BLIND))

    @property
    def reporting(self) -> tuple[float, float]:
        """The time since which all workers report steadily, and the time up to which each of them has reported."""
        return self._steady_since, min(self._seen.values(), default=0.0)

    def marks_read(self) -> Counter[str]:
        """Return, by stream, the datagrams of all workers that came with a mark, or that the kernel has dropped."""
        return sum(self._read.values(), Counter())

    def received(self) -> Counter[str]:
        """Return, by stream, the datagrams that all workers have received, with a mark or without."""
        return sum(self._received.values(), Counter())

    def expire(self) -> bool:
        """Forget processes that have ended; return whether `reason` has changed."""
        past = self._clock() - SILENT_SECONDS
        for name in [name for name, seen in self._seen.items() if seen < past]:
            if self._blind[name] or len(self._seen) > 1:  # the last that could read stays: it may be restarted
                del self._seen[name], self._blind[name]
                self._steady_since = self._clock()
        self._older = {name: seen for name, seen in self._older.items() if seen >= past}
        return self._changed()

    def reason(self) -> str:
        """Return why the kernel must not copy; empty: all that is copied is sent once."""
        if not self._seen:
            return "no ingest worker has reported that it reads marks"
        if blind := sorted(name for name, blind in self._blind.items() if blind):
            return f"{blind[0]} does not read marks: what the kernel has copied would be sent again"
        older = min(self._older, default="")
        return f"{older} does not ask what the kernel has copied: it would send that again" if older else ""

    def _changed(self) -> bool:
        before, self._told = self._told, self.reason()
        return before != self._told

"""The processes that must know of the kernel's copies: workers that read marks, senders that are told. No I/O."""

from collections import Counter
from collections.abc import Callable
from typing import Final

from shared.bus.messages import Envelope, Status
from shared.bus.status import Report, Reports
from shared.client import Source
from shared.ledger.counters import KERNEL_DROPPED, MARK_BLIND, MARK_SOCKETS, MARKS_READ, MARKS_UNREAD

SILENT_SECONDS: Final = 3.5
"""A process that has not reported for so long has ended, or is stopped."""
SENDERS: Final[dict[str, Source]] = {"forwarder": "relay", "transmitter": "original"}


class Workers:
    """Follows the reports of workers and senders; `is_told` says whether a sender subscribes to generations."""

    def __init__(self, clock: Callable[[], float], is_told: Callable[[Source], bool] = lambda _: True) -> None:
        self._clock = clock
        self._is_told = is_told
        self._reports = Reports()
        self._seen: dict[str, float] = {}
        self._blind: dict[str, bool] = {}
        """By worker."""
        self._unread: dict[str, int] = {}
        self._senders: dict[str, float] = {}
        """The times at which senders of copies have reported."""
        self._asking: dict[str, int] = {}
        """The boot ids with which they did so while they were told: if they are told no more, they have ended."""
        self._boots: dict[str, int] = {}
        self._told = self.reason()

    def note(self, envelope: Envelope, status: Status) -> bool:
        """Note a piece of a report; return whether `reason` has changed."""
        report = self._reports.add(envelope, status)
        if report is None:
            return False
        kind = report.service.partition(".")[0]
        if kind == "ingest":
            self._note_worker(report)
        elif kind == "forwarder" or report.accounts.get(kind, {}).get("raw_sockets"):
            self._senders[report.service], self._boots[report.service] = self._clock(), envelope.boot
            if self._is_told(SENDERS[kind]):
                self._asking[report.service] = envelope.boot
        return self._changed()

    def _note_worker(self, report: Report) -> None:
        own = report.accounts.get("ingest", {})
        unread = own.get(MARKS_UNREAD, 0)
        grown = unread > self._unread.get(report.service, unread)
        self._unread[report.service] = unread
        self._seen[report.service] = self._clock()
        self._blind[report.service] = grown or not own.get(MARK_SOCKETS) or bool(own.get(MARK_BLIND))

    @property
    def reporting(self) -> bool:
        """Return whether a worker has reported of late."""
        return any(seen >= self._clock() - SILENT_SECONDS for seen in self._seen.values())

    def marks_read(self) -> Counter[str]:
        """Return, by stream, the datagrams of all workers that came with a mark, or that the kernel has dropped."""
        found: Counter[str] = Counter()
        for report in self._reports.latest.values():
            for name, account in report.accounts.items():
                kind, _, stream = name.partition("/")
                if kind == "stream":
                    found[stream] += account.get(MARKS_READ, 0) + account.get(KERNEL_DROPPED, 0)
        return found

    def expire(self) -> bool:
        """Forget processes that have ended; return whether `reason` has changed."""
        past = self._clock() - SILENT_SECONDS
        for name in [name for name, seen in self._seen.items() if seen < past]:
            if self._blind[name] or len(self._seen) > 1:  # the last that could read stays: it may be restarted
                del self._seen[name], self._blind[name]
        self._senders = {name: seen for name, seen in self._senders.items() if seen >= past}
        return self._changed()

    def reason(self) -> str:
        """Return why the kernel must not copy; empty: all that is copied is sent once."""
        if not self._seen:
            return "no ingest worker has reported that it reads marks"
        if blind := sorted(name for name, blind in self._blind.items() if blind):
            return f"{blind[0]} does not read marks: what the kernel has copied would be sent again"
        untold = sorted(
            name
            for name in self._senders
            if self._asking.get(name) != self._boots[name] and not self._is_told(SENDERS[name.partition(".")[0]])
        )
        return f"{untold[0]} does not ask what the kernel has copied: it would send that again" if untold else ""

    def _changed(self) -> bool:
        before, self._told = self._told, self.reason()
        return before != self._told

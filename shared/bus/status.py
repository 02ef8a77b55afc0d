"""Status on the bus: a service reports its accounts each second and to every new subscriber; a reader collects them."""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from shared.bus.bodies.fields import MAX_NUMBER
from shared.bus.loss_log import LossLog
from shared.bus.messages import Envelope, Status, status_topic
from shared.bus.pieces import Assembler, cut
from shared.bus.zmq_sockets import Publisher
from shared.ledger.accounts import Accounts
from shared.ledger.counters import DISCREPANCIES
from shared.ledger.equations import discrepancies
from shared.log import DISCREPANCY, get_logger
from shared.process.installed_version import release
from shared.process.lifecycle import next_tick
from shared.process.memory import Memory

INTERVAL_SECONDS = 1.0
CHECK_SHARE = 20
"""Accounts that nobody asked for take at most one part in this many of a service's time to make and check."""
_COUNTER_SIZE = 32
"""The most bytes that a counter takes in a message, name included."""

log = get_logger()


class Reporter:
    """Publishes a service's accounts, in pieces when they are many, and checks each second whether they add up."""

    def __init__(self, publisher: Publisher, memory: Memory | None = None) -> None:
        self._publisher = publisher
        self._memory = memory or Memory()
        self._topic = status_topic(publisher.sender)
        self._started_ns = time.time_ns()
        self._release = release()  # the program's own, also when another is installed while it runs
        self._reports = itertools.count(1)
        self._broken: dict[tuple[str, str], int] = {}
        self.found = 0
        """Discrepancies so far."""
        self._check_at = 0.0
        self.due_at = 0.0
        self._losses = LossLog(publisher.sender)

    def asked_for(self, prefixes: Iterable[str]) -> bool:
        """Return whether one of these new subscriptions is for our status."""
        return any(self._topic.startswith(prefix) for prefix in prefixes)

    def report(self, accounts: Callable[[], Mapping[str, Mapping[str, int]]], *, ended: bool = False) -> None:
        """Check the accounts as they are now, and publish them if anybody listens."""
        now = time.monotonic()
        self.due_at = next_tick(now, INTERVAL_SECONDS)
        wanted = self._publisher.wanted(self._topic)
        if not wanted and now < self._check_at:
            return
        kept = accounts()
        if now >= self._check_at:
            self._check(kept)
            self._losses.note(kept, now)
            took = time.monotonic() - now
            self._check_at = now + max(INTERVAL_SECONDS, CHECK_SHARE * took)
        if wanted:
            own = self._publisher.sender.partition(".")[0]
            process = {DISCREPANCIES: self.found, **self._memory.account()}
            self._publish({**kept, own: {**kept.get(own, {}), **process}}, ended)

    def _check(self, accounts: Mapping[str, Mapping[str, int]]) -> None:
        """Count the equations that do not hold, and log when that has changed."""
        found = {(each.account, each.counter): each for each in discrepancies(accounts)}
        broken = {key: each.total - each.parts for key, each in found.items()}
        news = [each for key, each in found.items() if self._broken.get(key) != broken[key]]
        self._broken = broken
        self.found += len(news)
        if news:
            log.error(
                DISCREPANCY,
                first=str(news[0]),
                cure="please report it with `fanwire ledger --json`",
                discrepancies=self.found,
            )

    def _publish(self, accounts: Mapping[str, Mapping[str, int]], ended: bool) -> None:
        pieces = cut(accounts.items(), _size_of)
        report = next(self._reports)
        for number, piece in enumerate(pieces):
            bounded = {
                name: {counter: min(count, MAX_NUMBER) for counter, count in account.items()} for name, account in piece
            }
            body = Status(
                service=self._publisher.sender,
                pid=os.getpid(),
                started_ns=self._started_ns,
                report=report,
                piece=number,
                pieces=len(pieces),
                accounts=bounded,
                release=self._release,
                ended=ended,
            )
            self._publisher.publish(self._topic, body)


def _size_of(account: tuple[str, Mapping[str, int]]) -> int:
    """Return the most bytes that a named account takes in a message."""
    name, counters = account
    return 4 * len(name) + 16 + _COUNTER_SIZE * len(counters)


@dataclass(frozen=True, slots=True)
class Report:
    """A service's whole report; `received_at` is the time at which its first piece came."""

    service: str
    boot: int
    pid: int
    started_ns: int
    number: int
    received_at: float
    accounts: Accounts
    release: str = ""
    ended: bool = False


class Reports:
    """The last whole report of every service that reports, by (name, boot id)."""

    def __init__(self) -> None:
        self.latest: dict[tuple[str, int], Report] = {}
        self._assemblers: dict[tuple[str, int], Assembler[Status]] = {}

    def add(self, envelope: Envelope, status: Status) -> Report | None:
        """Add a piece; return the report that it completes."""
        key = (envelope.sender, envelope.boot)
        assembler = self._assemblers.setdefault(key, Assembler())
        pieces = assembler.add(status.report, status)
        if pieces is None:
            return None
        del self._assemblers[key]  # each start of a service has one
        accounts = {name: account for piece in pieces for name, account in piece.accounts.items()}
        began_at = assembler.began_at
        told = status.service, key[1], status.pid, status.started_ns, status.report
        report = Report(*told, began_at, accounts, status.release, status.ended)
        self.latest[key] = report
        return report

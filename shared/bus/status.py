"""Status on the bus: a service reports its accounts each second and to every new subscriber; a reader collects them."""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog

from shared.bus.messages import MAX_NUMBER, PIECE_SIZE, Envelope, Status, status_topic
from shared.bus.zmq_sockets import Publisher
from shared.ledger import DISCREPANCIES, Accounts, discrepancies
from shared.process.lifecycle import next_tick
from shared.process.memory import Memory

INTERVAL_SECONDS = 1.0
CHECK_SHARE = 20
"""Of a service's time at most one part in so many goes into making and checking accounts that nobody asked for."""
_COUNTER_SIZE = 32
"""Bytes a counter takes in a message at most, name included: for cutting reports into pieces."""

log = structlog.get_logger()


class Reporter:
    """Publishes a service's accounts, in pieces when they are many, and checks each second whether they add up."""

    def __init__(self, publisher: Publisher, memory: Memory | None = None) -> None:
        self._publisher = publisher
        self._memory = memory or Memory()
        self._topic = status_topic(publisher.sender)
        self._started_ns = time.time_ns()
        self._reports = itertools.count(1)
        self._broken: dict[tuple[str, str], int] = {}
        self.found = 0
        """Discrepancies so far."""
        self._check_at = 0.0
        self.due_at = 0.0

    def asked_for(self, prefixes: Iterable[str]) -> bool:
        """Whether one of these new subscriptions is for our status."""
        return any(self._topic.startswith(prefix) for prefix in prefixes)

    def report(self, accounts: Callable[[], Mapping[str, Mapping[str, int]]]) -> None:
        """Check the accounts as they are now, and publish them if anybody listens."""
        now = time.monotonic()
        self.due_at = next_tick(now, INTERVAL_SECONDS)
        wanted = self._publisher.wanted(self._topic)
        if not wanted and now < self._check_at:
            return
        kept = accounts()
        if now >= self._check_at:
            self._check(kept)
            took = time.monotonic() - now
            self._check_at = now + max(INTERVAL_SECONDS, CHECK_SHARE * took)
        if wanted:
            own = self._publisher.sender.partition(".")[0]
            process = {DISCREPANCIES: self.found, **self._memory.account()}
            self._publish({**kept, own: {**kept.get(own, {}), **process}})

    def _check(self, accounts: Mapping[str, Mapping[str, int]]) -> None:
        """Count the equations that do not hold, and say so when that has changed."""
        found = {(each.account, each.counter): each for each in discrepancies(accounts)}
        broken = {key: each.total - each.parts for key, each in found.items()}
        news = [each for key, each in found.items() if self._broken.get(key) != broken[key]]
        self._broken = broken
        self.found += len(news)
        if news:
            log.error("the accounts do not add up", first=str(news[0]), discrepancies=self.found)

    def _publish(self, accounts: Mapping[str, Mapping[str, int]]) -> None:
        pieces = list(_pieces(accounts))
        report = next(self._reports)
        for number, piece in enumerate(pieces):
            body = Status(
                service=self._publisher.sender,
                pid=os.getpid(),
                started_ns=self._started_ns,
                report=report,
                piece=number,
                pieces=len(pieces),
                accounts=piece,
            )
            self._publisher.publish(self._topic, body)


def _pieces(accounts: Mapping[str, Mapping[str, int]]) -> Iterable[Accounts]:
    piece: Accounts = {}
    size = 0
    for name, account in accounts.items():
        cost = 4 * len(name) + 16 + _COUNTER_SIZE * len(account)
        if piece and size + cost > PIECE_SIZE:
            yield piece
            piece, size = {}, 0
        piece[name] = {counter: min(count, MAX_NUMBER) for counter, count in account.items()}
        size += cost
    yield piece


@dataclass(slots=True)
class Report:
    """A service's whole report, put together."""

    service: str
    boot: int
    pid: int
    started_ns: int
    number: int
    received_at: float
    accounts: Accounts = field(default_factory=dict)
    pieces: int = 0


class Reports:
    """The last whole report of every service that reports, by (name, boot id)."""

    def __init__(self) -> None:
        self.latest: dict[tuple[str, int], Report] = {}
        self._partial: dict[tuple[str, int], Report] = {}

    def take(self, envelope: Envelope, status: Status) -> Report | None:
        """Take a piece; return the report it completes."""
        key = (envelope.sender, envelope.boot)
        report = self._partial.get(key)
        if status.piece == 0:
            report = self._partial[key] = Report(
                status.service, envelope.boot, status.pid, status.started_ns, status.report, time.monotonic()
            )
        if report is None or (report.number, report.pieces) != (status.report, status.piece):
            return None  # a piece was lost: wait for the next report
        report.accounts.update(status.accounts)
        report.pieces += 1
        if status.piece + 1 < status.pieces:
            return None
        self.latest[key] = self._partial.pop(key)
        return self.latest[key]

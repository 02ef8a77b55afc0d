"""Makes pictures of what the bus tells: status, health, the registry, and exporters. No I/O.

A view subscribes to `TOPICS`, hands every message in, and asks for a picture when it wants to show one.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from shared.bus.bodies.exporters_message import Exporters
from shared.bus.bodies.health_message import Health
from shared.bus.bodies.nodes_message import NODES_TOPIC, Nodes
from shared.bus.messages import (
    EXPORTERS_PREFIX,
    HEALTH_PREFIX,
    REGISTRY_TOPIC,
    Message,
    RegistryChange,
    RegistrySnapshot,
    Status,
)
from shared.bus.pieces import Assembler
from shared.bus.status import INTERVAL_SECONDS, Report, Reports
from shared.client import Client, Source, Trouble
from shared.fanout.registry_replica import RegistryReplica
from shared.ledger.accounts import Accounts, egress_accounts
from shared.ledger.counters import (
    BUS_MISSED,
    BY_KERNEL,
    BYTES,
    DISCREPANCIES,
    EXPECTED,
    FILTERED,
    HELD,
    KERNEL_DROPPED,
    MEMORY,
    MEMORY_CEILING,
    MEMORY_MOST,
    NO_SUBSCRIBER,
    PUBLISHED,
    RECEIVED,
    SAMPLED_OUT,
    SENT,
    SHARED_OUT,
    TEMPLATES_SENT,
    WITHHELD_BY_ADMIN,
)
from shared.ledger.equations import lost
from shared.losses import causes
from shared.monitoring.balance import Balance
from shared.monitoring.cluster import Cluster
from shared.monitoring.exporters import Shares
from shared.monitoring.journal import Owed, kept_streams, owed
from shared.monitoring.picture import (
    RECENT_SECONDS,
    Collector,
    Picture,
    RecentLoss,
    Service,
    Stream,
    Word,
    WorkerShare,
)
from shared.monitoring.recent_losses import Past, RecentLosses
from shared.monitoring.verdict import judge

TOPICS: Final = ("status/", HEALTH_PREFIX, REGISTRY_TOPIC, EXPORTERS_PREFIX, NODES_TOPIC)
SILENT_SECONDS: Final = 3.5 * INTERVAL_SECONDS
"""A service that has reported nothing for this long is silent."""
SOON_SECONDS: Final = INTERVAL_SECONDS / 2
"""A report that comes sooner, since somebody else has just subscribed, begins no rate of its own."""
FORGET_SECONDS: Final = 120.0
"""Time for which a silent service is shown. One that would have told its end is shown until it reports again."""
SENDERS: Final[Mapping[Source, str]] = {"relay": "forwarder.", "original": "transmitter."}
"""Beginnings of the names of those that serve collectors, by the `source` of these."""
TELL_THEIR_END: Final = ("ingest.", "forwarder.", "transmitter.", "uplink.")
"""Beginnings of the names of those that say in their last report that it is the last."""
ROUND_SECONDS: Final = 4.0
"""Time of a comparison of all accounts: each service reports several times in it."""


@dataclass(slots=True)
class _Told:
    """A service's last report, and one about a second before."""

    report: Report
    before: Report | None = None

    def rate(self, account: str, *counters: str) -> float | None:
        """Return the growth of counters a second, together; None where there are no two reports of one start."""
        return _rate(self, lambda accounts: sum(accounts.get(account, {}).get(each, 0) for each in counters))

    def owed(self) -> Iterator[Owed]:
        """Yield what it owes collectors out of the journal."""
        before = self.before or self.report
        yield from owed(self.report.accounts, before.accounts, self.report.received_at - before.received_at)


class Observer:
    """Takes messages in, and makes pictures of them."""

    def __init__(self, asked_for: Iterable[str] = ()) -> None:
        self.asked_for = tuple(asked_for)
        """Kinds of service that have to report since the settings ask for them."""
        self._reports = Reports()
        self._told: dict[str, _Told] = {}
        self._replica = RegistryReplica()
        self._cluster = Cluster()
        self._troubles: dict[str, dict[tuple[str, int], tuple[Trouble, float]]] = {}
        """By source: the collectors that have a trouble, and its start; {} once all are told to be well."""
        self._troubles_at: dict[str, float] = {}
        self._assemblers: defaultdict[str, Assembler[Health]] = defaultdict(Assembler)
        self._words: dict[tuple[str, int], tuple[Word, float | None]] = {}
        self._shares = Shares()
        self._recent = RecentLosses()
        self._began = math.inf
        """The time of the first message."""
        self._seen: set[str] = set()
        """Services in the last picture: a loss that they did not have then began at 0."""
        self._past_of: dict[str, Past] = {}
        self._round, self._round_began = Balance(asked_for=self.asked_for), 0.0
        self._balanced: bool | None = None
        self._found: tuple[str, ...] = ()

    @property
    def stale(self) -> bool:
        """Return whether a change of the registry is missing: use a `SnapshotRequest`."""
        return self._replica.stale

    @property
    def clients(self) -> Mapping[str, Client]:
        """The registry, as far as it is known."""
        return self._replica.clients

    @property
    def version(self) -> int:
        """A number that grows with every change of the registry; -1: nothing is known of it."""
        return self._replica.version

    @property
    def accounts(self) -> dict[str, Accounts]:
        """The accounts of each service, as it has last reported them; other threads may ask for them too."""
        return {name: told.report.accounts for name, told in dict(self._told).items()}

    def note(self, message: Message, now: float) -> None:
        """Take a message in; `now` is a clock that only grows, the one of `Report.received_at` (time.monotonic)."""
        body, envelope = message.body, message.envelope
        self._began = min(self._began, now)
        if isinstance(body, Status):
            self._replica.note_status(envelope, body)
            if report := self._reports.add(envelope, body):
                self._reports.latest.clear()  # kept here, by name
                self._note_report(report, now)
        elif isinstance(body, RegistrySnapshot | RegistryChange):
            self._replica.apply_message(envelope, body)
        elif isinstance(body, Nodes):
            self._cluster.note(body)
        elif isinstance(body, Health):
            pieces = self._assemblers[body.source].add((envelope.boot, body.report), body)
            if pieces is not None:
                self._troubles_at[body.source] = now
                self._troubles[body.source] = {
                    (each.name, each.generation): (each.trouble, now - each.age_ms / 1000)
                    for piece in pieces
                    for each in piece.troubled
                    if each.trouble
                }
        elif isinstance(body, Exporters):
            self._shares.note(envelope.sender, body, now)

    def _note_report(self, report: Report, now: float) -> None:
        known, before = self._told.get(report.service), None
        if known is not None and known.report.boot == report.boot:
            soon = now - known.report.received_at < SOON_SECONDS
            before = known.before if soon else known.report
        self._told[report.service] = _Told(report, before)
        self._round.add_report(report.service, report.boot, report.received_at, report.accounts)

    def picture(self, now: float) -> Picture:
        """Return the picture as of now."""
        self._forget(now)
        self._compare(now)
        accounts = {name: told.report.accounts for name, told in self._told.items() if not _silent(told, now)}
        exporters = self._shares.exporters(self.clients.values(), self.version)
        streams = tuple(self._streams(accounts))
        collectors = tuple(self._collectors(accounts, now)) if self.version >= 0 else None
        services = tuple(self._services(now))
        found = tuple(self._losses(now))
        seconds = min(RECENT_SECONDS, max(0.0, now - self._began))
        verdict = judge(services, collectors, found, self._found, seconds, self.asked_for)
        return Picture(
            *(now, verdict, self._balanced, self._found, streams, collectors, exporters, services, found),
            *(tuple(kept_streams(accounts)), egress_accounts(accounts.values()), seconds),
            self._cluster.nodes if "uplink.1" in accounts else None,
            self._cluster.served(each.client for each in collectors or ()),
            accounts.get("offload.1", {}),
            accounts.get("uplink.1", {}),
        )

    def _forget(self, now: float) -> None:
        for name, told in list(self._told.items()):
            missed = name.startswith(TELL_THEIR_END) and not told.report.ended
            if now - told.report.received_at > FORGET_SECONDS and not missed:
                del self._told[name]
        self._shares.forget(now - SILENT_SECONDS)

    def _compare(self, now: float) -> None:
        """Compare the accounts of all services, a round at a time."""
        if now - self._round_began < ROUND_SECONDS:
            return
        if self._round.silent():
            self._balanced, self._found = None, ()
        else:
            found = tuple(self._round.discrepancies())
            late = now - self._round_began >= 2 * ROUND_SECONDS
            if found and not self._round.settled and not late:
                return  # they may still catch up with each other
            self._balanced, self._found = not found, found
        self._round, self._round_began = Balance(asked_for=self.asked_for), now

    def _streams(self, accounts: Mapping[str, Accounts]) -> Iterator[Stream]:
        parts: defaultdict[str, dict[str, dict[str, int]]] = defaultdict(dict)
        for service, kept in accounts.items():
            for name, account in kept.items():
                if name.startswith("stream/"):
                    parts[name.removeprefix("stream/")][service] = account
        wanted = {stream for client in self.clients.values() for stream in client.streams} - {"*"}
        for stream in sorted(parts.keys() | wanted):
            by_worker, name = parts.get(stream, {}), f"stream/{stream}"
            total: Counter[str] = Counter()
            for account in by_worker.values():
                total.update(account)
            told = [self._told[worker] for worker in by_worker]
            known = bool(by_worker)
            yield Stream(
                stream,
                total[RECEIVED] if known else None,
                _sum(each.rate(name, RECEIVED) for each in told),
                _sum(each.rate(name, BYTES) for each in told),
                total[PUBLISHED] if known else None,
                total[NO_SUBSCRIBER] if known else None,
                total[KERNEL_DROPPED] if known else None,
                lost(total) if known else None,
                _sum(_lost_rate(each, name) for each in told),
                causes(total),
                tuple(client.name for client in self.clients.values() if client.wants(stream)),
                tuple(
                    WorkerShare(
                        worker,
                        account.get(RECEIVED, 0),
                        self._told[worker].rate(name, RECEIVED),
                        account,
                        causes(account),
                    )
                    for worker, account in sorted(by_worker.items())
                ),
                self._shares.count_of(stream),
            )

    def _collectors(self, accounts: Mapping[str, Accounts], now: float) -> Iterator[Collector]:
        senders = {
            (source, name.removeprefix("collector/")): service
            for source, kind in SENDERS.items()
            for service, kept in accounts.items()
            if service.startswith(kind)
            for name in kept
            if name.startswith("collector/")
        }
        behind: defaultdict[str, list[Owed]] = defaultdict(list)
        for told in self._told.values():
            for each in told.owed():
                behind[each.collector].append(each)
        words = self._words
        self._words = {}
        for client in self.clients.values():
            if not client.streams:
                continue
            key, service = (client.name, client.generation), senders.get((client.source, client.name))
            health, since = self._health(key, client, service, words.get(key), now)
            self._words[key] = health, since
            name = f"collector/{client.name}"
            if service is None:
                yield Collector(client, health, since, None, *(None,) * 12, {}, None)
                continue
            told, account = self._told[service], accounts[service][name]
            count, past = lost(account), self._past_of.get(client.name)
            if past is None and count == 0:
                recent = 0
            else:
                past = self._past_of.setdefault(client.name, Past())
                past.note(now, count, began=0 if service in self._seen else count)
                recent = past.recent
            yield Collector(
                client,
                health,
                since,
                service,
                account.get(SENT, 0),
                account.get(BYTES, 0),
                told.rate(name, SENT, BY_KERNEL),
                told.rate(name, BYTES),
                account.get(EXPECTED, 0),
                sum(account.get(counter, 0) for counter in (FILTERED, SAMPLED_OUT, SHARED_OUT)),
                account.get(WITHHELD_BY_ADMIN, 0),
                account.get(BY_KERNEL, 0),
                account.get(TEMPLATES_SENT, 0),
                account.get(HELD, 0),
                count,
                _lost_rate(told, name),
                causes(account) if count else {},
                recent,
                tuple(behind.get(client.name, ())),
            )
        self._past_of = {name: past for name, past in self._past_of.items() if name in self.clients}

    def _health(
        self,
        key: tuple[str, int],
        client: Client,
        service: str | None,
        before: tuple[Word, float | None] | None,
        now: float,
    ) -> tuple[Word, float | None]:
        heard_at = self._troubles_at.get(client.source)
        if client.withheld:
            return before if before and before[0] == "withheld" else ("withheld", now if before else None)
        if self._cluster.is_elsewhere(client):
            return "elsewhere", None
        if heard_at is None or service is None or now - heard_at > SILENT_SECONDS:
            early = not self._told or now - self._began < SILENT_SECONDS
            word: Word = "unknown" if heard_at is None and early else "waiting"
            return before if before and before[0] == word else (word, now if before else None)
        if trouble := self._troubles[client.source].get(key):
            return trouble
        return before if before and before[0] == "ok" else ("ok", now if before else None)

    def _services(self, now: float) -> Iterator[Service]:
        for name, told in sorted(self._told.items()):
            report = told.report
            own = report.accounts.get(name.partition(".")[0], {})
            yield Service(
                name,
                report.pid,
                report.started_ns / 1e9,
                report.received_at,
                _silent(told, now),
                own.get(MEMORY),
                own.get(MEMORY_MOST),
                own.get(MEMORY_CEILING),
                own.get(DISCREPANCIES, 0),
                own.get(BUS_MISSED),
                dict(own),
                report.release,
            )

    def _losses(self, now: float) -> Iterator[RecentLoss]:
        boots = {name: told.report.boot for name, told in self._told.items()}
        yield from self._recent.note(self.accounts, boots, self._seen, now)
        self._seen = set(self._told)


def _silent(told: _Told, now: float) -> bool:
    return now - told.report.received_at > SILENT_SECONDS


def _rate(told: _Told, count: Callable[[Accounts], int]) -> float | None:
    before, report = told.before, told.report
    if before is None or (seconds := report.received_at - before.received_at) < 0.1:
        return None
    return max(0, count(report.accounts) - count(before.accounts)) / seconds


def _lost_rate(told: _Told, account: str) -> float | None:
    return _rate(told, lambda accounts: lost(accounts.get(account, {})))


def _sum(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None

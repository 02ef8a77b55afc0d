"""`fanwire ledger`: the accounts of every service, once, and whether they add up."""

import argparse
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Final

import msgspec

from services.operator.cli.arguments import Subparsers, add_command, positive_number
from services.operator.cli.text_tables import print_table
from services.operator.client.bus_reader import subscribed
from shared.bus.living_workers import living_workers
from shared.bus.messages import Status
from shared.bus.status import INTERVAL_SECONDS, Reports
from shared.ledger.accounts import EGRESS, is_origin, parse_origin
from shared.ledger.counters import (
    ACKNOWLEDGED,
    BY_KERNEL,
    BYTES,
    COPIED,
    DEFERRED,
    DROPPED,
    EXPECTED,
    EXPIRED,
    FILTERED,
    HELD,
    KERNEL_DROPPED,
    LATE_MS,
    LEFT_BEHIND,
    LINK_DROPS,
    MARKED,
    MEMORY,
    MEMORY_CEILING,
    MEMORY_MOST,
    MISSED,
    PUBLISHED,
    QUEUE_DROPS,
    READ,
    RECEIVED,
    SAMPLED_OUT,
    SEGMENTS,
    SENT,
    SHARED_OUT,
    TAKEN,
    UNSEEN,
    UNSERVED,
    WAITING_MESSAGES,
    WITHHELD,
    WITHHELD_BY_ADMIN,
    WRITTEN,
)
from shared.ledger.equations import lost
from shared.losses import Loss
from shared.monitoring.balance import Balance
from shared.monitoring.journal import kept_streams, owed
from shared.net.printable import printable
from shared.process.lifecycle import FAILED, OK, UNAVAILABLE, OperatorError
from shared.settings.model import Settings
from shared.settings.opt_in import asked_for

ROUND_SECONDS: Final = 2 * INTERVAL_SECONDS + 0.1
"""Every service reports at once, and then each second: in this time at least twice."""

Row = tuple[str | int | None, ...]


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "ledger", run, "the accounts, and whether they add up (exit 1 if not)")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=3.5,
        metavar="N",
        help="time for services to catch up with each other, in seconds; default: %(default)g",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the accounts; return 0 when they add up."""
    balance = _listen(settings, arguments.seconds)
    if silent := balance.silent():
        raise OperatorError(
            UNAVAILABLE,
            f"{' and '.join(silent)} did not report within {arguments.seconds:g} s; is it running, and not stopped or "
            "stuck? `fanwire doctor` says what to do",
        )
    found = list(balance.discrepancies())
    if arguments.json:
        facts = {
            "balanced": not found,
            "discrepancies": found,
            "gone": list(balance.gone()),
            "losses": [loss._asdict() for loss in balance.losses()],
            "services": balance.accounts,
        }
        print(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode())
    else:
        _print(balance, found)
    return FAILED if found else OK


def _listen(settings: Settings, seconds: float) -> Balance:
    """Take reports for a full round, and for as long as they disagree, up to `seconds`."""
    living, reports = living_workers(settings.bus.path), Reports()
    balance = Balance(workers=living, asked_for=[*asked_for(settings)])
    start = time.monotonic()
    with subscribed(settings, "status/") as subscriber:
        while (passed := time.monotonic() - start) < seconds:
            if passed >= ROUND_SECONDS and balance.settled and not balance.silent():
                break
            subscriber.socket.poll(100)
            while message := subscriber.receive():
                if isinstance(message.body, Status) and (report := reports.add(message.envelope, message.body)):
                    balance.add_report(report.service, report.boot, report.received_at, report.accounts)
    return balance


def _print(balance: Balance, found: list[str]) -> None:
    for title, columns, rows, totals in (
        ("Workers", WORKER_COLUMNS, _worker_rows(balance), (RECEIVED, BYTES, PUBLISHED, "kernel dropped")),
        ("Listeners", LISTENER_COLUMNS, _listener_rows(balance), (RECEIVED, BYTES, "kernel dropped")),
        ("Origins", ORIGIN_COLUMNS, _origin_rows(balance), (TAKEN, MISSED, "unserved")),
        *_past_tables(balance),
        *_site_tables(balance),
        ("Collectors", COLLECTOR_COLUMNS, _collector_rows(balance), {*COLLECTOR_COLUMNS[2:]} - {"dropped"}),
        *_kernel_tables(balance),
        ("Losses", Loss._fields, balance.losses(), ()),  # of datagrams, flows and records
        ("Memory", MEMORY_COLUMNS, _memory_rows(balance), ("MB", "ceiling")),
    ):
        print_table(title, columns, rows, totals)
    said = [*(f"gone: {origin}" for origin in balance.gone()), *(found or ["balanced"])]
    print("\n".join(map(printable, said)))


WORKER_COLUMNS: Final = ("worker", "stream", "received", "bytes", "published", "dropped", "kernel dropped")


def _worker_rows(balance: Balance) -> Iterator[Row]:
    for service, name, account in _accounts(balance, "stream/"):
        counts = (account.get(counter, 0) for counter in (RECEIVED, BYTES, PUBLISHED))
        yield service, name, *counts, _drops(account), account.get(KERNEL_DROPPED, 0)


LISTENER_COLUMNS: Final = ("worker", "stream", "listener", "received", "bytes", "kernel dropped")


def _listener_rows(balance: Balance) -> Iterator[Row]:
    for service, name, account in _accounts(balance, "listener/"):
        counts = (account.get(counter, 0) for counter in (RECEIVED, BYTES, KERNEL_DROPPED))
        stream, _, endpoint = name.partition("/")
        yield service, stream, endpoint, *counts


ORIGIN_COLUMNS: Final = ("consumer", "worker", "boot", "stream", "taken", "missed", "unserved")


def _origin_rows(balance: Balance) -> Iterator[Row]:
    for service, name, account in _accounts(balance, "origin/"):
        if is_origin(origin := f"origin/{name}"):
            worker, boot, stream = parse_origin(origin)
            yield service, worker, f"{boot:x}", stream, *(account.get(each, 0) for each in (TAKEN, MISSED, UNSERVED))


OUTCOMES: Final = (
    *(EXPECTED, SENT, BY_KERNEL, FILTERED, SAMPLED_OUT, SHARED_OUT, MISSED, WITHHELD, WITHHELD_BY_ADMIN),
    *(HELD, DEFERRED, LEFT_BEHIND),
)
COLLECTOR_COLUMNS: Final = (
    "consumer",
    "collector",
    *(counter.replace("_", " ") for counter in OUTCOMES),
    "dropped",
    "lost",
)


def _collector_rows(balance: Balance) -> Iterator[Row]:
    for service, name, account in _accounts(balance, "collector/"):
        yield service, name, *(account.get(counter, 0) for counter in OUTCOMES), _drops(account), lost(account)


Table = tuple[str, tuple[str, ...], list[Row], set[str]]
"""Title, columns, rows, and the columns with a sum."""


def _past_tables(balance: Balance) -> Iterator[Table]:
    """Yield the tables of the journal, if there is anything in them."""
    if kept := list(_journal_rows(balance)):
        yield "Journal", JOURNAL_COLUMNS, kept, {*JOURNAL_COLUMNS[2:]} - {"dropped", "since", "until"}
    if rows := list(_owed_rows(balance)):
        yield "Owed", OWED_COLUMNS, rows, {"datagrams"}


SENDING_COLUMNS: Final = ("service", "stream", TAKEN, ACKNOWLEDGED, HELD, "dropped")
SITE_COLUMNS: Final = ("site", "messages waiting", "seconds late")


def _site_tables(balance: Balance) -> Iterator[Table]:
    """Yield the tables of streams that are sent to other sites, and of sites that are received, if there are any."""
    sending: list[Row] = [
        (service, name, *(account.get(counter, 0) for counter in (TAKEN, ACKNOWLEDGED, HELD)), _drops(account))
        for service, name, account in _accounts(balance, "sending/")
    ]
    if sending:
        yield "Sending", SENDING_COLUMNS, sending, {TAKEN, ACKNOWLEDGED, HELD}
    rows: list[Row] = []
    for accounts in balance.accounts.values():
        for name, account in sorted(accounts.items()):
            if name.startswith("receiving/"):
                late = f"{account.get(LATE_MS, 0) / 1000:.1f}"
                rows.append((name.partition("/")[2], account.get(WAITING_MESSAGES, 0), late))
    if rows:
        yield "Sites", SITE_COLUMNS, rows, set()


KERNEL_TABLES: Final = (
    ("Kernel copies", "rules/", "collector", (COPIED,)),
    ("Kernel marks", "marks/", "stream", (MARKED, UNSEEN)),
    ("Egress", EGRESS, "interface", (QUEUE_DROPS, LINK_DROPS)),
)
"""Title, accounts of offload, what has one, and its counters."""


def _kernel_tables(balance: Balance) -> Iterator[Table]:
    """Yield the tables of the rules that the kernel copies by, if there are any."""
    for title, prefix, of, counters in KERNEL_TABLES:
        columns = tuple(counter.replace("_", " ") for counter in counters)
        rows: list[Row] = [
            (service, name, *(account.get(counter, 0) for counter in counters))
            for service, name, account in _accounts(balance, prefix)
        ]
        if rows:
            yield title, ("service", of, *columns), rows, {*columns}


OWED_COLUMNS: Final = ("consumer", "collector", "stream", "datagrams", "since")


def _owed_rows(balance: Balance) -> Iterator[Row]:
    for service, accounts in sorted(balance.accounts.items()):
        for each in owed(accounts):
            yield service, each.collector, each.stream, each.datagrams, _time(each.since)


def _time(at: float | None) -> str:
    return f"{datetime.fromtimestamp(at):%F %T}" if at else ""


JOURNAL_COLUMNS: Final = (
    "service",
    "stream",
    TAKEN,
    WRITTEN,
    "dropped",
    EXPIRED,
    READ,
    SEGMENTS,
    "MB",
    "since",
    "until",
)


def _journal_rows(balance: Balance) -> Iterator[Row]:
    for each in kept_streams(balance.accounts):
        taken, written, expired, read, segments = (
            each.account.get(counter, 0) for counter in (TAKEN, WRITTEN, EXPIRED, READ, SEGMENTS)
        )
        ends = each.size >> 20, _time(each.since), _time(each.until)
        yield each.service, each.stream, taken, written, _drops(each.account), expired, read, segments, *ends


MEMORY_COLUMNS: Final = ("service", "MB", "at most", "ceiling")


def _memory_rows(balance: Balance) -> Iterator[Row]:
    for service, accounts in sorted(balance.accounts.items()):
        account = accounts.get(service.partition(".")[0], {})
        if MEMORY in account:
            yield service, *(account.get(gauge, 0) >> 20 for gauge in (MEMORY, MEMORY_MOST, MEMORY_CEILING))


def _accounts(balance: Balance, prefix: str) -> Iterator[tuple[str, str, Mapping[str, int]]]:
    for service, accounts in sorted(balance.accounts.items()):
        for name, account in sorted(accounts.items()):
            if name.startswith(prefix):
                yield service, name.removeprefix(prefix), account


def _drops(account: Mapping[str, int]) -> str:
    """Return every cause with its count."""
    drops = ((name.removeprefix(DROPPED), count) for name, count in account.items() if name.startswith(DROPPED))
    return ", ".join(f"{cause} {count}" for cause, count in sorted(drops) if count)

"""`fanwire status`: every process that reports, with its version, privilege and memory."""

import argparse
import os
import pwd
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.cli.numbers import counted, lasting
from services.operator.cli.text_tables import print_table
from services.operator.client.bus_reader import subscribed
from services.operator.client.running_streams import running_streams, tell_difference
from services.operator.client.status_reader import heard_reports
from shared.bus.living_workers import living_workers
from shared.bus.status import INTERVAL_SECONDS, Report
from shared.ledger.counters import MEMORY, MEMORY_CEILING
from shared.monitoring.balance import Balance
from shared.process.lifecycle import OK, UNAVAILABLE
from shared.settings.model import Settings
from shared.settings.opt_in import asked_for

COLUMNS: Final = ("service", "pid", "up for", "version", "user", "capabilities", "MB", "ceiling")
LISTEN_SECONDS: Final = INTERVAL_SECONDS + 0.2
"""Every service reports at once when asked, and each second."""
CAPABILITIES: Final = {10: "NET_BIND_SERVICE", 12: "NET_ADMIN", 13: "NET_RAW"}
"""Those that a service may have by intent (capabilities(7)); others are shown as numbers."""
MANY: Final = 4
"""More capabilities than any service needs: it was started by root."""
START_SECONDS: Final = 120.0
"""A process begins at most this long before it makes its first report, unless it is another one by the same number."""
Row = tuple[str | int | None, ...]


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    add_command(subparsers, "status", run, "list the running services (exit 69 if one is missing)")


def run(_arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the services; return 69 when one that has to report does not."""
    with subscribed(settings, "status/") as subscriber:
        reports = {report.service: report for report in heard_reports(subscriber, LISTEN_SECONDS)}
    accounts = {name: report.accounts for name, report in reports.items()}
    missing = Balance(accounts, living_workers(settings.bus.path), [*asked_for(settings)]).silent()
    rows = [
        *map(_row, sorted(reports.values(), key=lambda report: report.service)),
        *((name, None, "does not report", *[None] * 5) for name in missing),
    ]
    print_table(counted(len(reports), "service"), COLUMNS, rows, ("MB", "ceiling"))
    tell_difference(running_streams(settings), settings)
    return UNAVAILABLE if missing else OK


def _row(report: Report) -> Row:
    own = report.accounts.get(report.service.partition(".")[0], {})
    memory = (own[gauge] >> 20 if gauge in own else None for gauge in (MEMORY, MEMORY_CEILING))
    up = lasting(max(0.0, time.time() - report.started_ns / 1e9))
    user, privilege = _privilege(report)
    return report.service, str(report.pid), up, report.release or "unknown", user, privilege, *memory


def _privilege(report: Report) -> tuple[str, str]:
    """Return a process's user and capabilities, both unknown where it is not a process that can be seen from here."""
    try:
        if abs(_started(report.pid) - report.started_ns / 1e9) > START_SECONDS:
            return "unknown", "unknown"
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{report.pid}/status").read_text().splitlines())
    except (OSError, ValueError):
        return "unknown", "unknown"
    number, capabilities = int(lines["Uid"].split()[1]), int(lines["CapEff"], 16)
    try:
        user = pwd.getpwuid(number).pw_name
    except KeyError:
        user = str(number)
    return user, describe_capabilities(capabilities)


def _started(pid: int) -> float:
    """Return the time at which a process began, in Unix time: field 22 of proc_pid_stat(5) counts from the boot."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def describe_capabilities(effective: int) -> str:
    """Return the capabilities of a set in words.

    >>> describe_capabilities(0), describe_capabilities(1 << 13), describe_capabilities((1 << 41) - 1)
    ('none', 'NET_RAW', '41 of them')
    """
    numbers = list(_bits(effective))
    if len(numbers) > MANY:
        return f"{len(numbers)} of them"
    return ", ".join(CAPABILITIES.get(number, str(number)) for number in numbers) or "none"


def _bits(mask: int) -> Iterator[int]:
    yield from (number for number in range(mask.bit_length()) if mask >> number & 1)

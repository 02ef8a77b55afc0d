"""`fanwire run` and `fanwire stop`: all services of this host, by honcho's Manager, and their end."""

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

from honcho.manager import Manager
from honcho.printer import Printer
from honcho.process import Popen, Process

from services.operator.cli.arguments import Subparsers, add_command, positive
from services.operator.cli.output import discard_output
from services.operator.client.bus_reader import subscribed
from services.operator.client.programs import command, environment
from services.operator.client.status_reader import heard_reports
from services.operator.commands.running.ready import OPTIONAL, SERVICES
from shared.bus.endpoint import open_link
from shared.bus.status import INTERVAL_SECONDS, Report
from shared.bus.zmq_sockets import broker_is_up
from shared.process.lifecycle import CANT_CREATE, MANAGER_PID, NOT_PERMITTED, OK, UNAVAILABLE, OperatorError
from shared.settings.model import Settings
from shared.settings.opt_in import OPT_IN, asked_for

ALL: Final = (*SERVICES, *OPT_IN, *OPTIONAL)
STOP_SECONDS: Final = 10.0
"""Time that services get to drain: they take up to 4 s, the sources of datagrams first."""
STOP_ORDER: Final = (
    "offload",
    "ingest",
    "uplink",
    "forwarder",
    "transmitter",
    "gateway",
    "journal",
    "console",
    "broker",
)
LISTEN_SECONDS: Final = 1.5 * INTERVAL_SECONDS
ENDED_BY_USER: Final = frozenset(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))


def add_parser(subparsers: Subparsers) -> None:
    """Add both commands."""
    parser = add_command(subparsers, "run", run, "run all services of this host, until Ctrl-C")
    parser.add_argument("--only", nargs="+", choices=ALL, default=(), metavar="SERVICE", help="only these")
    parser.add_argument("--ingest", type=positive, default=1, metavar="N", help="ingest workers; default: %(default)s")
    parser.add_argument("--hint", action="store_true", help="print what to try next, as on a terminal")
    add_command(subparsers, "stop", stop, "end the services that run on this host")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run services until a signal, or until one of them ends; return the exit code of the first that failed."""
    services = arguments.only or (*SERVICES, *asked_for(settings), *OPTIONAL)
    if "broker" in services and (found := _running(settings)):
        raise OperatorError(
            CANT_CREATE,
            f"fanwire is running already, on {settings.bus.path}: {_list(found)}. `fanwire stop` ends it; "
            "a second copy needs a [bus] directory and ports of its own",
        )
    manager = _Services()
    on_terminal = settings.log.format == "auto" and sys.stdout.isatty()
    form = {"FANWIRE_LOG__FORMAT": "text"} if on_terminal else {}
    for service in services:
        for number in range(arguments.ingest if service == "ingest" else 1):
            name = f"{service}.{number + 1}"
            manager.add_process(name, command(service, arguments.config), env=environment(name) | form)
    hint = arguments.hint or sys.stdout.isatty()
    with ExitStack() as stack:
        if hint and set(SERVICES) <= set(services):
            stack.enter_context(_hinting(arguments.config))
        manager.loop()
    return OK if manager.returncode in ENDED_BY_USER else int(manager.returncode or OK)


class _Output:
    """Standard output. Its end, a closed pipe or terminal, is no error: `ended` is called, once."""

    def __init__(self, file: TextIO) -> None:
        self._file: TextIO | None = file
        self.ended: Callable[[], object] = lambda: None

    def isatty(self) -> bool:
        """Return whether it is a terminal: then honcho uses colours."""
        return self._file is not None and self._file.isatty()

    def write(self, text: str) -> None:
        """Write, unless nobody reads any more."""
        try:
            if self._file is not None:
                self._file.write(text)
        except OSError:
            self._end()

    def flush(self) -> None:
        """Flush likewise."""
        try:
            if self._file is not None:
                self._file.flush()
        except OSError:
            self._end()

    def _end(self) -> None:
        self._file = None
        discard_output()
        self.ended()


class _Service(Process):  # type: ignore[misc]  # honcho has no types
    """A service, started without the shell that honcho would use: an image need not have one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._child_ctor = partial(Popen, shell=False)


class _Services(Manager):  # type: ignore[misc]  # honcho has no types
    """The services of a run. They end with the first that ends, by a signal, and when nobody reads the output."""

    def __init__(self) -> None:
        output = _Output(sys.stdout)
        output.ended = self._end
        super().__init__(Printer(output))
        self._process_ctor = _Service
        self.returncode: int | None = None
        self._ending = False
        signal.signal(signal.SIGHUP, lambda *_: self._end())

    def _end(self) -> None:
        """End all, since the terminal has closed, or the program that reads the output has ended."""
        if self.returncode is None:
            self.returncode = 128 + signal.SIGHUP
        self.terminate()

    def terminate(self) -> None:
        """End all; while some are not started yet, as soon as they are: honcho knows no pids of those."""
        self._ending = True
        if self._all_started():
            super().terminate()

    def _system_print(self, data: str) -> None:
        super()._system_print(data)
        if self._ending and self._all_started():
            super().terminate()


@contextmanager
def _hinting(config: Path | None) -> Iterator[None]:
    """Let `fanwire ready --hint` print meanwhile, once all services are ready."""
    hint = command("operator", config, "ready", "--hint")
    with subprocess.Popen(hint, env=environment(""), start_new_session=True) as process:
        yield
        process.kill()


def stop(_arguments: argparse.Namespace, settings: Settings) -> int:
    """End what runs; OperatorError (69, 77) if nothing does, if it is not ours to end, or if something remains.

    Services end in the order of the datagrams' way. Those of a `fanwire run` end together, when it is the first one's
    turn. The `fanwire run` itself ends last, after services that are not heard too: then its ports are free.
    """
    if settings.bus.connect:
        raise OperatorError(UNAVAILABLE, f"the bus is on another host, {settings.bus.connect}: stop it there")
    found = _running(settings)
    if not found:
        raise OperatorError(
            UNAVAILABLE, f"nothing runs on {settings.bus.path}; name the settings of what runs by --config"
        )
    with ExitStack() as opened:
        services = [each for report in found if (each := _open(report, opened))]
        if len(services) < len(found):
            _check_ended(found, services, _running(settings))
        _end(services)
    print(f"stopped: {_list(found)}")
    return OK


@dataclass
class _Process:
    """A service that was heard: the descriptor of its process, and the pid of the `fanwire run` that it belongs to.

    That is 0 for a service that was started by itself, and None for one that does not tell: the transmitter.
    """

    report: Report
    descriptor: int
    manager: int | None


def _open(report: Report, opened: ExitStack) -> _Process | None:
    """Return a service's process; None: there is no such process here, or no more."""
    with suppress(FileNotFoundError, ProcessLookupError):
        descriptor = os.pidfd_open(report.pid)
        opened.callback(os.close, descriptor)
        if report.service.partition(".")[0] in Path(f"/proc/{report.pid}/cmdline").read_text(errors="replace"):
            return _Process(report, descriptor, _manager_of(report))
    return None


def _check_ended(found: list[Report], services: list[_Process], heard: list[Report]) -> None:
    """Raise OperatorError when one that is not among these processes is heard still: it runs in another container."""
    here = {each.report.boot for each in services}
    for report in found:
        if report.boot not in here and report.boot in {each.boot for each in heard}:
            name = f"{report.service} (pid {report.pid})"
            raise OperatorError(UNAVAILABLE, f"{name} is no process here; stop it in its own container")


def _end(services: list[_Process]) -> None:
    """Send SIGTERM, each in its turn or, with all others of its, to its `fanwire run`; wait until all have ended."""
    deadline = time.monotonic() + STOP_SECONDS
    with ExitStack() as opened:
        managers: dict[int, int] = {}
        for pid in {each.manager for each in services if each.manager}:
            with suppress(ProcessLookupError):  # it has ended, and its services end by themselves
                managers[pid] = os.pidfd_open(pid)
                opened.callback(os.close, managers[pid])
        _end_in_order(services, managers, deadline)
        for pid, descriptor in managers.items():
            _wait_for(f"fanwire run (pid {pid})", descriptor, deadline)


def _end_in_order(services: list[_Process], managers: Mapping[int, int], deadline: float) -> None:
    asked: set[int] = set()
    for name in STOP_ORDER:
        same = [each for each in services if each.report.service.partition(".")[0] == name]
        for each in same:
            manager = each.manager
            if manager is None:
                manager = next((pid for pid in _ancestors(each.report.pid) if pid in managers), 0)
            with suppress(ProcessLookupError):  # it has ended meanwhile
                if not manager:
                    signal.pidfd_send_signal(each.descriptor, signal.SIGTERM)
                elif manager in managers.keys() - asked:
                    asked.add(manager)
                    signal.pidfd_send_signal(managers[manager], signal.SIGTERM)
        for each in same:
            _wait_for(f"{each.report.service} (pid {each.report.pid})", each.descriptor, deadline)


def _wait_for(named: str, descriptor: int, deadline: float) -> None:
    """Wait until a process has ended. OperatorError when it has not by then."""
    if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        raise OperatorError(UNAVAILABLE, f"{named} does not end; see its log")


def _ancestors(pid: int) -> Iterator[int]:
    """Yield the pids of a process's parent, of the parent's parent, and so on (proc_pid_stat(5))."""
    with suppress(FileNotFoundError, ProcessLookupError):
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            yield pid


def _manager_of(report: Report) -> int | None:
    """Return the pid of the `fanwire run` that a service belongs to, as `_Process` has it.

    OperatorError: the process is another user's, or one that systemd would start again.
    """
    name, process = f"{report.service} (pid {report.pid})", Path("/proc", str(report.pid))
    if "/fanwire-" in (process / "cgroup").read_text():
        raise OperatorError(UNAVAILABLE, f"systemd looks after {name}: systemctl stop fanwire.target")
    try:
        os.kill(report.pid, 0)
        told = (process / "environ").read_text(errors="replace").split("\0")
    except PermissionError as error:
        if error.filename:  # the transmitter's environment is nobody's to read
            return None
        owner = process.stat().st_uid
        raise OperatorError(
            NOT_PERMITTED, f"{name} belongs to the user with id {owner}; stop it as that user"
        ) from None
    return int(dict(each.partition("=")[::2] for each in told).get(MANAGER_PID, 0))


def _running(settings: Settings) -> list[Report]:
    """Return the last report of each service on the bus, after all had time for one; none without a broker."""
    if not broker_is_up(settings.bus.path, open_link(settings.bus, "operator")):
        return []
    with subscribed(settings, "status/") as subscriber:
        latest = {report.service: report for report in heard_reports(subscriber, LISTEN_SECONDS)}
    return [latest[service] for service in sorted(latest)]


def _list(reports: Iterable[Report]) -> str:
    return ", ".join(
        f"{report.service} (pid {report.pid}, since {datetime.fromtimestamp(report.started_ns / 1e9):%F %T})"
        for report in reports
    )

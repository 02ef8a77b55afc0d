"""Start and end of every process: arguments, logging, signals, readiness, exit codes.

A signal handler only sets a flag; the service's loop sees it and drains: stop input, flush, close, exit, all within
4 seconds, because honcho kills after five. A second signal has the default action. SIGHUP has a service read its
settings again (`shared.process.reload`), and ends a command as SIGTERM does: its terminal has closed. While a process
drains, it ignores SIGHUP.
"""

import argparse
import contextlib
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from shared.log import configure, get_logger
from shared.net.printable import printable
from shared.process.installed_version import release
from shared.process.log_limit import LogLimit
from shared.settings.explain import SettingsError, did_you_mean
from shared.settings.file import load, load_again
from shared.settings.model import Settings
from shared.settings.tables import Bus

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 64
"""Exit codes are those of sysexits.h where it has one."""
UNAVAILABLE: Final = 69
CANT_CREATE: Final = 73
NOT_PERMITTED: Final = 77
BAD_SETTINGS: Final = 78

BROKER_PATIENCE_SECONDS: Final = 2.0
"""Time that a service waits for a broker in silence: services started together find each other sooner."""

MANAGER_SECONDS: Final = 1.0
MANAGER_PID: Final = "FANWIRE_MANAGER_PID"
"""Environment variable with the process that runs all services together (`fanwire run`): they end with it."""

SHARED_SECONDS: Final = 0.05
"""Time by which regular work may be late."""

log = get_logger()


class OperatorError(Exception):
    """Ends the process with one line and an exit code, for a fault that the operator can mend."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(printable(message))
        self.exit_code = exit_code


class Lifecycle:
    """Signals as flags and a descriptor: `draining` is set at the first SIGTERM or SIGINT, `reload_wanted` by SIGHUP.

    `read` reads the settings again, from where they were read at the start; without it SIGHUP sets `draining`, unless
    the process was started with SIGHUP ignored, as by nohup(1).
    """

    def __init__(self, read: Callable[[], Settings] | None = None) -> None:
        self.draining = self.reload_wanted = False
        self.read = read
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._drain)
        if read or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._reload if read else self._drain)

    def fileno(self) -> int:
        """Return the descriptor that is readable once a signal has come and wakes a poll; call `heed` when it is."""
        return self._reader.fileno()

    def heed(self) -> None:
        """Make `fileno` unreadable until the next signal; a drain keeps it readable."""
        with contextlib.suppress(BlockingIOError):
            while not self.draining and self._reader.recv(4096):
                pass

    def _drain(self, number: int, _frame: FrameType | None) -> None:
        self.draining = True
        signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _reload(self, _number: int, _frame: FrameType | None) -> None:
        self.reload_wanted = True


class Parser(argparse.ArgumentParser):
    """An argument parser that exits with 64 on wrong usage and knows `--version`."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog=prog, description=description, **options)
        self.add_argument("--version", action=_ShowVersion, nargs=0, help="show program's version number and exit")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of an argument's choices, and name the nearest one."""
        if action.choices is not None and value not in action.choices:
            words = [str(word) for word in action.choices]
            nearest = did_you_mean(str(value), words)
            raise argparse.ArgumentError(action, f"no {value!r}{nearest}; expected one of: {', '.join(words)}")

    def error(self, message: str) -> NoReturn:
        """Print usage and the message to stderr, exit with 64."""
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


class _ShowVersion(argparse.Action):
    """Prints the installed version, or a word for a checkout that is not installed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("fanwire", release())
        parser.exit()


def service_parser(name: str, description: str) -> Parser:
    """Return the parser of a service, with `--config` and `--check`; the service adds its own arguments."""
    parser = Parser(f"fanwire {name}", description)
    add_service_arguments(parser)
    return parser


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every service."""
    add_config_argument(parser)
    parser.add_argument("--check", action="store_true", help="say whether it could use its settings here, and end")


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file; also FANWIRE_CONFIG")


def worker_name(service: str) -> str:
    """Return this process's name on the bus: `ingest.2` as honcho numbers it (HONCHO_PROCESS_NAME), else the first."""
    name = os.environ.get("HONCHO_PROCESS_NAME", "")
    prefix, _, number = name.rpartition(".")
    return name if prefix == service and number.isascii() and number.isdigit() else f"{service}.1"


def run(
    main: Callable[[argparse.Namespace, Settings, Lifecycle], None],
    arguments: argparse.Namespace,
    check: Callable[[Settings], object],
) -> int:
    """Run a service to its end and return its exit code; a fault that the operator can mend ends in one line.

    `check` is run instead for `--check`: it raises what `main` would, and leaves everything as it is.
    """
    configure_logging()
    if arguments.check:
        return _check(lambda: check(load(arguments.config)))
    raise_descriptor_limit()
    gc.freeze()  # the objects made so far stay; the collector need not look at them again under load
    try:
        lifecycle = Lifecycle(partial(load_again, arguments.config))  # before reading: no later SIGHUP is missed
        settings = load(arguments.config)
        configure_logging(settings.log.format)
        main(arguments, settings, lifecycle)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return BAD_SETTINGS
    except OperatorError as error:
        log.error(str(error))
        return error.exit_code
    except PermissionError as error:
        log.error(f"{error.filename}: {error.strerror}")
        return NOT_PERMITTED
    return OK


def _check(check: Callable[[], object]) -> int:
    try:
        check()
    except (SettingsError, OperatorError) as error:
        print(error)
        return BAD_SETTINGS
    except OSError as error:
        print(printable(f"{error.filename}: {error.strerror}"))
        return BAD_SETTINGS
    return OK


def configure_logging(form: str = "auto") -> None:
    """Log to stderr, and limit repeated warnings and errors; `form` is `[log] format`."""
    configure(LogLimit().admit, form, timed=MANAGER_PID in os.environ)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one: every client and collector is a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_limit() -> int:
    """Return the number of files that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


class Watchdog:
    """Tells systemd, where it asked (sd_watchdog_enabled(3)), that a service's loop still turns."""

    def __init__(self) -> None:
        ours = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 if ours else 0.0
        self._interval = seconds / 4
        self.due_at = 0.0 if seconds else float("inf")

    def feed(self) -> None:
        """Tell systemd when it is due. Call it after each turn of a loop that did its work, and from nowhere else."""
        now = time.monotonic()
        if now >= self.due_at:
            self.due_at = now + self._interval
            notify("WATCHDOG=1", socket.MSG_DONTWAIT)  # a manager that is busy must not hold up the loop


class Manager:
    """The process that runs all services together, if there is one: without it nobody could stop them by one signal."""

    def __init__(self) -> None:
        self._check_at = float("inf")
        self.watched: list[int] = []
        """Its descriptor, which becomes readable when it ends."""
        if pid := os.environ.get(MANAGER_PID):
            self._check_at = 0.0
            with contextlib.suppress(OSError):  # it has ended already
                self.watched = [os.pidfd_open(int(pid))]

    def check(self) -> None:
        """Do what `heed` does, once a second."""
        if (now := time.monotonic()) >= self._check_at:
            self._check_at = now + MANAGER_SECONDS
            self.heed()

    def heed(self) -> None:
        """Send this process SIGTERM once the manager has ended, however it has ended."""
        if self._check_at != float("inf") and (not self.watched or select.select(self.watched, [], [], 0)[0]):
            self._check_at = float("inf")
            log.warning("the process that ran all services has ended: this one ends too")
            os.kill(os.getpid(), signal.SIGTERM)


class Readiness:
    """Logs once that a service is ready; if that takes long, logs once why it waits.

    Feeds the watchdog, and heeds the end of the manager.
    """

    def __init__(self, service: str, bus: Bus, broker_observed: Callable[[], bool]) -> None:
        self._service = service
        self._bus = bus
        self._broker_observed = broker_observed
        self._warn_at = time.monotonic() + BROKER_PATIENCE_SECONDS
        self._watchdog = Watchdog()
        self._manager = Manager()
        self._ready = False

    def check(self, **facts: object) -> None:
        """Check whether the broker has been observed, and feed the watchdog: call it after every turn of the loop."""
        self._watchdog.feed()
        self._manager.check()
        if self._ready:
            return
        if self._broker_observed():
            self._ready = True
            announce_ready(self._service, **facts)
        elif time.monotonic() >= self._warn_at:
            self._warn_at = float("inf")
            where = {"connect": self._bus.connect} if self._bus.connect else {"directory": str(self._bus.path)}
            hint = "; if it runs, its log says whether it refuses this key" if self._bus.keys else ""
            event = f"waiting for the broker; start it with `fanwire broker`{hint}{self._bus.name_hint}"
            log.warning(event, service=self._service, **where)


def stay_up(service: str, lifecycle: Lifecycle) -> None:
    """Do nothing until told to end, for a service that is switched off: if it ended, honcho would end all others."""
    announce_ready(service, listen=[])
    watchdog, manager = Watchdog(), Manager()
    while not lifecycle.draining:
        watchdog.feed()
        left = watchdog.due_at - time.monotonic()
        select.select([lifecycle.fileno(), *manager.watched], [], [], None if left == float("inf") else max(0.0, left))
        lifecycle.heed()
        manager.heed()


def announce_ready(service: str, **facts: object) -> None:
    """Report that the service can serve now: in the log, and to systemd."""
    log.info("ready", service=service, pid=os.getpid(), **facts)
    notify("READY=1")


def next_tick(now: float, seconds: float) -> float:
    """The next moment of the monotonic clock that is a multiple of `seconds`.

    Every process looks after its own at these same moments: one wake-up of the machine serves them all.

    >>> next_tick(12.25, 0.5)
    12.5
    """
    return (now // seconds + 1) * seconds


def pause_for(left: float) -> float:
    """Return how long to wait for regular work that is due in `left` seconds, unless a message comes.

    That is a moment longer when it is not due soon: messages that others send at a tick come just behind it, and one
    wake-up then serves both.

    >>> pause_for(0.02), pause_for(0.75)
    (0.02, 0.8)
    """
    return left + SHARED_SECONDS if left > 2 * SHARED_SECONDS else max(0.0, left)


def notify(state: str, flags: int = 0) -> None:
    """Send a state to systemd, where it asked (sd_notify(3)); it is no fault if systemd does not listen."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), flags, "\0" + address[1:] if address.startswith("@") else address)

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from shared.process.lifecycle import MANAGER_SECONDS, Watchdog, worker_name
from tests.stack import Running, Stack, wait_until

SERVICE = """
import argparse, sys, time
from shared.process.lifecycle import Lifecycle, OperatorError, log, run, service_parser
from shared.process.reload import Reload
from shared.settings.model import Settings

def serve(arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    if arguments.fail:
        raise OperatorError(73, "the disk is full; delete something")
    if arguments.bug:
        raise RuntimeError("ours")
    log.info("starting")
    time.sleep(arguments.start)
    log.info("ready", woken=arguments.start or select(lifecycle, 0))
    reload = Reload("tested", lifecycle, settings, lambda settings: None)
    turns = 0
    while not lifecycle.draining:
        turns += 1
        if select(lifecycle, 60):
            lifecycle.heed()
        reload.check()
    log.info("draining", woken=select(lifecycle, 0), turns=turns)
    time.sleep(arguments.drain)

def select(lifecycle: Lifecycle, seconds: float) -> bool:
    import select
    return bool(select.select([lifecycle], [], [], seconds)[0])

parser = service_parser("tested", "A service for the tests.")
parser.add_argument("--start", type=float, default=0)
parser.add_argument("--drain", type=float, default=0)
parser.add_argument("--fail", action="store_true")
parser.add_argument("--bug", action="store_true")
sys.exit(run(serve, parser.parse_args(), lambda settings: None))
"""


def start(stack: Stack, *arguments: str, **environment: str) -> Running:
    """Start a service that does nothing but live."""
    return stack.spawn("tested", [sys.executable, "-c", SERVICE, *arguments], **environment)


def ended(stack: Stack, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run it to its end; return its exit code and all it printed."""
    running = start(stack, *arguments, **environment)
    return running.process.wait(60), running.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_drains(stack: Stack, number: signal.Signals) -> None:
    """The first signal wakes a loop that is blocked in poll, which drains and exits with 0."""
    running = start(stack)
    running.wait_for("ready")
    assert running.stop(number) == 0
    assert not running.events("ready")[0]["woken"]
    assert running.events("draining")[0]["woken"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_has_its_default_action(stack: Stack, number: signal.Signals) -> None:
    """The same signal again ends a drain at once."""
    running = start(stack, "--drain", "60")
    running.wait_for("ready")
    running.process.send_signal(number)
    running.wait_for("draining")
    assert running.stop(number) == -number


def test_other_signal_does_not_cut_a_drain_short(stack: Stack) -> None:
    """Ctrl-C under honcho sends SIGINT and then SIGTERM: together they are still the first signal of each kind."""
    running = start(stack, "--drain", "0.3")
    running.wait_for("ready")
    running.process.send_signal(signal.SIGINT)
    running.wait_for("draining")
    assert running.stop(signal.SIGTERM) == 0


def test_version_is_the_releases(stack: Stack) -> None:
    """`--version` prints one line and exits with 0."""
    assert ended(stack, "--version") == (0, f"fanwire {version('fanwire')}\n")


@pytest.mark.parametrize("arguments", [["--colour"], ["surplus"], ["--config"], ["--drain", "long"]])
def test_wrong_usage_exits_64(stack: Stack, arguments: list[str]) -> None:
    """Wrong arguments end with usage, what is wrong, and EX_USAGE."""
    code, text = ended(stack, *arguments)
    assert code == 64
    assert text.startswith("usage: fanwire tested")
    assert "\nfanwire tested: " in text


def test_what_the_operator_can_mend_is_one_line(stack: Stack) -> None:
    """An OperatorError ends with its exit code and one log line, without a traceback."""
    code, text = ended(stack, "--fail")
    assert code == 73
    (line,) = text.splitlines()
    assert json.loads(line)["event"] == "the disk is full; delete something"
    assert json.loads(line)["level"] == "error"


PROVOKED = """
import asyncio, logging, time
from shared.process.lifecycle import configure_logging, log
configure_logging()
began = time.monotonic()
for number in range(10_000):
    log.warning("dropped", cause=("old", "new")[number % 2], number=number)
    log.error("refused", reason="x" * 100)
    asyncio.log.logger.warning("socket.send() raised %s", "exception")
    log.info("reloaded")
    log.error("not reloaded", answer=True)
passed = time.monotonic() - began
time.sleep(1)
log.error("refused", reason="y")
log.info("counted", passed=passed)
"""


def test_log_stays_short_whatever_is_provoked(stack: Stack) -> None:
    """Of warnings and errors each event and cause is a line a second, which tells how many; answers are all said."""
    running = stack.spawn("tested", [sys.executable, "-c", PROVOKED])
    assert running.process.wait(60) == 0
    seconds = running.events("counted")[0]["passed"] + 2
    assert len(running.events("reloaded")) == len(running.events("not reloaded")) == 10_000
    for cause in ("old", "new"):
        assert 1 <= sum(line["cause"] == cause for line in running.events("dropped")) <= seconds
    assert 1 <= len(running.events("socket.send() raised exception")) <= seconds
    *_, last = refused = running.events("refused")
    assert (len(refused) <= seconds, last["reason"]) == (True, "y")
    assert sum(1 + line.get("suppressed", 0) for line in refused) == 10_001


@pytest.mark.parametrize(
    ("form", "environment", "line"),
    [
        ("auto", {}, r'\{"event": "starting", "level": "info", "timestamp": "20.*Z"\}'),
        ("json", {"FANWIRE_MANAGER_PID": "1"}, r'\{"event": "starting", "level": "info", "timestamp": "20.*Z"\}'),
        ("text", {}, r"\d\d:\d\d:\d\d \[info +\] starting"),
        ("text", {"FANWIRE_MANAGER_PID": "1"}, r"\[info +\] starting"),
    ],
)
def test_log_has_the_form_that_is_asked_for(stack: Stack, form: str, environment: dict[str, str], line: str) -> None:
    """JSON where it is no terminal, or what `[log] format` says; without the time where another program puts it."""
    stack.configure(f'[log]\nformat = "{form}"\n')
    running = start(stack, **environment)
    running.wait_for("ready")
    running.stop()
    assert re.match(line, running.text)


def test_bug_shows(stack: Stack) -> None:
    """Any other exception is ours: its traceback is shown and the process fails."""
    code, text = ended(stack, "--bug")
    assert code == 1
    assert "RuntimeError: ours" in text
    assert "Traceback" in text


def test_bad_settings_exit_78(stack: Stack) -> None:
    """Settings that can't be used end with EX_CONFIG and one line that names file and key."""
    stack.configure("[ingest]\nfill_ms = true\n")
    code, text = ended(stack)
    assert code == 78
    assert text.startswith(f"{stack.directory}/fanwire.toml: line 4: [ingest] fill_ms: expected a number from 0")
    assert len(text.splitlines()) == 1


def test_config_argument_names_the_file(stack: Stack) -> None:
    """`--config` goes before FANWIRE_CONFIG, and the environment before both."""
    other = stack.directory / "other.toml"
    other.write_text("colour = 1\n")
    assert ended(stack, "--config", str(other))[0] == 78
    code, text = ended(stack, FANWIRE_BUS__HIGH_WATER_MARK="0")
    assert (code, text.partition(":")[0]) == (78, "FANWIRE_BUS__HIGH_WATER_MARK")


@pytest.mark.parametrize("service", ["ingest", "forwarder", "broker"])
def test_every_service_knows_version_and_usage(stack: Stack, service: str) -> None:
    """Each service answers `--version`, and wrong usage with 64."""
    running = stack.spawn(service, [sys.executable, "-m", f"services.{service}", "--version"])
    wrong = stack.spawn(service, [sys.executable, "-m", f"services.{service}", "--colour"])
    assert running.process.wait(60) == 0
    assert running.text.startswith("fanwire ")
    assert wrong.process.wait(60) == 64
    assert wrong.text.startswith(f"usage: fanwire {service}")


@pytest.fixture
def manager(stack: Stack) -> Iterator[socket.socket]:
    """A service manager's end of sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(stack.directory / "notify"))
        sock.settimeout(60)
        yield sock


def test_service_manager_is_told_when_ready(stack: Stack, manager: socket.socket) -> None:
    """A service started with NOTIFY_SOCKET says READY=1 there, once it can serve."""
    stack.spawn("broker", [sys.executable, "-m", "services.broker"], NOTIFY_SOCKET=manager.getsockname())
    assert manager.recv(100) == b"READY=1"
    wait_until(lambda: stack["broker"].events("ready"), "the broker logs that it is ready")


def test_watchdog_is_fed_as_often_as_turns_come(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn feeds it, but no more often than every quarter of the interval."""
    now = 1000.0
    monkeypatch.setattr("shared.process.lifecycle.time.monotonic", lambda: now)
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "8000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    watchdog = Watchdog()
    manager.setblocking(False)
    for turn, fed in ((0.0, True), (0.1, False), (1.8, False), (0.1, True), (60.0, True), (0.0, False)):
        now += turn
        watchdog.feed()
        if fed:
            assert manager.recv(100) == b"WATCHDOG=1"
        with pytest.raises(BlockingIOError):
            manager.recv(100)


@pytest.mark.parametrize("asked", [{}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}])
def test_watchdog_nobody_asked_for_is_not_fed(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]
) -> None:
    """Without WATCHDOG_USEC, or when it is meant for another process, nothing is sent."""
    for name, value in {"NOTIFY_SOCKET": manager.getsockname(), **asked}.items():
        monkeypatch.setenv(name, value)
    Watchdog().feed()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(100)


def test_manager_that_does_not_listen_holds_nobody_up(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the manager's queue full, or the manager gone, feeding neither waits nor fails."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "4")
    watchdog = Watchdog()
    for _ in range(2000):  # more than net.unix.max_dgram_qlen lets wait
        watchdog.feed()
    manager.close()
    watchdog.feed()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("ingest.2", "ingest.2"),
        ("ingest.12", "ingest.12"),
        ("", "ingest.1"),
        ("web.2", "ingest.1"),
        ("ingest", "ingest.1"),
        ("ingest.", "ingest.1"),
        ("ingest.x", "ingest.1"),
        ("my.ingest.2", "ingest.1"),
    ],
)
def test_worker_is_named_as_honcho_numbers_it(monkeypatch: pytest.MonkeyPatch, given: str, name: str) -> None:
    """HONCHO_PROCESS_NAME names the worker when it is one of this service, else it is the first."""
    monkeypatch.setenv("HONCHO_PROCESS_NAME", given)
    assert worker_name("ingest") == name


def test_hangup_reloads(stack: Stack) -> None:
    """SIGHUP wakes a loop that is blocked in poll, once, and has the settings read again from the same file."""
    running = start(stack, "--config", str(stack.directory / "fanwire.toml"), FANWIRE_CONFIG="/nowhere")
    running.wait_for("ready")
    for name in ("one", "two"):
        stack.configure(f'[[stream]]\nname = "{name}"\nlisten = ["udp://127.0.0.1:1"]\n')
        assert f"stream {name}" in running.reload()["changed"]
    assert running.stop() == 0
    assert running.events("draining")[0]["turns"] == 3


def test_hangup_during_the_start_is_heeded_after_it(stack: Stack) -> None:
    """SIGHUP before a service has come to its loop has the settings read again by the first turn."""
    running = start(stack, "--start", "0.3")
    running.wait_for("starting")
    running.process.send_signal(signal.SIGHUP)
    wait_until(lambda: running.reloads, "it reloads")
    assert running.stop() == 0


def test_hangup_does_no_harm_to_a_drain(stack: Stack) -> None:
    """SIGHUP while a service drains neither ends it nor has anything read."""
    running = start(stack, "--drain", "0.3")
    running.wait_for("ready")
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("draining")
    assert running.stop(signal.SIGHUP) == 0
    assert running.reloads == []


def test_settings_from_a_pipe_are_not_read_again(stack: Stack) -> None:
    """A source that can be read only once keeps the old settings, rather than those of an empty file."""
    path = stack.directory / "pipe"
    os.mkfifo(path)
    running = start(stack, "--config", str(path))
    path.write_text('[[stream]]\nname = "one"\nlisten = ["udp://127.0.0.1:1"]\n')
    running.wait_for("ready")
    assert "can't be read a second time" in running.reload()["event"]


def test_one_that_is_switched_off_sleeps_until_its_manager_ends(stack: Stack) -> None:
    """It does not wake while the process that runs all services lives, and ends with it."""
    manager = stack.spawn("manager", ["sleep", "600"])
    resting = stack.spawn(
        "resting", [sys.executable, "-m", "services.uplink"], FANWIRE_MANAGER_PID=str(manager.process.pid)
    )
    stat = Path(f"/proc/{resting.process.pid}/status")
    wait_until(lambda: resting.events("ready") and "\nState:\tS" in stat.read_text(), "it rests")

    def slept() -> str:
        return stat.read_text().partition("\nvoluntary_ctxt_switches:")[2]

    before = slept()
    time.sleep(MANAGER_SECONDS + 0.2)
    assert slept() == before
    manager.process.kill()
    assert resting.process.wait(60) == 0

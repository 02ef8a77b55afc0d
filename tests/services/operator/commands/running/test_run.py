"""`fanwire run` ends whole, whatever ends it, and `fanwire stop` ends it."""

import errno
import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import Mock

import pytest

from services.operator.commands.running import run
from shared.bus.status import Report
from shared.process.lifecycle import MANAGER_PID, OperatorError
from shared.settings.model import Settings
from shared.settings.tables import Bus
from tests.stack import CHECKOUT, PATIENCE_SECONDS, Running, Stack, wait_until

RUN = [sys.executable, "-m", "services.operator", "run"]
FEW = (*RUN, "--only", "broker", "forwarder")


def processes(stack: Stack) -> dict[int, str]:
    """Return all that runs with the settings of this test, but for what waits to be waited for: pid and command."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"FANWIRE_CONFIG={stack.directory}/" in (process / "environ").read_text(errors="replace"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


@dataclass
class Run:
    """Services that run in a terminal of their own, as a job of its shell; what they print is read as it comes."""

    stack: Stack
    process: subprocess.Popen[bytes]
    terminal: int
    text: str = field(default="")

    def read(self) -> str:
        """Return everything printed so far."""
        with suppress(OSError):
            while piece := os.read(self.terminal, 1 << 16):
                self.text += piece.decode()
        return self.text

    def wait_until_ready(self, *services: str) -> None:
        """Wait until services are."""
        wait_until(
            lambda: all(re.search(rf"\[info +\] ready +.*service={name}", self.read()) for name in services),
            lambda: f"{services} are ready: {self.text}",
        )

    def close(self) -> None:
        """Close the terminal, as one closes its window."""
        if self.terminal >= 0:
            os.close(self.terminal)
            self.terminal = -1


@contextmanager
def running(stack: Stack, command: list[str]) -> Iterator[Run]:
    """Run a command in a terminal."""
    ours, theirs = pty.openpty()
    fcntl.fcntl(ours, fcntl.F_SETFL, os.O_NONBLOCK)

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=stack.environment,
        cwd=stack.directory,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    run = Run(stack, process, ours)
    try:
        yield run
    finally:
        for pid in processes(stack):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)
        run.close()


def by_ctrl_c(run: Run) -> None:
    """Press Ctrl-C once."""
    os.write(run.terminal, b"\x03")


def by_ctrl_backslash(run: Run) -> None:
    """Press Ctrl-Backslash: SIGQUIT, which nothing handles."""
    os.write(run.terminal, b"\x1c")


def by_its_window(run: Run) -> None:
    """Close the terminal's window."""
    run.close()


def by_sigterm(run: Run) -> None:
    """Send SIGTERM."""
    run.process.send_signal(signal.SIGTERM)


def by_sigkill(run: Run) -> None:
    """Send SIGKILL, which cannot be handled."""
    run.process.kill()


def by_a_service(run: Run) -> None:
    """Kill one of the services."""
    (pid,) = [pid for pid, command in processes(run.stack).items() if "services.forwarder" in command]
    os.kill(pid, signal.SIGKILL)


def by_stop(run: Run) -> None:
    """Run `fanwire stop`."""
    code, said, errors = run.stack.run("stop")
    assert (code, errors) == (0, "")
    assert "stopped: broker.1 (pid " in said


@pytest.mark.parametrize(
    ("end", "codes"),
    [
        (by_ctrl_c, {0}),
        (by_ctrl_backslash, {-signal.SIGQUIT}),
        (by_its_window, {0}),
        (by_sigterm, {0}),
        (by_sigkill, {-signal.SIGKILL}),
        (by_a_service, {-signal.SIGKILL, 256 - signal.SIGKILL}),
        (by_stop, {0}),
    ],
)
def test_nothing_is_left(stack: Stack, end: Callable[[Run], None], codes: set[int]) -> None:
    """A run that is ended by anything ends all of its services, and leaves no process and no socket."""
    with running(stack, [*FEW]) as run:
        run.wait_until_ready("broker", "forwarder")
        end(run)
        assert run.process.wait(PATIENCE_SECONDS) in codes, run.read()
        wait_until(lambda: not processes(stack), lambda: f"all have ended: {processes(stack)}")
    assert not [path for path in stack.bus.iterdir() if path.is_socket()]


def test_stop_waits_for_what_is_not_heard(stack: Stack) -> None:
    """A service of the run stands still, with its port: `fanwire stop` returns once it is gone, and the run."""
    with running(stack, [*RUN, "--only", "broker", "gateway"]) as run:
        run.wait_until_ready("broker", "gateway")
        (pid,) = [pid for pid, command in processes(stack).items() if "services.gateway" in command]
        os.kill(pid, signal.SIGSTOP)
        by_stop(run)
        with socket.socket() as successor:
            successor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            successor.bind(("127.0.0.1", 5000))
            successor.listen()
        assert run.process.poll() is not None


@pytest.mark.parametrize("pressed", [True, False])
def test_output_that_is_piped_may_end_first(stack: Stack, pressed: bool) -> None:
    """Ctrl-C ends `fanwire run | tee log` whole, and so does the end of what reads the output."""
    reader = "tee log" if pressed else "head -n 3 > log"
    shell = ["sh", "-c", f'"$@" | {reader}', "sh", *FEW]
    with running(stack, shell) as run:
        log = stack.directory / "log"
        if pressed:
            wait_until(lambda: log.exists() and log.read_text().count('"ready"') == 2, "both are ready")
            by_ctrl_c(run)
        run.process.wait(PATIENCE_SECONDS)
        wait_until(lambda: not processes(stack), lambda: f"all have ended: {processes(stack)}")
    assert "Traceback" not in run.read() + log.read_text()


def test_make_run_runs_everything_and_says_what_to_try(stack: Stack) -> None:
    """`make run` starts all services and prints what to try; a second one says what runs, since when, and the cure."""
    if not (Path(sys.prefix) / "bin" / "fanwire").exists():
        pytest.skip("fanwire is not installed in this environment")
    make = ["make", "-C", str(CHECKOUT), "--old-file=.venv/installed", f"VENV={sys.prefix}", "run"]
    with running(stack, make) as run:
        wait_until(lambda: "all ready: broker gateway ingest" in run.read(), lambda: f"all are ready: {run.text}")
        wait_until(lambda: "nc -N 127.0.0.1 5000" in run.read(), lambda: f"it says what to try: {run.text}")
        run.wait_until_ready("console")
        code, _, said = stack.run("run")
        assert code == 73
        assert "fanwire is running already" in said
        assert "broker.1 (pid " in said
        assert "`fanwire stop` ends it" in said
        by_ctrl_c(run)
        run.process.wait(PATIENCE_SECONDS)
        wait_until(lambda: not processes(stack), lambda: f"all have ended: {processes(stack)}")


def test_each_worker_has_its_number(stack: Stack) -> None:
    """`--ingest 2` starts two workers, which the bus knows by number; `--only` leaves the others out."""
    with running(stack, [*RUN, "--only", "broker", "ingest", "--ingest", "2"]) as run:
        run.wait_until_ready("broker", "ingest.1", "ingest.2")
        code, said, _ = stack.run("stop")
        assert code == 0
        assert re.findall(r"([a-z]+\.\d)", said) == ["broker.1", "ingest.1", "ingest.2"]


IGNORING = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


@pytest.fixture
def played(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A gateway, for who looks at its command line, that ignores SIGTERM; it is all that is heard on the bus."""
    stack.by_exec = True  # its command line is looked at
    process = stack.spawn("gateway", [sys.executable, "-c", IGNORING, "gateway"])
    process.wait_for("up")
    report = Report("gateway.1", 1, process.process.pid, time.time_ns(), 1, 0.0, {})
    monkeypatch.setattr(run, "_running", lambda _: [report])
    monkeypatch.setattr(run, "STOP_SECONDS", 0.1)
    return process


def refusal(settings: Settings | None = None) -> str:
    """Return the reason for which `fanwire stop` ends nothing."""
    with pytest.raises(OperatorError) as refused:
        run.stop(Namespace(), settings or Settings())
    return str(refused.value)


def test_stop_names_what_it_cannot_end(stack: Stack, played: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not end, is systemd's, or no process here, is named with what to do."""
    name, read_text = f"gateway.1 (pid {played.process.pid})", Path.read_text
    assert refusal() == f"{name} does not end; see its log"
    groups = "0::/system.slice/fanwire-gateway.service\n"
    with monkeypatch.context() as patched:
        patched.setattr(
            Path, "read_text", lambda path, **how: groups if path.name == "cgroup" else read_text(path, **how)
        )
        assert refusal() == f"systemd looks after {name}: systemctl stop fanwire.target"
    with monkeypatch.context() as patched:
        patched.setattr(
            Path, "read_text", lambda path, **how: "sh" if path.name == "cmdline" else read_text(path, **how)
        )
        assert refusal() == f"{name} is no process here; stop it in its own container"
    with monkeypatch.context() as patched:
        patched.setattr(os, "kill", Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted")))
        assert refusal() == f"{name} belongs to the user with id {os.geteuid()}; stop it as that user"
    assert played.process.poll() is None
    played.process.kill()


SLEEPING = "import time; time.sleep(600)"
MANAGER = f"""
import os, signal, subprocess, sys
os.environ["{MANAGER_PID}"] = str(os.getpid())
started = [subprocess.Popen([sys.executable, "-c", "{SLEEPING}", name]) for name in sys.argv[1:]]
signal.signal(signal.SIGTERM, lambda *_: [each.terminate() for each in started])
print(*(each.pid for each in started), flush=True)
codes = [each.wait() for each in started]
"""


def report_of(service: str, pid: int) -> Report:
    """A report of a process."""
    return Report(f"{service}.1", pid, pid, time.time_ns(), 1, 0.0, {})


def hear(monkeypatch: pytest.MonkeyPatch, *reports: list[Report]) -> None:
    """Let these be heard on the bus, one list after the other."""
    heard = iter(reports)
    monkeypatch.setattr(run, "_running", lambda _: next(heard))


def test_stop_ends_what_was_started_by_hand_beside_a_run(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `fanwire run` gets one SIGTERM, and so does each service that belongs to none; others get none.

    Of the transmitter nobody may read to which run it belongs, but whose child it is.
    """
    read_text = Path.read_text
    by_hand = subprocess.Popen([sys.executable, "-c", SLEEPING, "ingest"])
    with subprocess.Popen([sys.executable, "-c", MANAGER, "gateway", "transmitter"], stdout=subprocess.PIPE) as manager:
        assert manager.stdout
        gateway, transmitter = map(int, manager.stdout.readline().split())

        def unreadable(path: Path, **how: str) -> str:
            if path == Path(f"/proc/{transmitter}/environ"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return read_text(path, **how)

        monkeypatch.setattr(Path, "read_text", unreadable)
        named = {"gateway": gateway, "ingest": by_hand.pid, "transmitter": transmitter}
        wait_until(
            lambda: all(name in Path(f"/proc/{pid}/cmdline").read_text() for name, pid in named.items()), "all run"
        )
        hear(monkeypatch, [report_of(name, pid) for name, pid in named.items()])
        asked, send = [], signal.pidfd_send_signal

        def note(descriptor: int, number: signal.Signals) -> None:
            facts = dict(line.split(":") for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines())
            asked.append((int(facts["Pid"]), number))
            send(descriptor, number)

        monkeypatch.setattr(signal, "pidfd_send_signal", note)
        assert run.stop(Namespace(), Settings()) == 0
        assert sorted(asked) == sorted((pid, signal.SIGTERM) for pid in (manager.pid, by_hand.pid))
        assert manager.wait(PATIENCE_SECONDS) == 0
        assert by_hand.wait(PATIENCE_SECONDS) == -signal.SIGTERM


@pytest.mark.parametrize("waited_for", [True, False])
def test_what_has_ended_by_itself_needs_no_stop(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], waited_for: bool
) -> None:
    """A service that ends after its last report, be it gone or still a zombie, is one that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", "", "console"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | (0 if waited_for else os.WNOWAIT))
    live = subprocess.Popen([sys.executable, "-c", SLEEPING, "ingest"])
    wait_until(lambda: "ingest" in Path(f"/proc/{live.pid}/cmdline").read_text(), "it runs")
    heard = [report_of("console", ended.pid), report_of("ingest", live.pid)]
    hear(monkeypatch, heard, heard[1:])
    assert run.stop(Namespace(), Settings()) == 0
    assert f"stopped: console.1 (pid {ended.pid}" in capsys.readouterr().out
    assert live.wait(PATIENCE_SECONDS) == -signal.SIGTERM
    ended.wait()


def test_stop_needs_services_on_this_host(stack: Stack) -> None:
    """Without a broker nothing runs; services of a bus on another host are stopped there."""
    code, _, said = stack.run("stop")
    assert (code, said) == (
        69,
        f"fanwire stop: nothing runs on {stack.bus}; name the settings of what runs by --config\n",
    )
    far = Settings(bus=Bus(connect="tcp://192.0.2.1:7000", keys="keys"))
    assert refusal(far) == "the bus is on another host, tcp://192.0.2.1:7000: stop it there"

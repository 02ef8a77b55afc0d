"""Runs the product's real processes for a test, and ends them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Final, Self

from tests.once import CHECKOUT as CHECKOUT
from tests.warm_start import PROGRAMS, Process, WarmStart

DRAIN_SECONDS = 10.0
"""Time within which every process ends when told to, on a machine that has a third of its time for it: honcho kills
after five seconds."""
PATIENCE_SECONDS = 60.0
"""Time that a test waits for what has to come: enough for a busy machine, since only failures take it."""

PATIENT = "[gateway]\nserve_seconds = 10\n"
"""For who signs up and expects that copies flow with the answer, however busy the machine."""


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], str], seconds: float = PATIENCE_SECONDS
) -> None:
    """Poll until `condition()` is true; AssertionError with `what`, as of then, when it does not become so."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < seconds, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(min(max(0.01, waited / 20), 0.05))  # what takes long is looked at less often


FORKED: Final = {(sys.executable, str(CHECKOUT)): PROGRAMS}
"""Programs that are started by a fork, by interpreter and directory."""


@cache
def warm_start(interpreter: str, checkout: str) -> WarmStart:
    """Return the process that forks, begun when it is first asked for."""
    return WarmStart(interpreter, checkout, FORKED[interpreter, checkout])


def find_warm_start(command: Sequence[str], environment: Mapping[str, str]) -> WarmStart | None:
    """Return what forks if a command, started here and now, would find in a fork what it finds by exec; else None."""
    chosen = command[0], environment.get("PYTHONPATH", "")
    found = warm_start(*chosen) if chosen in FORKED else None
    return found if found and found.serves(command, environment) else None


def start(
    command: Sequence[str],
    streams: Sequence[int],
    environment: Mapping[str, str],
    directory: Path,
    by_exec: bool = False,
) -> Process:
    """Start a command with these descriptors as standard input, output and error; by a fork where that is as good."""
    if not by_exec and (found := find_warm_start(command, environment)):
        return found.start(command, environment, directory, streams)
    stdin, stdout, stderr = streams
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=environment, cwd=directory)


@dataclass
class Running:
    """A process under test; its stdout and stderr go to one file."""

    name: str
    process: Process
    output: Path

    @property
    def text(self) -> str:
        """Everything it has printed so far."""
        return self.output.read_text()

    @property
    def log(self) -> list[dict[str, Any]]:
        """Its log entries."""
        lines = self.text.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def events(self, event: str) -> list[dict[str, Any]]:
        """Its log entries of that event."""
        return [line for line in self.log if line.get("event") == event]

    def wait_for(self, text: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until it has printed `text`."""
        wait_until(
            lambda: text in self.text,
            lambda: f"{self.name} prints {text!r}; it printed {self.text[-2000:]!r}",
            seconds,
        )

    @property
    def reloads(self) -> list[dict[str, Any]]:
        """Return its lines on each SIGHUP, from the last ones."""
        said = ("reloaded", "not reloaded", "nothing to reload")
        return [line for line in self.log if line.get("event", "").startswith(said)]

    def reload(self) -> dict[str, Any]:
        """Send SIGHUP and return what it says of that."""
        before = len(self.reloads)
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(self.reloads) > before, lambda: f"{self.name} heeds SIGHUP: {self.text[-2000:]}")
        return self.reloads[before]

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = PATIENCE_SECONDS) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def resident_mb(self, field: str = "VmRSS") -> float:
        """Resident memory, MB; the most there ever was for the field VmHWM (proc(5), status)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{field}:")[2].split()[0]) / 1024

    def forget_peak(self) -> float:
        """Begin the most resident memory anew (proc(5), clear_refs); return what it is now, MB.

        A transmitter's is root's alone to begin anew: for others what it has been so far.
        """
        try:
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        except PermissionError:
            return self.resident_mb("VmHWM")
        return self.resident_mb()

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Stack:
    """Starts services by name, with settings from the test."""

    def __init__(self, directory: Path, settings: str = "") -> None:
        self.directory = directory
        self.bus = directory / "bus"
        self.running: list[Running] = []
        self.interpreter, self.program = [sys.executable], CHECKOUT
        self.by_exec = False
        """Set it where command lines are looked at: one that was forked has that of `tests.warm_start`."""
        self.configure(settings)

    def configure(self, settings: str) -> None:
        """Write the settings that processes started from now on read."""
        (self.directory / "fanwire.toml").write_text(f'[bus]\ndirectory = "{self.bus}"\n{settings}')

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process: these settings, this checkout, and nothing of honcho's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FANWIRE_", "HONCHO_"))}
        return {
            **kept,
            "FANWIRE_CONFIG": str(self.directory / "fanwire.toml"),
            "PYTHONPATH": str(self.program),
            "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', '')}",
        }

    def spawn(self, name: str, command: list[str], **environment: str) -> Running:
        """Start any command."""
        output = self.directory / f"{name}.{len(self.running)}.log"
        with output.open("wb") as file, Path(os.devnull).open("rb") as nothing:
            streams = nothing.fileno(), file.fileno(), file.fileno()
            process = start(command, streams, self.environment | environment, self.directory, self.by_exec)
        running = Running(name, process, output)
        self.running.append(running)
        return running

    def start(self, name: str, *arguments: str, ready: bool = True) -> Running:
        """Start a service, `ingest` or `ingest.2`, and wait until it says that it is ready."""
        service, _, number = name.partition(".")
        command = [*self.interpreter, "-m", f"services.{service}", *arguments]
        running = self.spawn(name, command, HONCHO_PROCESS_NAME=f"{service}.{number or 1}")
        if ready:
            wait_until(
                lambda: running.events("ready") or running.process.poll() is not None,
                lambda: f"{name} ready: {running.text}",
            )
            assert running.process.poll() is None, f"{name} ended: {running.text}"
        return running

    def start_all(self, ingest: int = 1) -> None:
        """Start broker, gateway, forwarder and so many ingest workers."""
        for name in ("broker", "gateway", "forwarder", *(f"ingest.{number + 1}" for number in range(ingest))):
            self.start(name)

    def operator(self, *arguments: str) -> Running:
        """Start an operator command, such as `watch`."""
        return self.spawn("".join(arguments[:1]) or "fanwire", [sys.executable, "-m", "services.operator", *arguments])

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run an operator command to its end; return its exit code, standard output and standard error."""
        command = [sys.executable, "-m", "services.operator", *arguments]
        with TemporaryFile() as out, TemporaryFile() as err, Path(os.devnull).open("rb") as nothing:
            streams = nothing.fileno(), out.fileno(), err.fileno()
            code = start(command, streams, self.environment, self.directory, self.by_exec).wait(PATIENCE_SECONDS)
            out.seek(0)
            err.seek(0)
            return code, out.read().decode(), err.read().decode()

    def __getitem__(self, name: str) -> Running:
        return next(running for running in reversed(self.running) if running.name == name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for running in reversed(self.running):
            if running.process.poll() is None:
                running.process.terminate()
        for running in reversed(self.running):
            try:
                running.process.wait(6)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        if error is not None:
            for running in self.running:
                print(f"--- {running.name} exited {running.process.returncode}\n{running.text[-4000:]}")


def ask(request: bytes, port: int = 5000, host: str = "127.0.0.1", seconds: float = PATIENCE_SECONDS) -> bytes:
    """Send `request` to the gateway, say that no more comes, and return all it answers."""
    with socket.create_connection((host, port), timeout=seconds) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def ask_json(request: dict[str, Any], port: int = 5000, host: str = "127.0.0.1") -> dict[str, Any]:
    """Send one JSON line and return the answer to it."""
    answer: dict[str, Any] = json.loads(ask(json.dumps(request).encode() + b"\n", port, host))
    return answer


def flows_to(name: str, port: int = 5000, host: str = "127.0.0.1") -> bool:
    """Return whether copies flow to a collector, as the gateway's list tells."""
    return ask_json({"op": "list"}, port, host)["clients"][name]["health"] not in ("fresh", "waiting")


def sign_up(request: dict[str, Any], port: int = 5000, host: str = "127.0.0.1") -> dict[str, Any]:
    """Sign a collector up, and wait until copies flow to it; return its entry as the gateway's answer shows it.

    The gateway answers at once while it has not heard of a service that sends such copies. One that has just begun may
    be ready before the gateway has heard of it, and what is sent then is not owed to the collector.
    """
    answer: dict[str, Any] = {}

    def is_signed_up() -> bool:
        answer.update(ask_json({"op": "register"} | request, port, host))
        return bool(answer["ok"])

    wait_until(is_signed_up, lambda: f"{request['name']} is signed up: {answer}")
    wait_until(lambda: flows_to(request["name"], port, host), f"copies flow to {request['name']}")
    entry: dict[str, Any] = answer["client"]
    return entry

"""Starts the product's programs by a fork of a process that has imported them, which costs a tenth of an exec.

What runs is what `python -m services.NAME` runs: the same module as `__main__`, with its own arguments, environment,
directory, output and signals. Where a program would find something else than this process has (another network
namespace, other privileges or limits, another interpreter or locale), it is started by exec instead; so are those whose
memory or command line a test looks at.
"""

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

PRELOADED: Final = (
    "services.broker.__main__",
    "services.gateway.__main__",
    "services.ingest.__main__",
    "services.forwarder.__main__",
    "services.operator.__main__",
)
PROGRAMS: Final = frozenset(name.removesuffix(".__main__") for name in PRELOADED)
READ_AT_START: Final = ("PYTHON", "LANG", "LC_", "OPENBLAS")
"""Beginnings of variables that the interpreter, or a library, reads before any of our code runs."""
INHERITED: Final = ("Uid", "Gid", "Groups", "Umask", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
                    "Seccomp", "SigIgn", "SigBlk", "Cpus_allowed")  # fmt: skip
"""Attributes that a process has from the one that starts it, as proc(5) names them."""


class Process(Protocol):
    """The part of subprocess.Popen that tests use, whichever way the process was started."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return its exit code, minus the number of the signal that ended it, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code when it has ended; subprocess.TimeoutExpired after so many seconds."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal, unless it has ended."""

    def terminate(self) -> None:
        """Send it SIGTERM."""

    def kill(self) -> None:
        """Send it SIGKILL."""


@dataclass(frozen=True)
class Program:
    """A program to run, and its surroundings."""

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    directory: str


class _Forked:
    """A program that was forked: its pid is watched by a descriptor, its exit code comes by a pipe."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._take()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self._take()
        assert self.returncode is not None
        return self.returncode

    def _take(self) -> None:
        said = os.read(self._status, 8)
        os.close(self._status)
        assert said, "the process that forks for tests has ended"
        self.returncode = os.waitstatus_to_exitcode(int.from_bytes(said))

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)

    def __del__(self) -> None:
        if self.returncode is None:
            os.close(self._status)


class WarmStart:
    """The process that forks, as seen by tests."""

    def __init__(self, checkout: Path) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.warm_start", str(theirs.fileno())]
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # what has threads can't be forked
            self._process = subprocess.Popen(command, env=environment, cwd=checkout, pass_fds=[theirs.fileno()])
        assert self._control.recv(16) == b"ready"
        self._has, self._path = _inherited(), str(checkout)
        atexit.register(self._end)

    def serves(self, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Return whether this command, started from here and now, finds there what it would find by exec."""
        return (
            list(command[:2]) == [sys.executable, "-m"]
            and command[2] in PROGRAMS
            and environment.get("PYTHONPATH") == self._path
            and all(
                os.environ.get(name) == environment.get(name)
                for name in environment.keys() | os.environ.keys()
                if name.startswith(READ_AT_START) and name != "PYTHONPATH"
            )
            and _inherited() == self._has
        )

    def start(self, program: Program, streams: Sequence[int]) -> Process:
        """Start it with these descriptors as standard input, output and error."""
        ours, theirs = os.pipe()
        request = json.dumps(vars(program), default=dict).encode()
        try:
            socket.send_fds(self._control, [request], [*streams, theirs])
            return _Forked(int(self._control.recv(16)), ours)
        finally:
            os.close(theirs)

    def _end(self) -> None:
        self._control.close()
        self._process.wait()


def _inherited() -> dict[str, Any]:
    """Return the attributes that a program started now would have from this thread."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        **{name: status[name] for name in INHERITED},
        "net": Path("/proc/thread-self/ns/net").stat().st_ino,
        **{name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")},
    }


def _serve(control: socket.socket) -> Program | None:
    """Fork for each request; return what to run in what was forked, and None here when no more is asked for."""
    poll, running = select.poll(), dict[int, tuple[int, int]]()
    poll.register(control, select.POLLIN)
    control.send(b"ready")
    while True:
        for ready, _ in poll.poll():
            if ready != control.fileno():
                pid, status = running.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                with suppress(BrokenPipeError):  # the test has not asked to the end
                    os.write(status, os.waitpid(pid, 0)[1].to_bytes(8))
                os.close(status)
                continue
            request, descriptors, _, _ = socket.recv_fds(control, 1 << 17, 4)
            if not request:
                return None
            *streams, status = descriptors
            pid = os.fork()
            if pid == 0:
                control.close()
                for number, descriptor in enumerate(streams):
                    os.dup2(descriptor, number)
                os.closerange(3, max([*descriptors, *running, *(status for _, status in running.values())]) + 1)
                return Program(**json.loads(request))
            control.send(b"%d" % pid)
            for descriptor in streams:
                os.close(descriptor)
            watched = os.pidfd_open(pid)
            running[watched] = pid, status
            poll.register(watched, select.POLLIN)


def _main(control: int) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
        del sys.modules[name]  # runs again, as __main__
    for name in sorted(set(COMMANDS.values())):
        importlib.import_module(f"services.operator.{name}")
    gc.collect()
    gc.freeze()
    program = _serve(socket.socket(fileno=control))
    if program is not None:
        os.environ.clear()
        os.environ.update(program.environment)
        os.chdir(program.directory)
        sys.argv[1:] = program.arguments
        runpy.run_module(program.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from services.operator.__main__ import COMMANDS

    _main(int(sys.argv[1]))

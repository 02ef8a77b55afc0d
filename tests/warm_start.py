"""Starts the product's programs by a fork of a process that has imported them, which costs a tenth of an exec.

What runs is what `python -m services.NAME` runs: the same module as `__main__`, with its own arguments, environment,
directory, output and signals, in the network namespace and with the capabilities of the thread that starts it. Where a
program would find something else than this process has (another user, other limits, another interpreter or locale), it
is started by exec instead; so are those whose memory or command line a test looks at.
"""

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn, Protocol
from zlib import crc32

import msgspec

from tests.capabilities import ambient, keep_only
from tests.lab import enter_network
from tests.once import made_once, run

OPENED: Final = ("services.offload", "services.transmitter")
"""Services that begin with an opener."""
PROGRAMS: Final = (
    *(f"services.{name}" for name in ("broker", "console", "forwarder", "gateway", "ingest", "journal", "operator")),
    "services.uplink",
    *OPENED,
    "tests.refusing",
    "tests.services.gateway.clocked",
    "tests.services.gateway.crowd",
    "tests.system.checked_sink",
    "tests.traffic",
)
IMPORTED_LATER: Final = {
    "services.broker": ("encodings.idna", "encodings.utf_8_sig"),
    "services.console": ("services.console.server", "uvicorn.lifespan.off"),
    "services.gateway": ("services.gateway.cluster.member",),
    "services.uplink": ("services.uplink.service",),
    "services.journal": ("services.journal.service",),
    "services.operator": ("rich.table",),
    "services.offload": (
        "services.offload.opener",
        "services.offload.applying.applier",
        "services.offload.unprivileged",
    ),
    "services.transmitter": ("services.transmitter.opener", "services.transmitter.unprivileged"),
}
"""Modules that a program imports when it has begun; for the operator, each command has its own."""
READ_AT_START: Final = ("PYTHON", "LANG", "LC_", "OPENBLAS")
"""Beginnings of variables that the interpreter, or a library, reads before any of our code runs."""
INHERITED: Final = ("Uid", "Gid", "Groups", "Umask", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "SigIgn",
                    "SigBlk", "Cpus_allowed")  # fmt: skip
"""Attributes that a process has from the one that starts it, as proc(5) names them."""
COMMAND: Final = "import sys; sys.path.append(sys.argv[1]); from tests.warm_start import main; sys.path.pop(); main()"
"""Runs `main` with the checkout's tests/, and with programs from elsewhere if PYTHONPATH says so."""
PROGRAMS_VARIABLE: Final = "FANWIRE_TESTS_PROGRAMS"
"""Names the programs to import; on its command line others would take them for services."""
SOCKET, INHERITED_BY_IT = "socket", "inherited"
"""Files of the process that forks: tests ask there, and read what it has from the one that started it."""


lasting: Final[list[int]] = []
"""Descriptors that stay open as long as this process: those by which others are told to fork."""
_begun: Final[list[subprocess.Popen[bytes]]] = []
"""Processes that fork, begun here; they outlast this one if other workers of the run still use them."""


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
    """Its name; empty for a script, which is the first argument, as after `-c`."""
    arguments: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    capabilities: int | None = None
    """Those that an exec would leave it; None for root, which keeps what it has."""


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
    """The process that forks, as seen by tests: an interpreter that has imported programs from a directory.

    All workers of a run share it; the first that asks for it starts it, and it ends with the run.
    """

    def __init__(self, interpreter: str, checkout: str, programs: Sequence[str]) -> None:
        name = f"warm-start-{crc32(f'{interpreter} {checkout}'.encode()):x}"
        made = made_once(name, partial(_start, interpreter, checkout, programs))
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.connect(str(made / SOCKET))
        lasting.append(self._control.fileno())
        self._programs, self._has = programs, (made / INHERITED_BY_IT).read_text()
        atexit.register(self._control.close)

    def serves(self, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Return whether this command of its interpreter, started from here and now, finds what it would by exec."""
        return (
            (command[1] == "-c" or (command[1] == "-m" and command[2] in self._programs))
            and all(
                os.environ.get(name) == environment.get(name)
                for name in environment.keys() | os.environ.keys()
                if name.startswith(READ_AT_START) and name != "PYTHONPATH"
            )
            and _inherited() == self._has
        )

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], directory: Path, streams: Sequence[int]
    ) -> Process:
        """Start a program with these descriptors as standard input, output and error."""
        module, arguments = ("", command[2:]) if command[1] == "-c" else (command[2], command[3:])
        program = Program(module, arguments, environment, str(directory), _capabilities_after_exec())
        request = json.dumps(vars(program), default=dict).encode()
        ours, theirs = os.pipe()
        network = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            socket.send_fds(self._control, [request], [*streams, theirs, network])
            return _Forked(int(self._control.recv(16)), ours)
        finally:
            os.close(theirs)
            os.close(network)


def _start(interpreter: str, checkout: str, programs: Sequence[str], directory: Path) -> None:
    command = [interpreter, "-P", "-c", COMMAND, str(Path(__file__).parent.parent), str(run())]
    environment = os.environ | {"PYTHONPATH": checkout, "OPENBLAS_NUM_THREADS": "1"}  # threads don't fork
    environment[PROGRAMS_VARIABLE] = " ".join(programs)
    (directory / INHERITED_BY_IT).write_text(_inherited())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / SOCKET))
        listener.listen()
        with ambient() if os.geteuid() else nullcontext():  # to enter other network namespaces
            _begun.append(subprocess.Popen(command, env=environment, stdin=listener.fileno()))


def _status() -> dict[str, str]:
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)


def _inherited() -> str:
    """Return the attributes that a program started now would have from this thread, apart from what it is told."""
    status = _status()
    has = {
        **{name: status[name] for name in (*INHERITED, *(() if os.geteuid() else ("CapInh", "CapAmb")))},
        **{name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")},
    }
    return json.dumps(has)


def _capabilities_after_exec() -> int | None:
    return int(_status()["CapAmb"], 16) if os.geteuid() else None


def _serve(listener: socket.socket, run: int) -> Program | None:
    """Fork for each request; return what to run in what was forked, and None here when the run has ended."""
    poll, running, controls = select.poll(), dict[int, tuple[int, int]](), dict[int, socket.socket]()
    for each in (listener.fileno(), run):
        poll.register(each, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == run:
                return None
            if ready == listener.fileno():
                control, _ = listener.accept()
                controls[control.fileno()] = control
                poll.register(control, select.POLLIN)
                continue
            if ready in running:
                pid, status = running.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                with suppress(BrokenPipeError):  # the test has not asked to the end
                    os.write(status, os.waitpid(pid, 0)[1].to_bytes(8))
                os.close(status)
                continue
            control = controls[ready]
            request, descriptors, _, _ = socket.recv_fds(control, 1 << 17, 5)
            if not request:  # this worker has ended
                poll.unregister(ready)
                controls.pop(ready).close()
                continue
            *streams, status, network = descriptors
            pid = os.fork()
            if pid == 0:
                for ours in (listener, *controls.values()):
                    ours.close()
                if os.fstat(network).st_ino != Path("/proc/self/ns/net").stat().st_ino:
                    enter_network(network)
                for number, descriptor in enumerate(streams):
                    os.dup2(descriptor, number)
                os.closerange(3, max([run, *descriptors, *running, *(status for _, status in running.values())]) + 1)
                return Program(**json.loads(request))
            control.send(b"%d" % pid)
            for descriptor in (*streams, network):
                os.close(descriptor)
            watched = os.pidfd_open(pid)
            running[watched] = pid, status
            poll.register(watched, select.POLLIN)


def _import(programs: Sequence[str]) -> None:
    mains = {name: f"{name}.__main__" if name.startswith("services.") else name for name in programs}
    for name, main in mains.items():
        loaded = importlib.import_module(main)
        for module in IMPORTED_LATER.get(name, ()):
            importlib.import_module(module)
        for command in sorted(set(getattr(loaded, "COMMANDS", {}).values())):
            importlib.import_module(f"{name}.{command}")
    for main in mains.values():
        del sys.modules[main]  # runs again, as __main__
    kinds: list[type[msgspec.Struct]] = [msgspec.Struct]
    for kind in kinds:  # each process would look at the fields of those that it uses: a quarter of what a start costs
        kinds += kind.__subclasses__()
        with suppress(TypeError):  # of a message that is only ever written
            msgspec.json.Decoder(kind)


class _Replaced(BaseException):
    """An opener has ended, and its service begins in its place: arguments and environment."""


_fork_exec: Final = vars(subprocess)["_fork_exec"]
_ended: Final[list[_Replaced]] = []
"""Keeps what the opener referred to: sockets, which are now the service's, would be closed otherwise."""


def _replace(path: str, command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Do in the opener's process what its execve(2) does there: see to `_run`."""
    interpreter, isolated, _, *arguments = command
    assert (path, interpreter, isolated) == (sys.executable, sys.executable, "-I")
    raise _Replaced(arguments, environment)


def _spawn(path: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Do in the place of the opener's posix_spawn(3)."""
    return os.fork() or _replace(path, command, environment)


def _run(program: Program) -> None:
    """Become the program, until it ends."""
    if program.capabilities is not None:
        keep_only(program.capabilities)
    os.chdir(program.directory)
    if program.module in OPENED:
        vars(os).update(execve=_replace, posix_spawn=_spawn)
    try:
        _execute(program.module, program.arguments, program.environment)
    except _Replaced as replaced:
        _ended.append(replaced)
    if _ended:
        for entry in list(Path("/proc/self/fd").iterdir()):
            with suppress(OSError):  # the listing's own is closed by now
                if not os.get_inheritable(int(entry.name)):
                    os.close(int(entry.name))
        _execute(program.module, *_ended[0].args)


def _run_to_the_end(program: Program) -> None:
    """Become the program, and end as the interpreter does, but without freeing objects one by one.

    That is two thirds of what a start costs. An end with a word, a bug, or output that can't be written is left to the
    interpreter.
    """
    code = 0
    try:
        _run(program)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        code = ended.code or 0
    vars(threading)["_shutdown"]()  # waits for the other threads
    vars(atexit)["_run_exitfuncs"]()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)
    sys.exit(code)


def _execute(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if module:
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        script, *sys.argv[1:] = arguments
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(script, "<string>", "exec"), vars(sys.modules["__main__"]))


def _fork_program(
    args: Sequence[str], executables: Sequence[bytes], close_fds: bool, kept: Any, cwd: Any, env: Any, *more: Any
) -> int:
    """Do in the place of subprocess's fork and exec, for programs that a command starts: it has imported them too."""
    interpreter, *options, program = (*map(os.fsdecode, args[:4]), "")[:4]
    if (interpreter, *options) != (sys.executable, "-P", "-m") or program not in PROGRAMS or env is None:
        pid: int = _fork_exec(args, executables, close_fds, kept, cwd, env, *more)
        return pid
    stdin, _, _, stdout, _, stderr = more[:6]
    pid = os.fork()
    if pid:
        return pid
    for number, descriptor in enumerate((stdin, stdout, stderr)):
        if descriptor >= 0:
            os.dup2(descriptor, number)
    os.closerange(3, 1 << 10)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
    environment = dict(os.fsdecode(each).split("=", 1) for each in env)
    try:
        _run_to_the_end(Program(program, [*map(os.fsdecode, args[4:])], environment, "."))
    finally:
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    """Import the programs that are named first, then run one of them in each fork that is asked for."""
    listener = socket.socket(fileno=0)
    programs = os.environ.pop(PROGRAMS_VARIABLE).split()
    _import(programs)
    gc.collect()
    gc.freeze()
    if "services.operator" in programs:
        vars(subprocess)["_fork_exec"] = _fork_program
    if program := _serve(listener, os.pidfd_open(int(sys.argv[2]))):
        _run_to_the_end(program)

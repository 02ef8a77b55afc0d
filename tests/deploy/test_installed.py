"""The units' commands from an installed wheel, under the units' own sandbox as far as there is one without systemd."""

import ctypes.util
import os
import pwd
import shlex
import signal
import socket
import subprocess
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.capabilities import ambient
from tests.deploy import confined
from tests.deploy.test_units import INSTALLED, SERVICES, UNITS, lines, need
from tests.once import wheel
from tests.stack import Running, Stack, sign_up, wait_until

BROKER = UNITS / "fanwire-broker.service"
PRIVILEGED = (UNITS / "fanwire-transmitter.service", UNITS / "fanwire-offload.service")


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that every user can get to."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="module")
def python(public: Path) -> Path:
    """The interpreter of a fresh environment with the built wheel in it; the dependencies are this environment's."""
    venv.create(public / "fanwire", symlinks=True)
    (packages,) = public.glob("fanwire/lib/python*/site-packages")
    zipfile.ZipFile(wheel()).extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return public / "fanwire" / "bin" / "python"


@pytest.fixture(scope="module")
def user(python: Path) -> pwd.struct_passwd | None:
    """Return the user that root runs the services as; None: we are not root, or no other can use the interpreter."""
    if os.geteuid():
        return None
    nobody = pwd.getpwnam("nobody")
    probe = [str(python), "-I", "-c", "import sys, zmq; open(sys.argv[1])", confined.__file__]
    command = [*identity(BROKER, nobody), "sh", "-c", 'exec "$0" "$@"', *probe]
    return None if subprocess.run(command, capture_output=True, check=False).returncode else nobody


def identity(unit: Path, user: pwd.struct_passwd | None) -> list[str]:
    """Return a command that keeps the unit's capabilities and no others, and becomes `user` if there is one."""
    only = ",".join(["-all", *(name.lower().replace("cap_", "+") for name in lines(unit, "AmbientCapabilities"))])
    who = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"] if user else []
    if not user and os.geteuid() == 0:
        who = ["--securebits=+noroot"]
    return ["setpriv", *who, f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}"]


def test_services_run_installed_and_confined(
    stack: Stack, public: Path, python: Path, user: pwd.struct_passwd | None
) -> None:
    """From the wheel, under their units' system calls, families and capabilities, all services start, serve and drain.

    What lies in the directory they are started in, or on PYTHONPATH, is not imported.
    """
    need("systemd-analyze")
    need("setpriv")
    if ctypes.util.find_library("seccomp") is None:
        pytest.skip("libseccomp is not here")
    for name in ("fanwire", "services", "shared", "numpy", "zmq"):
        (stack.directory / f"{name}.py").write_text("raise SystemExit('imported from the wrong place')")
    (public / "fanwire.toml").write_text("")
    (public / "run").mkdir(mode=0o700)
    if user:
        os.chown(public / "run", user.pw_uid, user.pw_gid)
    units = [BROKER, *(unit for unit in SERVICES if unit != BROKER)]
    if os.geteuid() == 0 and not user:
        units = [unit for unit in units if unit not in PRIVILEGED]  # they would not stay root
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter,
    ):
        manager.bind(str(public / "notify"))
        (public / "notify").chmod(0o777)
        for unit in units:
            (command,) = lines(unit, "ExecStart")
            sandbox = [str(python), "-I", confined.__file__, str(unit)]
            start(
                stack,
                unit.stem,
                [*identity(unit, user), *sandbox, *shlex.split(command.replace(INSTALLED, str(python)))],
                FANWIRE_CONFIG=str(public / "fanwire.toml"),
                RUNTIME_DIRECTORY=str(public / "run"),
                NOTIFY_SOCKET=manager.getsockname(),
                PYTHONPATH=str(stack.directory),
                OPENBLAS_NUM_THREADS="1",
            )
            assert manager.recv(100) == b"READY=1"
        for sock in (collector, exporter):
            sock.settimeout(60)
        collector.bind(("127.0.0.1", 0))
        port = collector.getsockname()[1]
        sign_up({"name": "c", "streams": ["messages"], "port": port})
        exporter.sendto(b"Hello", ("127.0.0.1", 6667))
        assert collector.recv(100) == b"Hello"
        assert exporter.recv(100) == b"Got your message!"
    for running in reversed(stack.running):
        assert_powerless(running)
        assert running.stop(signal.SIGTERM) == 0, running.text


def start(stack: Stack, name: str, command: list[str], **environment: str) -> None:
    """Start a service by its whole command, and wait until it is ready."""
    with ambient():
        running = stack.spawn(name, command, **environment)
    wait_until(lambda: running.events("ready") or running.process.poll() is not None, f"{name} ready: {running.text}")
    assert running.process.poll() is None, f"{name} ended: {running.text}"


def assert_powerless(running: Running) -> None:
    """By the time it serves, a service holds no capability and can't gain any."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    held = dict(line.split(":\t") for line in status.splitlines() if line.startswith(("Cap", "NoNewPrivs")))
    assert held["NoNewPrivs"] == "1"
    assert not any(int(held[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")), running.name

"""Starts the opener for a test, as root or as a plain user, from a copy that everybody can read."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from shared.process.privileges import outside_uid
from tests.capabilities import with_net_raw
from tests.stack import CHECKOUT

NOBODY: Final = 65534
PR_SET_KEEPCAPS: Final = 8
MODULES: Final = ("__init__", "__main__", "opener", "privileges")
SHARED: Final = (
    *("shared/__init__", "shared/settings/__init__", "shared/settings/location"),
    *("shared/process/__init__", "shared/process/opener", "shared/process/privileges"),
)
STAND_IN: Final = """
import ctypes, json, os, resource, socket, sys
from services.transmitter.privileges import adopt, prove
from shared.process.privileges import own_status

def reached():
    with socket.socket(socket.AF_UNIX) as probe:
        return os.strerror(probe.connect_ex(os.environ.get("FANWIRE_BUS__DIRECTORY", "") + "/publish"))

def main(arguments):
    sockets = adopt(arguments[1])
    print(json.dumps({
        "facts": prove(sockets),
        "reason": sockets.reason,
        "buffers": [sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for sock in sockets.packet],
        "kinds": [len(sockets.packet), len(sockets.ip4), len(sockets.ip6)],
        "descriptors": len(os.listdir("/proc/self/fd")) - 1 - len(sockets),
        "bus": reached(),
        "given": arguments[2:],
        "status": own_status(),
        "pid": os.getpid(),
        "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "path": sys.path,
        "environment": dict(os.environ),
    }))
    return 0
"""
"""In the place of services.transmitter.unprivileged, which needs more than a bare interpreter."""
IS_ROOT: Final = os.geteuid() == 0 and outside_uid(NOBODY) is not None


def as_nobody() -> None:
    """For preexec_fn: root becomes a plain user; others are one."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def as_nobody_with_net_raw() -> None:
    """For preexec_fn: a plain user with CAP_NET_RAW and no other capability, as from systemd's AmbientCapabilities=."""
    ctypes.CDLL(None).prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    as_nobody()
    with_net_raw()


def readable_interpreter() -> str:
    """Return a Python that a plain user can run; skip the test where there is none, of the one or the other."""
    if os.geteuid() == 0 and not IS_ROOT:
        pytest.skip("root of this user namespace has nobody to become")
    for candidate in (sys.executable, "/usr/bin/python3"):
        command = [candidate, "-I", "-c", "import tomllib"]
        try:
            if subprocess.run(command, preexec_fn=as_nobody, capture_output=True, cwd="/", check=False).returncode == 0:
                return candidate
        except PermissionError:
            continue
    pytest.skip("needs a Python 3.11 that a plain user can read, such as Debian's python3")


class Started:
    """A copy of the opener before a stand-in for the service, and a Python to run it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.interpreter = readable_interpreter()
        package = directory / "services/transmitter"
        package.mkdir(parents=True)
        shutil.copy(CHECKOUT / "services/__init__.py", package.parent)
        for module in MODULES:
            shutil.copy(CHECKOUT / f"services/transmitter/{module}.py", package)
        for module in SHARED:
            (directory / module).parent.mkdir(exist_ok=True)
            shutil.copy(CHECKOUT / f"{module}.py", (directory / module).parent)
        (package / "unprivileged.py").write_text(STAND_IN)

    def run(
        self,
        *arguments: str,
        prefix: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        command = [*prefix, options.pop("interpreter", self.interpreter), "-m", "services.transmitter", *arguments]
        environment = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(self.directory / "run")} | (environment or {})
        return subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False, **options
        )

    def said(self, *arguments: str, **options: Any) -> dict[str, Any]:
        """Run it, and return what the stand-in found itself to be."""
        done = self.run(*arguments, **options)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@contextmanager
def started() -> Iterator[Started]:
    """A copy in a directory that everybody can enter, unlike pytest's tmp_path."""
    with tempfile.TemporaryDirectory(prefix="fanwire-test-") as name:
        Path(name).chmod(0o755)
        yield Started(Path(name))

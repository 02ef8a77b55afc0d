"""A stack whose transmitter can give up root: what runs it must be readable by the user that it becomes."""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Final

import pytest

from tests.capabilities import NET_ADMIN, NET_RAW, ambient
from tests.once import made_once
from tests.stack import CHECKOUT, FORKED, Running, Stack
from tests.warm_start import OPENED

NOBODY: Final = 65534
PACKAGES: Final = ("msgpack", "msgspec", "numpy", "pyroute2", "structlog", "zmq")
"""Packages that the transmitter imports; copied where the interpreter that has them is closed to other users."""
BUNDLED: Final = ("numpy.libs", "pyzmq.libs")
"""Shared libraries that wheels bring along."""


def _nobody_runs(*command: str) -> bool:
    """Return whether a command succeeds for a user who owns nothing."""

    def become_nobody() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)

    try:
        result = subprocess.run(command, cwd="/", preexec_fn=become_nobody, capture_output=True, check=False)
    except PermissionError:
        return False
    return result.returncode == 0


@cache
def program_for_all() -> tuple[str, Path]:
    """An interpreter, and a directory with services/ and shared/, that every user can read."""
    if os.geteuid() or _nobody_runs(sys.executable, "-I", str(CHECKOUT / "services" / "__main__.py"), "--version"):
        return sys.executable, CHECKOUT
    version = f"import sys, struct; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    interpreter = "/usr/bin/python3"
    if not _nobody_runs(interpreter, "-c", version):
        wanted = ".".join(map(str, sys.version_info[:2]))
        pytest.skip(f"needs a Python {wanted} that user nobody can read, and neither {sys.executable} nor Debian's is")
    program = made_once("program", partial(_copy_program, interpreter))
    FORKED[interpreter, str(program)] = OPENED
    return interpreter, program


def _copy_program(interpreter: str, directory: Path) -> None:
    skipped = shutil.ignore_patterns("tests", "*.pyi")
    for folder in ("services", "shared"):
        shutil.copytree(CHECKOUT / folder, directory / folder, ignore=skipped)
    for name in PACKAGES:
        package = Path(importlib.import_module(name).__file__ or "").parent
        shutil.copytree(package, directory / name, ignore=skipped)
    site = Path(importlib.import_module("numpy").__file__ or "").parent.parent
    for name in BUNDLED:
        if (site / name).exists():
            shutil.copytree(site / name, directory / name)
    # Nobody can write here: what is not compiled now would be at every start.
    subprocess.run([interpreter, "-m", "compileall", "-q", str(directory)], check=True)


CAPABILITY: Final = {"transmitter": NET_RAW, "offload": NET_ADMIN}


class OpenStack(Stack):
    """A stack with a transmitter and offload: they become nobody when root starts them, else have one capability."""

    def start(self, name: str, *arguments: str, ready: bool = True) -> Running:
        """Start a service; one that begins with a privilege so that it has that."""
        service = name.partition(".")[0]
        if service not in CAPABILITY:
            return super().start(name, *arguments, ready=ready)
        with self.opening(CAPABILITY[service]):
            return super().start(name, *arguments, ready=ready)

    @contextmanager
    def opening(self, capability: int = NET_RAW) -> Iterator[None]:
        """Let programs started meanwhile have a capability; `interpreter` and `program` are readable by everybody."""
        with self._program(), ambient(capability) if os.geteuid() else nullcontext():
            yield

    def start_without_privilege(self, name: str = "transmitter", *arguments: str, ready: bool = True) -> Running:
        """Start a service as a plain user, a transmitter as one who may not open raw sockets."""
        become = f"--reuid={NOBODY} --regid={NOBODY} --clear-groups" if os.geteuid() == 0 else "--no-new-privs"
        with self._program("setpriv", *become.split()):
            return super().start(name, *arguments, ready=ready)

    @contextmanager
    def _program(self, *prefix: str) -> Iterator[None]:
        before = self.interpreter, self.program
        (interpreter, self.program) = program_for_all()
        self.interpreter = [*prefix, interpreter]
        try:
            yield
        finally:
            self.interpreter, self.program = before


@contextmanager
def open_stack() -> Iterator[OpenStack]:
    """A stack in a directory that everybody can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="fanwire-stack-") as name:
        Path(name).chmod(0o755)
        with OpenStack(Path(name)) as running:
            yield running

"""Makes what is made once for the whole run, however many workers share it: programs for other users, the wheel."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).parent.parent
VARIABLE: Final = "FANWIRE_TESTS_MADE_ONCE"
"""Tells the workers, which inherit it, in which directory of the run's own these things lie."""
RUN: Final = "pid"
"""The file there with the process that started the run."""


def begin() -> None:
    """Make the directory, into which every user can look. For the process that starts the run."""
    directory = tempfile.mkdtemp(prefix="fanwire-tests-")
    Path(directory).chmod(0o755)
    Path(directory, RUN).write_text(str(os.getpid()))
    os.environ[VARIABLE] = directory


def end() -> None:
    """Remove the directory, with all that is in it. For the process that started the run."""
    shutil.rmtree(os.environ.pop(VARIABLE))


def run() -> int:
    """Return the process that started the run, and ends it."""
    return int(Path(os.environ[VARIABLE], RUN).read_text())


@contextmanager
def made_for_run() -> Iterator[None]:
    """Hold the directory meanwhile, for runs that are not pytest's."""
    begin()
    try:
        yield
    finally:
        end()


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the directory of that name; the first that asks makes it and calls `make`, others wait meanwhile."""
    made = Path(os.environ[VARIABLE], name)
    done = made.with_suffix(".done")
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(made, ignore_errors=True)  # of somebody who failed halfway
            made.mkdir(mode=0o755)
            make(made)
            done.touch()
    return made


@contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Let the first of all workers do something alone, while the others wait: what it leaves on disk serves them."""
    done = Path(os.environ[VARIABLE], f"{name}.done")
    with done.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            yield
            done.touch()
            return
    yield


def wheel() -> Path:
    """Return the wheel of this checkout."""
    (built,) = made_once("wheel", _build_wheel).glob("fanwire-*.whl")
    return built


def _build_wheel(directory: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(CHECKOUT)]
    subprocess.run([*pip, *build], check=True)

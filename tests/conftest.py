"""Moves the whole test run into a network namespace of its own before anything can send, and offers the fixtures."""

from tests.lab import enter_lab

LAB_REFUSED = enter_lab()  # before other imports: unshare(2) wants a process without threads

import gc  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
from collections.abc import Generator, Iterator, Sequence  # noqa: E402
from contextlib import ExitStack, nullcontext  # noqa: E402
from importlib.util import cache_from_source  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Final, TypeVar  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests import once, openly, processes  # noqa: E402
from tests.capabilities import raise_ambient  # noqa: E402
from tests.openly import OpenStack  # noqa: E402
from tests.stack import Stack  # noqa: E402
from tests.warm_start import lasting  # noqa: E402

# A busy machine is no reason to fail: examples may take as long as they take. Each run draws others, and what reads
# bytes from outside is fuzzed as well (`make fuzz`): half of hypothesis's hundred are enough for one run.
settings.register_profile("fanwire", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.load_profile("fanwire")

T = TypeVar("T")
LONGEST: Final = ("tests/services/gateway/cluster/", "tests/services/uplink/", "tests/system/")
"""Folders of tests that take tens of seconds."""
CHUNK: Final = 4
"""Tests that a worker is handed at a time, see `--maxschedchunk` in the Makefile."""

COMPILED_LAST: Final = Path(
    cache_from_source(str(Path(__file__).with_name("test_warm_start.py"))).removesuffix(".pyc")
    + f"-pytest-{pytest.__version__}.pyc"
)
"""The last test module, as pytest has compiled it if all have been imported once."""


# Programs under test heed signals, also when this run was started in the background or by nohup(1), which have them
# ignored by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

if os.environ.get("PYTEST_XDIST_WORKER") and os.geteuid():
    raise_ambient(0)  # what it was given to enter the lab is not for programs under test


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Let workers of a plain user enter labs of their own: they have threads, and can't make a user namespace."""
    if os.geteuid():
        raise_ambient()


def pytest_configure(config: pytest.Config) -> None:
    """Make room for what is made once for the run; workers find what the process that started them has made."""
    if not hasattr(config, "workerinput"):
        once.begin()
    processes.watch()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Let one worker import all tests before the others in a fresh clone, where each would compile all of them.

    Garbage collection would pass over all that is imported and collected again and again: a tenth of the time.
    """
    in_turn = hasattr(session.config, "workerinput") and not COMPILED_LAST.exists()
    gc.disable()
    try:
        with once.first_alone("collected") if in_turn else nullcontext():
            return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts processes, before `-m` asks; begin with what takes longest, so that workers end together."""
    processes.mark(items)
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    waiting = [item for item in items if item.get_closest_marker(processes.MARKER)]
    working = [item for item in items if not item.get_closest_marker(processes.MARKER)]
    items[:] = interleaved(waiting, working) if hasattr(config, "workerinput") else waiting + working


def interleaved(waiting: Sequence[T], working: Sequence[T]) -> Iterator[T]:
    """Yield tests that mostly wait and, spread evenly among them, those that compute: both cores always have work.

    A worker is handed `CHUNK` tests at a time: so many stay together, and with them what is made once for a module.
    """
    given = 0
    for start in range(0, len(waiting), CHUNK):
        yield from waiting[start : start + CHUNK]
        due = len(working) * (start + CHUNK) // len(waiting) // CHUNK * CHUNK
        yield from working[given:due]
        given = due
    yield from working[given:]


def pytest_collection_finish() -> None:
    """Let garbage collection pass over all that was imported and collected: each would take a tenth of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what was made for the run."""
    if not hasattr(config, "workerinput"):
        once.end()


@pytest.fixture
def lab() -> None:
    """For every test that sends: it runs in a namespace with loopback alone, or not at all."""
    if LAB_REFUSED:
        pytest.skip(f"needs a network namespace of its own, and {LAB_REFUSED}")


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """The things that a test opens; all are closed at its end."""
    with ExitStack() as everything:
        yield everything


@pytest.fixture
def stack(lab: None, tmp_path: Path) -> Iterator[Stack]:
    """Real processes on a bus directory of their own; whatever still runs at the end is ended."""
    with Stack(tmp_path) as running:
        yield running


@pytest.fixture
def small_buffers(lab: None) -> Iterator[None]:
    """Give TCP connections 64 KiB at most in the kernel: what is not read soon waits in the program."""
    limits = Path("/proc/sys/net/ipv4/tcp_wmem")
    before = limits.read_text()
    limits.write_text("4096 16384 65536")
    yield
    limits.write_text(before)


@pytest.fixture
def open_stack(lab: None) -> Iterator[OpenStack]:
    """Real processes, a transmitter with its raw sockets among them."""
    with openly.open_stack() as running:
        yield running


def _descriptors() -> int:
    """Return how many are open, apart from those that last for all tests."""
    return sum(1 for _ in os.scandir("/proc/self/fd")) - len(lasting)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """A test leaves no descriptor of its own process open, and allows itself no more than before.

    With other limits everything after it would be started by exec, see `tests.warm_start`.
    """
    before, limits = _descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits, "another limit of descriptors is left"
    after = _descriptors()
    if after > before:
        gc.collect()  # what refers to itself waits for it
        after = _descriptors()
    assert after <= before, f"{after - before} descriptors left open"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Forget what was started before this test and its fixtures, by pytest itself for instance."""
    processes.started.clear()


@pytest.fixture(autouse=True)
def no_process_unmarked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that starts a process is marked so: `make quick` leaves it out."""
    yield
    marked = request.node.get_closest_marker(processes.MARKER)
    assert marked or not processes.started, f"it starts a process: {processes.started}"

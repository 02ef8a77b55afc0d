import ctypes
import mmap
import os
from pathlib import Path

import pytest

import shared.process.memory
from shared.process.memory import LOOK_SECONDS, Memory

MB = 1 << 20


class Clock:
    """The clock of a measurement."""

    now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time stands still unless moved."""
    clock = Clock()
    monkeypatch.setattr(shared.process.memory, "time", clock)
    return clock


def resident() -> int:
    """Bytes that this process has resident, by another file of the kernel's."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) << 10


def test_short_once_the_reserve_is_touched(clock: Clock) -> None:
    """With less than the reserve left it is short, at each look again, and no more once memory was given back."""
    getattr(ctypes.CDLL(None), "malloc_trim", int)(
        0
    )  # what other tests have left would be given back in the middle of it
    memory = Memory(resident() + 64 * MB, reserve=8)
    free = memory.ceiling - memory.ceiling // 8 - resident()
    assert not memory.measure()
    with mmap.mmap(-1, free + 16 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        for page in range(0, len(taken), mmap.PAGESIZE):
            taken[page] = 1
        assert not memory.measure(), "it is not time to look yet"
        clock.now += LOOK_SECONDS
        assert memory.measure()
        assert memory.short
        clock.now += LOOK_SECONDS
        assert memory.measure()
    clock.now += LOOK_SECONDS
    assert not memory.measure()
    account = memory.account()
    assert account["memory_most"] >= account["memory"] + free
    assert account["memory_ceiling"] == memory.ceiling


def test_what_was_freed_is_not_counted(clock: Clock) -> None:
    """Memory that malloc(3) keeps though it was freed goes back to the kernel before anything is dropped for it."""
    pieces = [os.urandom(20_000) for _ in range(10_000)]
    kept = pieces[::500]
    peak = resident()
    del pieces
    memory = Memory(peak - 50 * MB, reserve=1 << 20)
    assert not memory.measure()
    assert memory.used < peak - 50 * MB
    assert kept


def test_borrowed_memory_is_the_lenders(clock: Clock) -> None:
    """Pages that are mapped together with others count for who owns them, and not for who borrows them."""
    own, borrowing = Memory(), Memory(borrows=True)
    before = own.account()["memory"], borrowing.account()["memory"]
    with mmap.mmap(-1, 32 * MB) as shared_pages:
        for page in range(0, len(shared_pages), mmap.PAGESIZE):
            shared_pages[page] = 1
        assert own.account()["memory"] - before[0] >= 32 * MB
        assert borrowing.account()["memory"] - before[1] < 16 * MB


def test_without_a_ceiling_it_is_never_short(clock: Clock) -> None:
    """Nothing is dropped where no ceiling is set."""
    assert not Memory().measure()

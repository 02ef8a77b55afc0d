import fcntl
import os
from pathlib import Path

import pytest

from shared.process.file_locks import lock_at_once


def opened(path: Path) -> int:
    """Return a new descriptor of a file."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def test_a_lock_that_another_holds_is_not_waited_for(tmp_path: Path) -> None:
    """A file that another open file has locked is refused at once, and what was opened for it is closed."""
    holder, second = lock_at_once(opened(tmp_path / "lock")), opened(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        lock_at_once(second)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)
    os.close(holder)
    os.close(lock_at_once(opened(tmp_path / "lock")))


def test_shared_locks_stand_beside_each_other(tmp_path: Path) -> None:
    """Any number may hold a shared lock on a directory, and none of them alone may have it."""
    held = [lock_at_once(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        lock_at_once(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    for descriptor in held:
        os.close(descriptor)

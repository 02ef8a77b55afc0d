"""Locks on files and directories (flock(2)), which the kernel releases when their process ends."""

import fcntl
import os
import stat
from pathlib import Path


def lock_at_once(descriptor: int, kind: int = fcntl.LOCK_EX) -> int:
    """Lock an open file or directory, and return its descriptor; close that where it can't be locked.

    BlockingIOError: another process holds a lock on it.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class KeptDirectory:
    """Holds a shared lock on a directory whose files have to stay, as far as this host lets it.

    systemd-tmpfiles lets alone what is locked (tmpfiles.d(5), Age).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def hold(self) -> None:
        """Lock the directory that is there now, unless that is done. Due every second: who cleans locks it too."""
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink:
            return
        self.close()
        try:
            if self._path.stat().st_mode & stat.S_ISVTX:
                return  # such as /tmp itself, which is everybody's and has to be cleaned
            self._descriptor = lock_at_once(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH)
        except OSError:
            return

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

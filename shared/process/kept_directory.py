"""A directory whose files have to stay while a process runs, locked: systemd-tmpfiles lets alone what is locked."""

import fcntl
import os
import stat
from pathlib import Path


class KeptDirectory:
    """Holds a shared lock on a directory (tmpfiles.d(5), Age), as far as this host lets it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def hold(self) -> None:
        """Lock the directory that is there now, unless that is done. Due every second: who cleans locks it too."""
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink:
            return
        self.close()
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return
        try:
            if os.fstat(descriptor).st_mode & stat.S_ISVTX:
                raise PermissionError  # such as /tmp itself, which is everybody's and has to be cleaned
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
        else:
            self._descriptor = descriptor

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

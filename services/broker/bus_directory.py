"""The bus directory, taken for one broker and kept: a lock that others may remove, and the socket files beside it."""

import os
from pathlib import Path
from typing import Final

from shared.bus.zmq_sockets import broker_is_up, prepare_directory
from shared.process.file_locks import KeptDirectory, lock_at_once
from shared.process.lifecycle import CANT_CREATE, OperatorError

ENDPOINTS: Final = ("publish", "subscribe")
"""The socket files."""
LOCK: Final = "lock"


class BusDirectory:
    """A bus directory that this broker has. OperatorError when another one has it, or it can't be had."""

    def __init__(self, path: Path) -> None:
        # A second bind on an ipc path would succeed and take the endpoint away from the first: flock decides, and
        # where others have just removed the lock, whether a broker answers.
        if broker_is_up(path):
            raise OperatorError(CANT_CREATE, _another(path))
        self._path = path
        self._kept = KeptDirectory(path)
        self._take()

    def _take(self) -> None:
        try:
            prepare_directory(self._path)
            lock = os.open(self._path / LOCK, os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError as error:
            raise OperatorError(CANT_CREATE, f"bus directory {self._path}: {error.strerror}") from None
        try:
            self._lock = lock_at_once(lock)
        except OSError as error:
            why = _another(self._path)
            if not isinstance(error, BlockingIOError):
                why = (
                    f"{self._path / LOCK} can't be locked: {error.strerror}; "
                    "set a [bus] directory on a local file system, or allow flock(2)"
                )
            raise OperatorError(CANT_CREATE, why) from None
        self._kept.hold()

    def missing(self) -> list[str]:
        """Return the files that others have removed; due every second."""
        self._kept.hold()
        lock = [] if os.fstat(self._lock).st_nlink else [LOCK]
        return lock + [name for name in ENDPOINTS if not (self._path / name).exists()]

    def take_again(self) -> None:
        """Make the directory and its lock anew. OperatorError when another broker has taken them meanwhile."""
        self._release()
        self._take()

    def close(self) -> None:
        """Let go of the directory, without the socket files, which libzmq leaves there."""
        if self._lock >= 0:
            for name in ENDPOINTS:
                (self._path / name).unlink(missing_ok=True)  # while we hold the lock they can't be a successor's
            self._release()
        self._kept.close()

    def _release(self) -> None:
        os.close(self._lock)
        self._lock = -1


def _another(path: Path) -> str:
    return f"another broker runs on {path}; stop it, or set another [bus] directory"

"""The ingest workers that live, whether they report or not: each holds a lock in the bus directory."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.bus.loans.lender import lock_path, pool_path

LOCKS: Final = "/proc/locks"
"""Locks are looked up there (proc_locks(5)), since trying one would take it."""
READ_SIZE: Final = 1 << 16


class LivingWorkers:
    """Tells which workers live. What it reads is opened at once, and nothing later.

    Where a sandbox hides the locks, as the systemd units do, no worker is known to live; the watchdog there ends what
    hangs.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks = -1
        with suppress(OSError):
            self._locks = os.open(LOCKS, os.O_RDONLY | os.O_CLOEXEC)
        files = sorted(directory.glob(lock_path(pool_path(directory, "ingest.*")).name))
        self._known = {f"ingest.{path.name.split('.')[1]}" for path in files}

    def all_in(self, names: Iterable[str]) -> bool:
        """Return whether these are all that there may be, so that nobody need be looked for."""
        self._known.update(names)
        return self._known == set(names)

    def among(self, names: Iterable[str] = ()) -> list[str]:
        """Return the workers that live, of these and of those that were there at the start, as in `ingest.2`."""
        self._known.update(names)
        held = self._held()
        return [name for name in sorted(self._known) if self._inode(name) in held]

    def _held(self) -> set[str]:
        text = b""
        with suppress(OSError):
            while chunk := os.pread(self._locks, READ_SIZE, len(text)):
                text += chunk
        return {line.split()[-3].rpartition(":")[2] for line in text.decode().splitlines() if "FLOCK" in line}

    def _inode(self, name: str) -> str:
        try:
            return str(lock_path(pool_path(self._directory, name)).stat().st_ino)
        except OSError:
            return ""

    def close(self) -> None:
        """Look at locks no more."""
        if self._locks >= 0:
            os.close(self._locks)
            self._locks = -1


def living_workers(directory: Path) -> list[str]:
    """Return the workers that live now."""
    workers = LivingWorkers(directory)
    try:
        return workers.among()
    finally:
        workers.close()

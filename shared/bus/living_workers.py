"""The ingest workers that live, whether they report or not: each holds a lock in the bus directory."""

from pathlib import Path
from typing import Final

LOCKS: Final = Path("/proc/locks")
PREFIX, SUFFIX = "pool.", ".lock"
"""As `shared.bus.loans` names a worker's lock by its number."""


def living_workers(directory: Path) -> list[str]:
    """Return their names, as in `ingest.2`. Locks are looked up in proc_locks(5), since trying one would take it."""
    try:
        files = sorted(directory.glob(f"{PREFIX}*{SUFFIX}"))
        held = {line.split()[-3].rpartition(":")[2] for line in LOCKS.read_text().splitlines() if "FLOCK" in line}
        numbers = [path.name[len(PREFIX) : -len(SUFFIX)] for path in files if str(path.stat().st_ino) in held]
    except OSError:
        return []
    return [f"ingest.{number}" for number in numbers]

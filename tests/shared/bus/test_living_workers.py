from pathlib import Path

from shared.bus.living_workers import LivingWorkers


def test_a_worker_once_heard_is_looked_for_when_it_is_silent(tmp_path: Path) -> None:
    """Locks need not be read while all known workers report; one that was heard before, or was there, is missed."""
    (tmp_path / "pool.2.lock").touch()
    workers = LivingWorkers(tmp_path)
    try:
        assert not workers.all_in(["ingest.1"])
        assert workers.all_in(["ingest.1", "ingest.2"])
        assert not workers.all_in(["ingest.2"])
        assert workers.among() == [], "they hold no lock"
    finally:
        workers.close()

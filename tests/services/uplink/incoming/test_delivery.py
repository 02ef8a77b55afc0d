from pathlib import Path
from types import SimpleNamespace
from typing import cast

from services.uplink.incoming.arrivals import POSITION_COUNTERS
from services.uplink.incoming.delivery import Delivery
from services.uplink.incoming.feeds import Feeds
from services.uplink.incoming.readers import Readers
from shared.bus.kept_counts import KeptFile
from shared.ledger.accounts import unparse_arriving


def test_places_of_other_sites_outlive_a_start_in_which_nothing_comes(tmp_path: Path) -> None:
    """A start that hears nothing of a site hands its place on: the next one knows what has come from there."""
    name = unparse_arriving("bonn", "ingest.1", 7, "flows")
    kept = KeptFile(tmp_path / "accounts")
    kept.open()
    counts = {"reached": 500, "baseline": 100, "taken": 390, "missed": 10, "repeated": 3}
    kept.keep([], {name: kept.new_counts(counts)}, {})
    kept.close()
    for _ in range(2):
        left = kept.open().tables
        assert left == {name: counts}
        delivery = Delivery(
            cast(Feeds, SimpleNamespace()), kept, left, Readers("uplink.1", 7), lambda: None, lambda: None
        )
        assert delivery.report() == {name: counts}
        kept.keep([], delivery.tables(), {"arriving": POSITION_COUNTERS})
        kept.close()

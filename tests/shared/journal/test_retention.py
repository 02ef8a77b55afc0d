"""The choice of what has to go from the journal; more of it is tested with the journal's service."""

from typing import Any

from shared.journal.retention import Bounds, Kept, expired
from shared.journal.segments import SECOND


def test_nothing_is_put_in_order_within_the_bounds() -> None:
    """Only sizes and times are looked at while nothing is too much: a week may have 10,080 segments a stream."""
    unseen: Any = None
    kept = [Kept(unseen, 100, number * SECOND) for number in range(10, 20)]
    assert expired(kept, Bounds(1000, 10, 500), 20 * SECOND, 500) == []

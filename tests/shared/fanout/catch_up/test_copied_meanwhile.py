"""Outcomes of rows that come live while a collector catches up, by what rules have made of them."""

from typing import Any

import numpy as np

from shared.bus.bodies.offload_messages import KernelServed
from shared.datagrams.limits import BUCKETS
from shared.datagrams.sampling import find_buckets
from shared.fanout.catch_up.copied_meanwhile import COPIED, OWED, PASSED_OVER, UNPLANNED_ROW, CopiedMeanwhile, leave_out
from shared.fanout.catch_up.window import Numbered
from tests.builders import make_batch, make_client

WORKER = ("ingest.1", 7)
SOURCES = ("10.0.0.1", "10.0.0.2")


def noted(*batches: tuple[int, list[int]], share: bytes = b"", **fields: Any) -> CopiedMeanwhile:
    """Batches behind a running count, each row with its generation: 1 is known, 2 is not."""
    found = CopiedMeanwhile()
    for total, generations in batches:
        batch = make_batch([b"x"] * len(generations), SOURCES)
        batch.generations = np.array(generations, np.uint16)
        entries = {1: KernelServed(make_client("siem", **fields), ("messages",), share), 2: None}
        live = Numbered(WORKER, 0, total, batch)
        found.note(live, {each: entries[each] for each in set(generations) - {0, 3}})
    return found


def test_outcomes_are_found_by_running_count() -> None:
    """Rows of any batch of the journal are those that came live, however both are cut; others are owed."""
    found = noted((10, [1, 1, 0, 1]), (14, [0, 2, 3]), (30, [0, 0]))
    assert found.outcomes(WORKER, 0, 10) is None
    assert found.outcomes(WORKER, 30, 32) is None
    assert found.outcomes(("ingest.1", 8), 10, 14) is None
    outcomes = found.outcomes(WORKER, 9, 18)
    assert outcomes is not None
    assert outcomes.tolist() == [OWED, COPIED, COPIED, OWED, COPIED, OWED, UNPLANNED_ROW, OWED, OWED]


def test_entry_of_the_rules_decides() -> None:
    """By its prefixes, and by its sample: the first that it matches, and each n-th after it, over all batches."""
    found = noted((0, [1] * 5), (5, [1] * 3), prefixes=("10.0.0.1/32",), sample=2)
    outcomes = found.outcomes(WORKER, 0, 8)
    assert outcomes is not None
    assert outcomes.tolist() == [COPIED, OWED, PASSED_OVER, OWED, COPIED, PASSED_OVER, OWED, COPIED]
    rest, left = leave_out(outcomes, np.array([True] * 5 + [False] * 3))
    assert rest.tolist() == [False, True, False, True, False, False, False, False]
    assert (left.by_kernel, left.sampled_out, left.unplanned) == (2, 1, 0)


def test_member_of_a_group_has_had_its_share() -> None:
    """The kernel has copied the sources of its buckets alone."""
    (bucket, other) = find_buckets(make_batch([b"x"] * 2, SOURCES)).tolist()
    assert bucket != other
    share = (1 << BUCKETS - 1 - bucket).to_bytes(BUCKETS // 8)
    outcomes = noted((0, [1] * 5), group="g", share=share).outcomes(WORKER, 0, 5)
    assert outcomes is not None
    assert outcomes.tolist() == [COPIED, OWED, COPIED, OWED, COPIED]

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.site_model import FULL, MEASURED, PLANS, Plan, first_full, loads, predict, sharded, tables
from tests.stack import CHECKOUT

NEAR = 2.5
"""Costs of messages differ so much: how full they are is by how busy the machine is."""

plans = st.builds(
    Plan,
    sites=st.integers(1, 1000),
    exporters=st.integers(1, 10_000),
    per_exporter=st.floats(1, 1000),
    size=st.integers(20, 1464),
    receivers=st.integers(1, 10),
    copies=st.integers(1, 3),
)


def test_the_page_has_what_the_model_says() -> None:
    """The tables of SCALE.md are those that the model prints."""
    page = (CHECKOUT / "deploy/ha/SCALE.md").read_text()
    assert [row for row in tables() if row and row not in page] == []


@pytest.mark.parametrize(("servers", "rate"), MEASURED)
def test_predictions_are_near_what_was_measured(servers: int, rate: int) -> None:
    """With one, two and three servers, costs are as predicted, at steady rates and of what had waited."""
    found = predict(servers, rate or 500_000, waited=not rate)
    for predicted, measured in zip(found, MEASURED[servers, rate], strict=True):
        assert 1 / NEAR < predicted / measured < NEAR


@given(plans)
def test_with_its_shards_nothing_is_too_full(plan: Plan) -> None:
    """A plan that is sharded as the model says has no relay, stream or node that is used more than it may be."""
    found = {load.part: load.used for load in loads(sharded(plan)) if not load.part.startswith("site:")}
    assert max(found.values()) <= FULL + 1e-9, found


@given(plans, st.floats(1.01, 10))
def test_more_is_never_less(plan: Plan, times: float) -> None:
    """Twice the rate uses more of everything, and what is full first is full at its rate."""
    more = replace(plan, per_exporter=plan.per_exporter * times)
    for before, after in zip(loads(plan), loads(more), strict=True):
        assert after.used >= before.used


@pytest.mark.parametrize("name", PLANS)
def test_the_first_that_is_full_is_full_at_its_rate(name: str) -> None:
    """At the rate that the model names, one part is used as much as it may be, and no other one more."""
    load, times = first_full(PLANS[name])
    at_it = replace(PLANS[name], per_exporter=PLANS[name].per_exporter * times)
    assert max(loads(at_it), key=lambda each: each.used) == pytest.approx(load)
    assert load.used == pytest.approx(FULL, rel=0.01)

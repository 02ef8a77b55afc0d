import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.ledger.accounts import Accounts, is_origin, new_accounts, parse_origin, unparse_origin
from shared.ledger.equations import discrepancies, dropped

SIDES = ("publishers", "subscribers")
SOUND: Accounts = {
    "stream/messages": {
        "received": 100,
        "bytes": 9999,
        "published": 70,
        "kernel_dropped": 5,
        "exporter_missed": 7,
        "replied": 60,
        "reply_failed": 40,
        "dropped_no_subscriber": 20,
        "dropped_bus_full": 6,
        "dropped_oversized": 3,
        "dropped_cut_off": 1,
    },
    "origin/ingest.1/2a/messages": {"baseline": 10, "taken": 50, "missed": 10, "reached": 72, "dropped_unserved": 2},
    "collector/a": {
        "expected": 68,
        "offered": 55,
        "missed": 10,
        "filtered": 5,
        "sampled_out": 6,
        "shared_out": 7,
        "sent": 19,
        "held": 2,
        "withheld": 3,
        "bytes": 4000,
        "refusals": 3,
        "dropped_buffer_full": 4,
        "dropped_refused": 5,
        "dropped_not_connected": 2,
        "dropped_eperm": 1,
        "dropped_unserved": 3,
        "dropped_unsure": 1,
    },
    "listener/messages/udp://127.0.0.1:6667": {"received": 90, "bytes": 9000, "kernel_dropped": 5, "truncated": 0},
    "listener/messages/unixgram:///run/a/b": {"received": 10, "bytes": 999, "kernel_dropped": 0},
    "broker": {f"{way}_{side}{unit}": 8 for way in ("from", "to") for side in SIDES for unit in ("", "_bytes")},
    "forwarder": {"revision": 3, "bus_rejected": 0},
    "stream/idle": {},
}
OUTSIDE = {"exporter_missed", "replied", "reply_failed", "refusals"}
IN_AN_EQUATION = [
    (name, counter)
    for name, account in SOUND.items()
    if "/" in name or name == "broker"
    for counter in account
    if counter not in OUTSIDE and (name, counter) != ("collector/a", "bytes")
]


def test_sound_accounts_have_no_discrepancy() -> None:
    """Accounts that add up yield nothing."""
    assert list(discrepancies(SOUND)) == []


@pytest.mark.parametrize(("name", "counter"), IN_AN_EQUATION)
@pytest.mark.parametrize("error", [1, -1])
def test_each_broken_equation_is_found(name: str, counter: str, error: int) -> None:
    """A counter that is off by one, on either side of its equation, is found under its account's name."""
    broken = {**SOUND, name: {**SOUND[name], counter: SOUND[name][counter] + error}}
    found = list(discrepancies(broken))
    assert found
    at = "stream/messages" if name.startswith("listener/") and counter != "truncated" else name
    assert all(str(sentence).startswith(f"{at}: ") for sentence in found)


def test_counters_outside_every_equation_may_be_anything() -> None:
    """Replies, refusals and what exporters missed are told apart from what must add up."""
    for name, account in SOUND.items():
        for counter in OUTSIDE & account.keys():
            assert list(discrepancies({name: {**account, counter: 12345}})) == []


def test_sentence_says_both_sides() -> None:
    """A discrepancy names the total and both figures."""
    (sentence,) = discrepancies({"stream/x": {"received": 5, "published": 3, "dropped_bus_full": 1}})
    assert str(sentence) == "stream/x: received is 5, its parts add up to 4"


def test_dropped_is_the_sum_of_all_causes() -> None:
    """Every cause counts, those named after an errno too; what the kernel dropped is not ours."""
    assert dropped(SOUND["collector/a"]) == 16
    assert dropped({"kernel_dropped": 9, "reply_failed": 9}) == 0


def test_new_accounts_begin_at_zero() -> None:
    """An account is there when first named, and counts from zero."""
    accounts = new_accounts()
    accounts["stream/x"]["received"] += 2
    assert accounts == {"stream/x": {"received": 2}}


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789._-", min_size=1)


@given(names, st.integers(0, 2**62), names)
def test_origin_name_comes_back(worker: str, boot: int, stream: str) -> None:
    """Worker, boot id and stream are read from the name that is written for them."""
    name = unparse_origin(worker, boot, stream)
    assert name.startswith("origin/")
    assert parse_origin(name) == (worker, boot, stream)


@pytest.mark.parametrize(
    "name",
    ["", "origin/", "origin/ingest.1/2a", "origin/ingest.1/2A/x", "origin/a/b/c/d", "collector/a/1/x", "origin//1/x"],
)
def test_name_of_another_account_is_no_origin(name: str) -> None:
    """A name that was not written for an origin is told apart, and ValueError names it."""
    assert not is_origin(name)
    with pytest.raises(ValueError, match="is not the name of an origin account"):
        parse_origin(name)

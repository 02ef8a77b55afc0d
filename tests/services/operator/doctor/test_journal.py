import errno

import pytest

from services.operator.doctor.journal import check_journal
from shared.ledger.accounts import Accounts
from shared.settings.entries import Stream
from shared.settings.model import Settings

KEPT = Settings(streams=(Stream(name="flows", listen=("udp://127.0.0.1:2055",), journal=True),))
WELL = {"written": 5, "taken": 5, "kept_bytes": 5_000_000, "oldest_ns": 1_795_000_000_000_000_000}


def heard(**account: int) -> dict[str, Accounts]:
    """Return what the services report, with a journal that has this account."""
    return {"broker.1": {}, "journal.1": {"journal": {}, "journal/flows": {**WELL, **account}}}


START = "`systemctl start fanwire-journal`, or `fanwire journal`"
ROOM = "lower [journal] bytes, or raise min_free; it goes on by itself"
DISK = "check the disk: `smartctl`, `dmesg`; remove the files that end in .bad"


@pytest.mark.parametrize(
    ("accounts", "level", "why", "cure"),
    [
        ({"broker.1": {}}, "error", "it is to be kept, and no journal on the bus keeps it", START),
        (heard(), "ok", ": 5 of 10,737 MB", ""),
        (heard(oldest_ns=0), "ok", "nothing has come yet", ""),
        (heard(write_errno=errno.ENOSPC), "error", "nothing is kept: No space left on device", ROOM),
        (heard(damaged_bytes=7), "warning", "readers found 7 bytes damaged, and 0 segments that can't be read", DISK),
        (heard(segments_set_aside=1), "warning", "and 1 segments that can't be read", DISK),
    ],
)
def test_each_state_has_its_finding(accounts: dict[str, Accounts], level: str, why: str, cure: str) -> None:
    """A stream that is kept is fine, or has one finding that says what is wrong and what to do."""
    (found,) = check_journal(accounts, KEPT)
    assert (found.level, found.subject) == (level, "flows")
    assert why in found.why
    assert cure in found.cure
    assert bool(found.cure) == (level != "ok")


def test_a_collector_that_is_owed_datagrams_has_a_line() -> None:
    """It tells how many of which stream, and since when; that is no fault."""
    owed = {"forwarder.1": {"owed/flows/siem": {"owed": 1234, "owed_from_ns": 1_795_000_000_000_000_000}}}
    _, found = check_journal(heard() | owed, KEPT)
    assert (found.level, found.subject) == ("ok", "siem")
    assert found.why.startswith("1,234 datagrams of flows, received since 2026-")


def test_without_a_kept_stream_nothing_is_said() -> None:
    """A journal that keeps nothing is no subject."""
    assert list(check_journal({"broker.1": {}, "journal.1": {"journal": {}}}, Settings())) == []

import pytest

from services.operator.doctor.probe import where_lost
from shared.ledger import Accounts

BEFORE: dict[str, Accounts] = {"ingest.1": {"stream/s": {"received": 5, "published": 5}}}


def after(received: int = 6, published: int = 6, **account: int) -> dict[str, Accounts]:
    """What the services say once the datagram should have come."""
    forwarder: Accounts = {"collector/doctor": account} if account else {}
    return {
        "ingest.1": {"stream/s": {"received": received, "published": published}, "stream/other": {"received": 99}},
        "forwarder.1": forwarder,
    }


@pytest.mark.parametrize(
    ("told", "where"),
    [
        ({}, "ingest did not receive it"),
        (after(received=5, published=5), "ingest did not receive it"),
        (after(published=5), "ingest received it and nobody"),
        (after(), "ingest published it, and no sender"),
        (after(expected=1, offered=1, filtered=1), "forwarder.1 had it"),
        (after(expected=1, missed=1), "the bus lost it on the way to forwarder.1"),
        (after(expected=1, offered=1, dropped_refused=1), "forwarder.1 counts it as dropped_refused"),
        (after(expected=1, offered=1, delivered=1), "forwarder.1 sent it"),
    ],
)
def test_where_it_was_lost(told: dict[str, Accounts], where: str) -> None:
    """Each stage at which the datagram can be lost is told from what the services count."""
    assert where_lost(BEFORE, told, "s", "doctor").startswith(where)

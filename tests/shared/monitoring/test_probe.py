import pytest

from shared.ledger.accounts import Accounts
from shared.monitoring.probe import probe, where_lost
from shared.process.registry_client import RegistryClient
from shared.settings.entries import Stream

BEFORE: dict[str, Accounts] = {"ingest.1": {"stream/s": {"received": 5, "published": 5}}}


def after(received: int = 6, published: int = 6, **account: int) -> dict[str, Accounts]:
    """Return the services' accounts once the datagram should have come."""
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
        (after(published=5), "ingest received it, and no service"),
        (after(), "ingest published it, and no sender"),
        (after(expected=1, offered=1, filtered=1), "forwarder.1 got it"),
        (after(expected=1, missed=1), "the bus lost it on the way to forwarder.1"),
        (after(expected=1, offered=1, dropped_refused=1), "forwarder.1 counts it as dropped_refused"),
        (after(expected=1, offered=1, sent=1), "forwarder.1 sent it"),
    ],
)
def test_where_it_was_lost(told: dict[str, Accounts], where: str) -> None:
    """Each stage at which the datagram can be lost is told from what the services count."""
    assert where_lost(BEFORE, told, "s", "doctor").startswith(where)


def nobody() -> RegistryClient:
    """A registry that must not be asked."""
    raise AssertionError


@pytest.mark.parametrize(
    ("listen", "level", "why"),
    [
        ("udp://192.0.2.9:7000", "error", "could not be sent to 192.0.2.9: Cannot assign requested address"),
        ("tcp://127.0.0.1:7000", "warning", "no udp:// listener"),
    ],
)
def test_nothing_is_sent_to_what_is_not_here(lab: None, listen: str, level: str, why: str) -> None:
    """A listener's address that is not this host's, or is not for UDP, is told before anybody is asked or sent to."""
    found = probe(nobody, Stream(name="s", listen=(listen,)), "relay", dict)
    assert (found.level, found.subject) == (level, "s")
    assert why in found.why

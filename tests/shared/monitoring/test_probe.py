import socket
import threading
from contextlib import closing
from types import SimpleNamespace
from typing import Any, Self, cast

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


class LateSender:
    """A registry, and a sender that hears of the collector when one datagram has passed."""

    local = ("127.0.0.1", 0)

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self._port = 0
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.settimeout(60)
        self._sock.bind(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self._copying = threading.Thread(target=self._copy)

    def __enter__(self) -> Self:
        self._copying.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._copying.join()

    def _copy(self) -> None:
        """Take two datagrams, and copy the second one."""
        with closing(self._sock):
            self.came = [self._sock.recv(1000) for _ in range(2)]
            self._sock.sendto(self.came[1], ("127.0.0.1", self._port))

    def ask(self, _op: str, **fields: Any) -> object:
        """Sign the collector up, or off."""
        self._port = fields.get("port", self._port)
        return SimpleNamespace(entry=lambda: SimpleNamespace(name="probe", generation=1))


def test_a_collector_that_no_sender_knew_yet_is_probed_again(lab: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another datagram goes once where ingest has published it and nobody serves the collector; its copy counts."""
    monkeypatch.setattr("shared.monitoring.probe.COPY_SECONDS", 1.0)
    monkeypatch.setattr("shared.monitoring.probe.ROUND_SECONDS", 0.05)
    late, ledgers = LateSender(), [after(), BEFORE]
    found = probe(
        lambda: cast(RegistryClient, late),
        Stream(name="s", listen=(f"udp://127.0.0.1:{late.port}",)),
        "relay",
        ledgers.pop,
    )
    assert found.level == "ok", found
    assert late.came[0] != late.came[1], "the first one, late, is not taken for the second"

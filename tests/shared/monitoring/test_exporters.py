import pytest

from shared.bus.bodies.exporters_message import Exporters
from shared.client import Client
from shared.monitoring import exporters
from shared.monitoring.exporters import Shares
from shared.net.addresses import pack_address


def client(name: str, *prefixes: str) -> Client:
    """Make a collector of one stream."""
    return Client(name, streams=("syslog",), generation=1, address="192.0.2.1", port=514, prefixes=prefixes)


def test_takers_follow_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered numbers of collectors are of the present registry, also with more exporters than are remembered."""
    monkeypatch.setattr(exporters, "MAX_KNOWN", 2)
    told = Shares()
    addresses = [f"10.{number}.0.1" for number in range(4)]
    told.note("ingest.1", Exporters("syslog", 1.0, 4, 1, 4, [(pack_address(each), 1, 9) for each in addresses]), 0.0)

    def takers(version: int, *clients: Client) -> dict[str, int]:
        return {each.address: each.takers for each in told.exporters(clients, version) or ()}

    for _ in range(2):
        assert takers(1, client("a", "10.0.0.0/16"), client("b")) == dict(zip(addresses, (2, 1, 1, 1), strict=True))
    assert takers(2, client("a", "10.3.0.0/16")) == dict(zip(addresses, (0, 0, 0, 1), strict=True))

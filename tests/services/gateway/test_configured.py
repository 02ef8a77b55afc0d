import msgspec
import pytest
from structlog.testing import capture_logs

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.upkeep import expel_loops
from services.gateway.configured import Configured
from services.gateway.registry.entry import Origin
from shared.settings.model import Settings
from shared.settings.own_listeners import OwnListeners
from tests.services.gateway.table import Table
from tests.stack import wait_until


@pytest.mark.parametrize("host", [False, True])
def test_collector_returns_when_its_loop_is_over(host: bool) -> None:
    """One of the settings is removed for as long as its address is this host's, whoever has its name meanwhile."""
    own: list[str] = []
    collector = {"name": "siem", "streams": ["messages"], "address": "localhost" if host else "127.0.0.1", "port": 514}
    settings = msgspec.convert({"collector": [collector, collector | {"name": "other", "port": 9}]}, Settings)
    destinations = Destinations(["messages"], OwnListeners([("::", 514)]), lambda _: bool(own), lambda _: False)
    table = Table()
    configured = Configured(settings, destinations, table)

    def tick() -> set[str]:
        configured.tick()
        expel_loops(destinations, table, configured.expelled)
        return {*table.present}

    wait_until(lambda: tick() == {"siem", "other"}, "all are there")
    own.append("all")
    assert [tick(), tick()] == [{"other"}] * 2
    table.join("siem")
    own.clear()
    with capture_logs() as logs:
        assert tick() == {"siem", "other"}
    siem = table.find("siem")
    assert siem
    assert (siem.origin, siem.client.port, tick()) == (Origin.SETTINGS, 514, {"siem", "other"})
    assert [each["clients"] for each in logs if "is back" in each["event"]] == [["siem"]]

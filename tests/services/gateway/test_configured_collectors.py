from collections.abc import Callable

import msgspec
import pytest
from structlog.testing import capture_logs

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.readmission import expel_loops
from services.gateway.configured_collectors import Configured
from services.gateway.registry.entry import Origin
from shared.settings.model import Settings
from shared.settings.own_listeners import OwnListeners
from tests.services.gateway.table import Table
from tests.stack import wait_until

DESTINATIONS = Destinations(["messages", "flows"], OwnListeners([]), lambda _: False, lambda _: False)


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


SIEM: dict[str, object] = {"name": "siem", "streams": ["messages"], "address": "192.0.2.1", "port": 514}
ARCHIVE = SIEM | {"name": "archive"}
APART: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "port": ({}, {"port": 515}),
    "address": ({}, {"address": "192.0.2.2"}),
    "streams": ({}, {"streams": ["flows"]}),
    "exporters": ({"from": ["10.0.0.0/8"]}, {"from": ["10.0.0.0/7", "fc00::/7"], "port": 515}),
    "prefixes": ({"from": ["10.0.0.0/8"]}, {"from": ["11.0.0.0/8"]}),
    "source": ({}, {"source": "original"}),
    "group": ({"group": "both"}, {"group": "both"}),
}


def doubles(configure: Callable[[], object]) -> list[tuple[str, str]]:
    """Return the pairs of which a configuration warns."""
    with capture_logs() as logs:
        configure()
    said = [each for each in logs if "arrive twice" in each["event"]]
    assert all(each["cure"].startswith("give one of each pair another port") for each in said)
    return [pair for each in said for pair in each["pairs"]]


def settings_of(*collectors: dict[str, object]) -> Settings:
    """Return settings with these collectors, and two streams."""
    streams = [{"name": name, "listen": ["udp://127.0.0.1:1"]} for name in ("messages", "flows")]
    return msgspec.convert({"stream": streams, "collector": collectors}, Settings)


def test_collectors_that_get_the_same_at_one_place_are_named() -> None:
    """The gateway warns at its start, and at a reload of those that are new, also by host names, once of each pair."""
    table, destinations = Table(), DESTINATIONS
    both = settings_of(SIEM, ARCHIVE)
    made: list[Configured] = []
    assert doubles(lambda: made.append(Configured(both, destinations, table))) == [("archive", "siem")]
    (configured,) = made
    assert doubles(lambda: configured.apply(both, destinations)) == []
    third = settings_of(SIEM, ARCHIVE, SIEM | {"name": "third", "streams": ["*"]})
    assert doubles(lambda: configured.apply(third, destinations)) == [("archive", "third"), ("siem", "third")]
    assert doubles(lambda: configured.apply(settings_of(SIEM), destinations)) == []
    assert doubles(lambda: configured.apply(both, destinations)) == [("archive", "siem")]
    named = settings_of(SIEM | {"address": "localhost"}, ARCHIVE | {"address": "localhost"})
    assert doubles(lambda: configured.apply(named, destinations)) == []
    wait_until(lambda: doubles(configured.tick) == [("archive", "siem")], "both have the address of the name")


@pytest.mark.parametrize("apart", APART)
def test_collectors_that_do_not_get_the_same_are_not(apart: str) -> None:
    """Two at one address and port are fine as long as no datagram goes to both from one source."""
    changes = APART[apart]
    collectors = [each | change for each, change in zip((SIEM, ARCHIVE), changes, strict=True)]
    assert doubles(lambda: Configured(settings_of(*collectors), DESTINATIONS, Table())) == []

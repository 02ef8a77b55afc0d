from typing import Any

import pytest

from services.operator.doctor.network_paths import (
    NUD_FAILED,
    NUD_INCOMPLETE,
    NetworkFacts,
    NetworkPath,
    check_network_paths,
)
from shared.monitoring.finding import Finding
from shared.net.queues import Queue
from shared.process.registry_client import Entry
from shared.settings.tables import Transmitter

STALE, REACHABLE = 0x04, 0x02
AT = "10.2.0.2"
FINE = NetworkPath(local=False, interface="eth0", next_hop=AT, neighbour=REACHABLE)
HERE = NetworkPath(local=True, interface="lo", mtu=65536, link_mtu=65536)


def collector(name: str = "siem", address: str = AT, port: int = 9514, **fields: Any) -> Entry:
    """A collector of the stream `messages`."""
    return Entry(name, address, port, **{"streams": ("messages",), "source": "relay", **fields})


def check(facts: NetworkFacts, *collectors: Entry) -> list[Finding]:
    """Return the findings."""
    return list(check_network_paths(facts, collectors, Transmitter().destinations))


def complaints(facts: NetworkFacts, *collectors: Entry) -> list[tuple[str, str, str]]:
    """Name, level and subject of what is not fine; each that is has a cure."""
    found = [finding for finding in check(facts, *collectors) if finding.level != "ok"]
    assert all(finding.cure for finding in found)
    return [(finding.name, finding.level, finding.subject) for finding in found]


def test_ways_that_are_fine() -> None:
    """Relayed copies to a neighbour that answers, or is not asked again yet, need nothing; every check says so."""
    for state in (0, STALE, REACHABLE):
        facts = NetworkFacts({AT: NetworkPath(False, "eth0", neighbour=state)}, vendor="Amazon EC2")
        assert complaints(facts, collector()) == []
    names = [finding.name for finding in check(facts, collector())]
    assert names == [finding.name for finding in check(facts)]
    assert len(set(names)) == len(names) == 10


@pytest.mark.parametrize(
    ("way", "name", "level"),
    [
        (None, "route", "error"),
        (NetworkPath(False, "eth0", up=False), "interface", "error"),
        (NetworkPath(False, "eth0", next_hop=AT, neighbour=NUD_FAILED), "next_hop", "error"),
        (NetworkPath(False, "eth0", next_hop=AT, neighbour=NUD_INCOMPLETE), "next_hop", "error"),
        (NetworkPath(False, "tun0", mtu=1400, link_mtu=1400), "mtu", "warning"),
        (NetworkPath(False, "eth0", mtu=1400, link_mtu=1500), "mtu", "warning"),
        (NetworkPath(False, "eth0", queues=[Queue(1, "tbf", 7, True)]), "egress_queue", "warning"),
        (NetworkPath(False, "eth0", queues=[Queue(1, "tbf", 0, False)]), "egress_queue", "warning"),
    ],
)
def test_ways_that_need_a_cure(way: NetworkPath | None, name: str, level: str) -> None:
    """Each trouble on the way is told once, for the collector that it concerns and not for the other."""
    facts = NetworkFacts({AT: way, "127.0.0.1": HERE})
    assert complaints(facts, collector(), collector("here", "127.0.0.1")) == [(name, level, "siem")]


def test_longer_packets_than_the_way_takes() -> None:
    """An exporter's side with jumbo frames makes fragments of what leaves by a link without."""
    facts = NetworkFacts({AT: FINE}, longest_mtu=9000)
    assert complaints(facts, collector()) == [("mtu", "warning", "siem")]
    (found,) = [finding for finding in check(facts, collector()) if finding.name == "mtu"]
    assert "takes 1500 bytes, exporters' packets may have 9000" in found.why
    assert "under 1472 bytes" in found.cure


def test_a_smaller_mtu_further_on_is_worse_by_ipv6() -> None:
    """A finding says that routers don't cut IPv6, where the kernel has learnt of a smaller MTU behind the link."""
    six, way = collector("six", "fd00::2"), NetworkPath(False, "eth0", mtu=1280, link_mtu=1500)
    (found,) = [each for each in check(NetworkFacts({"fd00::2": way}), six) if each.name == "mtu"]
    assert "routers don't cut IPv6" in found.why
    assert "under 1232 bytes" in found.cure


@pytest.mark.parametrize(
    ("address", "way", "level"),
    [
        ("fd00:3::2", NetworkPath(False, "eth0", next_hop="fd00::1"), "warning"),
        ("fd00:3::2", NetworkPath(False, "eth0", next_hop="fd00::1", mtu_known=True), ""),
        ("fd00:3::2", NetworkPath(False, "tun0", mtu=1280, link_mtu=1280, next_hop="fd00::1"), "warning"),
        ("fd00::2", NetworkPath(False, "eth0", next_hop="fd00::2"), ""),
        ("10.3.0.2", NetworkPath(False, "eth0", next_hop="10.2.0.1"), ""),
    ],
)
def test_an_mtu_that_is_not_known_matters_to_ipv6_behind_a_router(address: str, way: NetworkPath, level: str) -> None:
    """Only there no router cuts what is too long: the cure sets the route's MTU."""
    found = [each for each in check(NetworkFacts({address: way}), collector(address=address)) if each.name == "mtu"]
    assert [each.level for each in found] == [level or "ok"]
    assert ("is not known" in found[0].why) == (level == "warning" and way.mtu > 1280)


@pytest.mark.parametrize(
    ("listener", "address", "way"),
    [
        (("127.0.0.1", 6667), "127.0.0.1", HERE),
        (("0.0.0.0", 6667), "10.1.0.1", HERE),
        (("::", 6667), "10.1.0.1", HERE),
        (("10.1.0.1", 6667), "10.1.0.1", HERE),
    ],
)
def test_a_listener_of_our_own_is_a_loop(listener: tuple[str, int], address: str, way: NetworkPath) -> None:
    """Copies to any address of this host on which we listen come back; on another port, or elsewhere, they don't."""
    facts = NetworkFacts({address: way, AT: FINE}, listeners=[listener])
    assert complaints(facts, collector("me", address, 6667)) == [("loops", "error", "me")]
    assert complaints(facts, collector("me", address, 6668), collector("siem", AT, 6667)) == []


def test_two_at_one_place() -> None:
    """Two collectors of the same at one place are a finding, unless they share it or want different streams."""
    facts = NetworkFacts({AT: FINE})
    one = collector("one")
    assert complaints(facts, one, collector("two")) == [("doubles", "warning", "two")]
    assert complaints(facts, one, collector("two", streams=("*",))) == [("doubles", "warning", "two")]
    assert complaints(facts, one, collector("two", streams=("other",)), collector("three", port=9)) == []
    assert complaints(facts, collector("one", group="g"), collector("two", group="g")) == []
    assert complaints(facts, collector("one", group="g"), collector("two")) == [("doubles", "warning", "two")]
    assert complaints(facts, one, *(collector(f"{number}") for number in range(3000)))[-1][2] == "2999"


def test_two_at_one_place_for_different_exporters() -> None:
    """Entries that part the exporters by prefixes are no doubles, unless their prefixes overlap."""
    facts, ten = NetworkFacts({AT: FINE}), collector("ten", prefixes=("10.0.0.0/8", "fd00::/8"))
    assert complaints(facts, ten, collector("other", prefixes=("192.0.2.0/24", "2001:db8::/32"))) == []
    assert complaints(facts, ten, collector("part", prefixes=("10.3.0.0/16",))) == [("doubles", "warning", "part")]
    assert complaints(facts, ten, collector("all")) == [("doubles", "warning", "all")]


def test_copies_with_the_exporters_address() -> None:
    """They go to allowed destinations only; what other hosts and clouds make of them is told, as it can't be seen."""
    original = collector(source="original")
    facts = NetworkFacts({AT: FINE, "203.0.113.5": FINE, "127.0.0.1": HERE})
    assert complaints(facts, original) == [("reverse_path_there", "warning", "siem")]
    refused = collector("far", "203.0.113.5", source="original")
    assert complaints(facts, original, refused) == [
        ("destinations", "error", "far"),
        ("reverse_path_there", "warning", "siem, far"),
    ]
    assert complaints(facts, collector("far", "203.0.113.5")) == []
    here = collector("here", "127.0.0.1", source="original")
    for vendor in ("Amazon EC2", "Google", "Microsoft Corporation", "OpenStack Foundation"):
        cloud = NetworkFacts(facts.paths, vendor=vendor)
        assert ("cloud", "warning", "siem") in complaints(cloud, original, here)
        assert complaints(cloud, here) == []


def test_names_of_collectors_are_quoted_in_commands() -> None:
    """A name that a shell would read otherwise can be pasted all the same."""
    facts = NetworkFacts({AT: FINE}, listeners=[(AT, 9514)])
    (found,) = [each for each in check(facts, collector("a b; reboot")) if each.level == "error"]
    assert "fanwire leave 'a b; reboot'" in found.cure

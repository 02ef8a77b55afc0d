import os
import resource
import socket
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest

from services.operator.doctor.facts import by_service, host_facts, listen, network_facts, service_facts
from services.operator.doctor.host import HostFacts, ListeningSocket
from services.operator.doctor.network_paths import NUD_FAILED, NUD_INCOMPLETE, NetworkFacts
from shared.bus.curve_keys import ROLES, write_keys
from shared.bus.status import Report
from shared.net.netlink import Netlink
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.tables import Bus, Gateway
from tests.network import End, Host, tunnel, veth
from tests.stack import Stack, wait_until

SETTINGS = Settings()


def paths(host: Host, addresses: Iterable[str]) -> NetworkFacts:
    """Return the ways that this host would send to these."""
    with host.entered(), closing(Netlink()) as netlink:
        return network_facts(SETTINGS, netlink, netlink.links(), addresses)


def host_of(host: Host, settings: Settings = SETTINGS) -> HostFacts:
    """Return the visible facts of a host."""
    with host.entered(), closing(Netlink()) as netlink:
        return host_facts(settings, netlink.links())


def test_ways_as_the_kernel_has_them(lab: None) -> None:
    """Routes, the MTU of link and route, next hops and what they answer, and no route, as they are in a real host."""
    with Host() as relay, Host() as siem:
        up, eth = End(relay, "up", "10.2.0.1/24 fd00:2::1/64"), End(siem, "eth", "10.2.0.2/24 fd00:2::2/64")
        with veth(up, eth, mtu=9000):
            relay.run(*["ip", "route", "add", "10.8.0.0/16", "via", "10.2.0.2", "mtu", "1400"])
            relay.neighbour("10.2.0.2", eth.link_address, "up")
            found = paths(relay, ["10.2.0.2", "10.8.0.1", "10.9.0.1", "10.2.0.1", "fd00:2::2", "127.0.0.1"])
            assert found.longest_mtu == 9000
            near, far = found.paths["10.2.0.2"], found.paths["10.8.0.1"]
            assert near is not None
            assert far is not None
            assert (near.interface, near.up, near.mtu, near.local) == ("up", True, 9000, False)
            assert near.neighbour not in (0, NUD_FAILED, NUD_INCOMPLETE)
            assert (far.mtu, far.link_mtu, far.next_hop) == (1400, 9000, "10.2.0.2")
            assert found.paths["10.9.0.1"] is None
            assert [way is not None and way.local for way in map(found.paths.get, ("10.2.0.1", "127.0.0.1"))] == [
                True
            ] * 2

            with relay.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                asking.sendto(b"", ("10.2.0.99", 9))
            wait_until(
                lambda: (
                    (way := paths(relay, ["10.2.0.99"]).paths["10.2.0.99"])
                    and way.neighbour & (NUD_FAILED | NUD_INCOMPLETE)
                ),
                "who does not answer is known to be silent",
            )
            siem.run("ip", "link", "set", "eth", "down")
            wait_until(
                lambda: (way := paths(relay, ["10.2.0.2"]).paths["10.2.0.2"]) and not way.up, "there is no carrier"
            )


def test_a_way_without_ethernet_asks_nobody(lab: None) -> None:
    """On a link without link addresses no next hop is looked for."""
    with Host() as relay, Host() as over, tunnel(End(relay, "tun", "10.5.0.1/24"), End(over, "tun", "10.5.0.2/24")):
        way = paths(relay, ["10.5.0.2"]).paths["10.5.0.2"]
        assert way is not None
        assert (way.interface, way.mtu, way.neighbour) == ("tun", 1400, 0)


def test_the_host_as_the_kernel_has_it(lab: None) -> None:
    """Filters by interface, the larger of two counting, UDP's counters, and the buffers of our listeners, are seen."""
    settings = Settings(streams=(Stream(name="flows", listen=("udp://0.0.0.0:9995", "tcp://127.0.0.1:9995")),))
    with Host() as relay, Host() as field, veth(End(relay, "up", "10.2.0.1/24"), End(field, "eth", "10.2.0.2/24")):
        relay.sysctl("net.ipv4.conf.all.rp_filter", 1)
        assert host_of(relay).reverse_path == {"up": 1}
        relay.sysctl("net.ipv4.conf.up.rp_filter", 2)
        with relay.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5000)
            listener.bind(("0.0.0.0", 9995))
            with field.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
                for _ in range(50):
                    exporter.sendto(bytes(1000), ("10.2.0.1", 9995))
            wait_until(lambda: host_of(relay).counters["UdpRcvbufErrors"] > 0, "the buffer is full")
            found = host_of(relay, settings)
            lost = found.counters["UdpRcvbufErrors"]
            assert found.listeners == {"flows": [ListeningSocket(5000, lost)]}
        assert found.reverse_path == {"up": 2}
        assert "IPReversePathFilter" in found.counters
        assert "Udp6InCsumErrors" in found.counters
        assert found.sysctls["net.core.rmem_max"] == int(Path("/proc/sys/net/core/rmem_max").read_text())
        assert found.softnet is not None
        assert found.softnet.processed > 0


def test_services_that_are_not_there(lab: None, tmp_path: Path) -> None:
    """Without a bus directory nobody is heard, and none is made; our own limit of open files stands for theirs."""
    settings = Settings(bus=Bus(directory=str(tmp_path / "bus")))
    assert listen(settings) == []
    found = service_facts(settings, [], "nobody answers")
    assert (found.bus, found.broker, found.gateway, found.accounts) == ("", False, "nobody answers", {})
    assert found.descriptors[""] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert not (tmp_path / "bus").exists()


def test_a_bus_that_is_not_ours(lab: None, tmp_path: Path) -> None:
    """A directory that anybody may write to is told, and nobody is listened to in it."""
    directory = tmp_path / "bus"
    directory.mkdir()
    directory.chmod(0o777)
    settings = Settings(bus=Bus(directory=str(directory)))
    found = service_facts(settings, listen(settings), "")
    assert found.broker is None
    assert "owned by another user" in found.bus


def test_a_bus_on_another_host(lab: None, tmp_path: Path) -> None:
    """With `[bus] connect` the broker is looked for there; the directory of this host, and its files, say nothing."""
    list(write_keys(tmp_path, ROLES))
    with socket.create_server(("127.0.0.1", 0)) as subscribers:
        port = subscribers.getsockname()[1]
        bus = Bus(directory=str(tmp_path), connect=f"tcp://127.0.0.1:{port - 1}", keys=str(tmp_path))
        settings = Settings(bus=bus, gateway=Gateway(database=str(tmp_path / "nothing")))
        found = service_facts(settings, [Report("ingest.1", 1, os.getpid(), 0, 1, 0.0, {})], "")
    assert (found.bus, found.broker, found.removed, found.cleaned) == ("", True, [], False)
    assert found.descriptors.keys() == {""}
    assert service_facts(settings, [], "").broker is False


def test_services_are_heard_and_looked_at(stack: Stack) -> None:
    """A service that reports is heard at once, with its accounts, and with the number of files that it may open."""
    stack.start("broker")
    stack.start("ingest")
    settings = Settings(bus=Bus(directory=str(stack.bus)))
    found = service_facts(settings, listen(settings), "")
    assert found.broker
    assert found.accounts.keys() == {"broker.1", "ingest.1"}
    assert found.descriptors["ingest.1"] == found.descriptors[""]


def test_two_processes_of_one_name_are_two() -> None:
    """The second keeps its accounts, under a name that tells which process it is."""
    reports = [Report("forwarder.1", boot, 70 + boot, 0, 1, 0.0, {"forwarder": {"revision": boot}}) for boot in (1, 2)]
    assert by_service(reports) == {
        "forwarder.1": {"forwarder": {"revision": 1}},
        "forwarder.1 (process 72)": {"forwarder": {"revision": 2}},
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root would become somebody else")
def test_a_user_whom_the_transmitter_could_not_become(lab: None, tmp_path: Path) -> None:
    """For root, a [transmitter] user that is not there is told before it is started."""
    settings = Settings(bus=Bus(directory=str(tmp_path)), transmitter=type(SETTINGS.transmitter)(user="nosuch"))
    assert "there is no [transmitter] user 'nosuch'" in service_facts(settings, [], "").raw.unfit

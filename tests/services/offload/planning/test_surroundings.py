import socket
from collections.abc import Mapping
from contextlib import closing
from itertools import pairwise
from threading import Event
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from services.offload.kernel_routes import KernelRoutes
from services.offload.planning import surroundings as module
from services.offload.planning.planner import Place, Way
from services.offload.planning.surroundings import Surroundings
from shared.net.udp_sockets import UdpSocket
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.tables import Offload
from tests.network import End, Host, tunnel, veth
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
SETTINGS = Settings(
    streams=(
        Stream(name="any", listen=("udp://0.0.0.0:2055",)),
        Stream(name="both", listen=("udp://[::]:514", "tcp://[::]:514")),
        Stream(name="one", listen=("udp://10.1.0.1:6343", "udp://127.0.0.1:6343", "udp://239.1.1.1:6343")),
        Stream(name="ordered", listen=("udp://0.0.0.0:2056",), offload=False),
        Stream(name="unknown", listen=("udp://host.invalid:1",)),
    ),
    offload=Offload(interfaces=("near", "absent")),
)


def test_facts_of_a_host_are_found_and_followed() -> None:
    """Listeners, interfaces and ways are those of the kernel's tables, and change with them."""
    with Host() as relay, Host() as siem:
        near, far = End(relay, "near", "10.1.0.1/24 fd01::1/64"), End(siem, "far", "10.1.0.2/24 fd01::2/64")
        with relay.entered():
            surroundings = Surroundings(SETTINGS)
        with veth(near, far, mtu=1400):
            wait_until(lambda: surroundings.apply_events() and surroundings.gather({}).interfaces, "the link is seen")
            facts = surroundings.gather({("siem", 1): "slow"})
            assert facts.troubled == {("siem", 1): "slow"}
            assert facts.interfaces == {"near": 1400}
            link_local = {address for address, _ in facts.listeners["both"] if address.startswith("fe80:")}
            assert facts.listeners == {
                "any": {("10.1.0.1", 2055)},
                "both": {("10.1.0.1", 514), ("fd01::1", 514), *((address, 514) for address in link_local)},
                "one": {("10.1.0.1", 6343)},
                "unknown": set(),
            }
            found: list[Way | str] = []

            def is_known() -> bool:
                surroundings.next_hops.refresh()
                surroundings.apply_events()
                found[:] = [surroundings.gather({}).way_to("10.1.0.2", "")]
                return isinstance(found[0], Way)

            wait_until(is_known, lambda: f"the neighbour is known: {found}")
            macs = [bytes.fromhex(end.link_address.replace(":", "")) for end in (far, near)]
            assert found == [Way(int(relay.link("near")["ifindex"]), macs[0], macs[1], 1400)]
            way_to = facts.way_to
            assert way_to("10.1.0.1", "") == "it is on this host"
            assert way_to("192.0.2.1", "") == "there is no route to it"
            assert way_to("10.1.0.77", "") == "the link address of its next hop is not known"
            with tunnel(End(relay, "tun", "10.5.0.1/24"), End(siem, "tun", "10.5.0.2/24")):
                wait_until(
                    lambda: (
                        (surroundings.apply_events(), surroundings.gather({}))[1].way_to("10.5.0.2", "")
                        == "the link to it is not Ethernet"
                    ),
                    "the tunnel is seen",
                )
            siem.run("ip", "link", "set", "dev", "far", "down")
            wait_until(
                lambda: (
                    (surroundings.apply_events(), surroundings.gather({}))[1].way_to("10.1.0.2", "")
                    in ("the link to it is down", "there is no route to it")
                ),
                "the link is seen to be down",
            )
        surroundings.close()


def test_a_relay_s_copies_go_the_way_that_rules_give_to_its_address() -> None:
    """By policy routing (ip-rule(8)) the way depends on the source, and the forwarder's own copies go by that."""
    with Host() as relay, Host() as siem:
        ends = [End(relay, f"up{number}", f"10.{number}.0.1/24") for number in (1, 2)]
        fars = [End(siem, f"far{number}", f"10.{number}.0.2/24") for number in (1, 2)]
        with veth(ends[0], fars[0]), veth(ends[1], fars[1]), relay.entered(), closing(Surroundings(SETTINGS)) as found:
            for number, far in enumerate(fars, 1):
                relay.neighbour(f"10.{number}.0.2", far.link_address, f"up{number}")
            relay.route("10.9.0.0/24", via="10.1.0.2")
            relay.run("ip", "route", "add", "10.9.0.0/24", "via", "10.2.0.2", "table", "100")
            relay.run("ip", "rule", "add", "from", "10.2.0.1", "lookup", "100")

            def links() -> list[str]:
                found.apply_events()
                facts = found.gather({})
                ways = [facts.way_to("10.9.0.1", source) for source in ("", "10.1.0.1", "10.2.0.1")]
                names = {int(relay.link(end.name)["ifindex"]): end.name for end in ends}
                return [names[way.link_index] if isinstance(way, Way) else way for way in ways]

            wait_until(lambda: links() == ["up1", "up1", "up2"], lambda: f"each has its way: {links()}")
            relay.run("ip", "rule", "del", "from", "10.2.0.1", "lookup", "100")
            wait_until(lambda: links() == ["up1"] * 3, lambda: f"all go one way: {links()}")


@pytest.mark.parametrize("version", [4, 6])
def test_an_mtu_that_a_router_tells_of_is_heeded(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """The kernel heeds it for what it sends itself; copies by rules that are longer would be lost on the way."""
    monkeypatch.setattr(module, "MTU_SECONDS", 0.0)
    with Host() as relay, Host() as router, Host() as siem:
        ends = [
            End(host, "eth", f"10.1.0.{number}/24 fd01::{number}/64") for number, host in enumerate((relay, router), 1)
        ]
        behind = [
            End(host, "far", f"10.2.0.{number}/24 fd02::{number}/64") for number, host in enumerate((router, siem), 1)
        ]
        with (
            veth(ends[0], ends[1]),
            veth(behind[0], behind[1], mtu=1300),
            relay.entered(),
            closing(Surroundings(SETTINGS)) as found,
        ):
            router.forward()
            network, gateway, address = {
                4: ("10.2.0.0/24", "10.1.0.2", "10.2.0.2"),
                6: ("fd02::/64", "fd01::2", "fd02::2"),
            }[version]
            relay.neighbour(gateway, ends[1].link_address, "eth")
            relay.route(network, via=gateway)

            def mtu() -> int:
                found.apply_events()
                found.refresh()
                way = found.gather({}).way_to(address, "")
                assert isinstance(way, Way), way
                return way.mtu

            wait_until(lambda: found.apply_events() or mtu() == 1500, "the way is known")
            sender = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
            with sender:
                sender.connect((address, 9))
                sender.send(bytes(1400))
                wait_until(lambda: mtu() == 1300, lambda: f"the MTU is the router's, not {mtu()}")


def test_questions_for_mtus_take_a_small_part_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked every five seconds, or more seldom where there are so many that they take long."""
    spent, now, asked = [0.0], [100.0], list[float]()

    def ask(seconds: float) -> dict[Place, int]:
        asked.append(now[0])
        spent[0] += seconds
        return {}

    def asked_in_a_minute(seconds: float) -> list[float]:
        monkeypatch.setattr(KernelRoutes, "mtus", lambda *_: ask(seconds))
        asked.clear()
        for _ in range(60):
            now[0] += 1.0
            surroundings.refresh()
        return [later - earlier for earlier, later in pairwise(asked)]

    clocks = SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: spent[0])
    monkeypatch.setattr(module, "time", clocks)
    with closing(Surroundings(SETTINGS)) as surroundings:
        assert asked_in_a_minute(0.001) == [5.0] * 11
        assert asked_in_a_minute(0.4) == [20.0] * 2


def test_a_port_is_no_interface_beside_its_bridge() -> None:
    """The settings name both: datagrams of the port would be copied a second time on the bridge."""
    settings = Settings(offload=Offload(interfaces=("bridge", "port")))
    with Host() as relay, Host() as exporter, relay.entered(), closing(Surroundings(settings)) as found:

        def interfaces() -> set[str]:
            found.apply_events()
            return {*found.gather({}).interfaces}

        with veth(End(relay, "port"), End(exporter, "far")):
            wait_until(lambda: interfaces() == {"port"}, "the port is seen")
            bridge = End(relay, "bridge", mac="02:00:00:00:00:09")
            bridge.make("bridge")
            wait_until(lambda: interfaces() == {"bridge", "port"}, "both are seen")
            relay.run("ip", "link", "set", "dev", "port", "master", "bridge")
            wait_until(lambda: interfaces() == {"bridge"}, "it is a port of the bridge")
            relay.run("ip", "link", "set", "dev", "port", "nomaster")
            wait_until(lambda: interfaces() == {"bridge", "port"}, "it is not any more")
            bridge.remove()


def test_an_interface_is_none_beside_one_that_stands_upon_it() -> None:
    """At any depth: a bridge has what arrives by the link of a macvlan that is its port. The log names both, once."""
    settings = Settings(offload=Offload(interfaces=("bridge", "link")))
    with Host() as relay, Host() as exporter, relay.entered(), closing(Surroundings(settings)) as found:

        def interfaces() -> set[str]:
            found.apply_events()
            return {*found.gather({}).interfaces}

        with veth(End(relay, "link"), End(exporter, "far")), capture_logs() as logs:
            between = End(relay, "between", mac="02:00:00:00:00:08")
            between.make("macvlan", "mode passthru", over="link")
            End(relay, "bridge", mac="02:00:00:00:00:09").make("bridge")
            wait_until(lambda: interfaces() == {"bridge", "link"}, "both are seen")
            assert logs == []
            relay.run("ip", "link", "set", "dev", "between", "master", "bridge")
            wait_until(lambda: interfaces() == {"bridge"}, "the bridge has what arrives by the link")
            (line,) = logs
            assert (line["not_by"], line["copied_by"]) == ("link", "bridge")
            between.remove()
            wait_until(lambda: interfaces() == {"bridge", "link"}, "they have nothing in common any more")


def test_no_copy_comes_from_an_address_that_this_host_has_no_more() -> None:
    """The forwarder's socket keeps it until it sends, and has it again if it is back by then."""
    with Host() as relay, relay.entered(), closing(Surroundings(SETTINGS)) as found:
        relay.run("ip", "address", "add", "10.5.0.1/32", "dev", "lo")
        siem = "127.0.0.9", 514

        def relays() -> Mapping[Place, Place]:
            found.apply_events()
            found.sockets_changed([siem])
            return found.gather({}).relays

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forwarder:
            forwarder.bind(("10.5.0.1", 7000))
            forwarder.connect(siem)
            for wanted in ({siem: ("10.5.0.1", 7000)}, {}, {siem: ("10.5.0.1", 7000)}):
                wait_until(lambda wanted=wanted: relays() == wanted, lambda: f"the source is known: {relays()}")  # type: ignore[misc]
                relay.run("ip", "address", "del" if wanted else "add", "10.5.0.1/32", "dev", "lo")


def test_the_source_of_a_relay_stays_where_another_program_sends_to_the_same_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`logger -d` and `fanwire replay` connect sockets to it, too; the forwarder's goes on until it is closed."""
    siem, found = ("127.0.0.9", 514), list[UdpSocket]()
    monkeypatch.setattr(module, "udp_sockets", lambda: found)
    for pause in ("SOON_SECONDS", "SETTLED_SECONDS"):
        monkeypatch.setattr(module, pause, 0.0)
    with closing(Surroundings(SETTINGS)) as surroundings:
        for ports, source in (([7000], 7000), ([8000, 7000], 7000), ([7000, 8000], 7000), ([8000], 8000)):
            found[:] = [UdpSocket("127.0.0.1", port, *siem, 0, 0) for port in ports]
            surroundings.sockets_changed([siem])
            assert surroundings.gather({}).relays[siem] == ("127.0.0.1", source)


def test_sockets_are_looked_at_often_until_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells of them: a look each second is enough then, and four a second where a collector has none."""
    siem, found, looks, now = ("127.0.0.9", 514), list[UdpSocket](), list[float](), [100.0]

    def look() -> list[UdpSocket]:
        looks.append(now[0])
        return found

    monkeypatch.setattr(module, "udp_sockets", look)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with closing(Surroundings(SETTINGS)) as surroundings:

        def look_for(seconds: float) -> int:
            before = len(looks)
            for _ in range(int(seconds * 16)):
                now[0] += 1 / 16
                surroundings.sockets_changed([siem])
            return len(looks) - before

        assert not surroundings.is_settled([siem])
        assert look_for(4) == 16
        found.append(UdpSocket("127.0.0.1", 7000, *siem, 0, 0))
        look_for(1)
        assert surroundings.is_settled([siem])
        assert look_for(4) == 4
        found.clear()  # a forwarder that is killed
        look_for(1)
        assert look_for(4) == 16


def test_names_of_listeners_are_looked_up_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload waits for no resolver; the answer is a change of the facts, and the listener is among them then."""
    may_answer = Event()

    def resolver(_host: str, port: int, *_: object) -> object:
        may_answer.wait(60)
        return [(socket.AF_INET, ("10.1.0.7", port))]

    with Host() as relay, relay.entered(), closing(Surroundings(Settings(streams=()))) as surroundings:
        relay.add_address("10.1.0.7/32", "lo")
        monkeypatch.setattr("shared.net.host_lookups.resolve", resolver)
        surroundings.apply_settings(Settings(streams=(Stream(name="a", listen=("udp://a.test:514",)),)))
        surroundings.apply_events()
        assert surroundings.gather({}).listeners == {"a": set()}
        may_answer.set()
        wait_until(surroundings.apply_events, "the answer is a change")
        assert surroundings.gather({}).listeners == {"a": {("10.1.0.7", 514)}}

import socket
from contextlib import closing
from threading import Event
from types import SimpleNamespace

import pytest

from services.offload.planning import surroundings as module
from services.offload.planning.planner import Way
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
                found[:] = [surroundings.gather({}).way_to("10.1.0.2")]
                return isinstance(found[0], Way)

            wait_until(is_known, lambda: f"the neighbour is known: {found}")
            macs = [bytes.fromhex(end.link_address.replace(":", "")) for end in (far, near)]
            assert found == [Way(int(relay.link("near")["ifindex"]), macs[0], macs[1], 1400)]
            way_to = facts.way_to
            assert way_to("10.1.0.1") == "it is on this host"
            assert way_to("192.0.2.1") == "there is no route to it"
            assert way_to("10.1.0.77") == "the link address of its next hop is not known"
            with tunnel(End(relay, "tun", "10.5.0.1/24"), End(siem, "tun", "10.5.0.2/24")):
                wait_until(
                    lambda: (
                        (surroundings.apply_events(), surroundings.gather({}))[1].way_to("10.5.0.2")
                        == "the link to it is not Ethernet"
                    ),
                    "the tunnel is seen",
                )
            siem.run("ip", "link", "set", "dev", "far", "down")
            wait_until(
                lambda: (
                    (surroundings.apply_events(), surroundings.gather({}))[1].way_to("10.1.0.2")
                    in ("the link to it is down", "there is no route to it")
                ),
                "the link is seen to be down",
            )
        surroundings.close()


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

    with closing(Surroundings(Settings(streams=()))) as surroundings:
        monkeypatch.setattr("shared.net.host_lookups.resolve", resolver)
        surroundings.apply_settings(Settings(streams=(Stream(name="a", listen=("udp://a.test:514",)),)))
        surroundings.apply_events()
        assert surroundings.gather({}).listeners == {"a": set()}
        may_answer.set()
        wait_until(surroundings.apply_events, "the answer is a change")
        assert surroundings.gather({}).listeners == {"a": {("10.1.0.7", 514)}}

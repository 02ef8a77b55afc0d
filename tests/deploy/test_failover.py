"""The address that exporters send to moves between relays, as deploy/ha has it, with real keepalived and BIRD."""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from deploy.ha.cluster.traffic import CAME, SILENCE_NS, Counted, Sent
from tests.deploy.failover import (
    HA,
    Relay,
    Segment,
    collectors,
    exporters,
    figures,
    host_at,
    need,
    need_root,
    relay,
)
from tests.documents import block
from tests.network import End, Host, veth
from tests.stack import CHECKOUT, wait_until

VIP, SIEM, ANYCAST, ROUTER = "10.20.0.10", "10.20.0.20", "192.0.2.50", "10.20.0.1"
NODES: Final = ("10.20.0.11", "10.20.0.12")
SERVICES: Final = ("broker", "gateway", "forwarder", "ingest", "console")
SETTINGS: Final = f"""
[[stream]]
name = "syslog"
listen = ["udp://0.0.0.0:5514"]
[[collector]]
name = "siem"
streams = ["syslog"]
address = "{SIEM}"
port = 9514
"""
REPLYING: Final = f"""
[[stream]]
name = "ask"
listen = ["udp://{VIP}:515"]
reply = "here"
reply_beyond_loopback = true
"""
ROUTER_CONF: Final = f"""
router id {ROUTER};
protocol device {{ }}
protocol kernel {{ merge paths on; ipv4 {{ export where source = RTS_BGP; }}; }}
protocol bfd {{ interface "*" {{ interval 100 ms; multiplier 3; }}; }}
template bgp relay {{ local {ROUTER} as 65000; bfd; error wait time 1, 5; ipv4 {{ import all; export none; }}; }}
protocol bgp a from relay {{ neighbor {NODES[0]} as 65010; }}
protocol bgp b from relay {{ neighbor {NODES[1]} as 65010; }}
"""
"""A router whose routes to the address have equal cost."""
SOURCES: Final = " ".join(f"10.20.1.{number}/16" for number in range(1, 201))
SETTLE_SECONDS: Final = 1.0


class World:
    """Two relays, exporters that send to one address, and a collector; a router, where there is one."""

    def __init__(
        self, relays: list[Relay], sent: Sent, rate: int, siem: Counted, serving: Callable[[], list[Relay]], most: int
    ) -> None:
        self.relays, self.sent, self.rate, self.siem = relays, sent, rate, siem
        self.exporters: Host | None = None
        self.serving = serving
        """Returns the relays that the network sends datagrams to: `most` while all is well."""
        self._most = most

    def others(self, than: Relay) -> Callable[[], bool]:
        """Return a condition: the other relay alone gets datagrams."""
        return lambda: self.serving() == [each for each in self.relays if each is not than]

    def is_whole(self) -> bool:
        """Return whether both relays could take over."""
        return len(self.serving()) == self._most and all(map(is_preferred, self.relays))

    def lose(self, event: Callable[[], object], over: Callable[[], object], what: str) -> dict[str, float]:
        """Do something that loses datagrams; return the figures from just before until a while after it is over."""
        self.siem.state[SILENCE_NS] = 0
        first = self.sent.count - self.rate // 10
        event()
        wait_until(over, what)
        time.sleep(SETTLE_SECONDS)
        return figures(self.siem, self.settled(self.sent.count, first), self.rate, first)

    def settled(self, sent: int, first: int) -> int:
        """Wait until no more of what was sent comes late; return `sent`."""
        before = -1
        while (now := len(self.siem.lost(sent, first))) != before:
            before = now
            time.sleep(SETTLE_SECONDS if now else 0)
        return sent

    def end(self) -> dict[str, float]:
        """Send no more; return the figures of the whole run once the last ones have come."""
        self.sent.stop()
        time.sleep(SETTLE_SECONDS)
        return figures(self.siem, self.settled(self.sent.count, 0), self.rate)

    def flows(self) -> None:
        """Wait until datagrams come."""
        came = int(self.siem.state[CAME])
        wait_until(lambda: int(self.siem.state[CAME]) > came, "datagrams come")


@contextmanager
def keepalived(rate: int) -> Iterator[World]:
    """Relays that share the address by keepalived."""
    program = need_root("keepalived")
    need("curl")
    with ExitStack() as opened:
        segment = Segment(opened)
        sources = opened.enter_context(host_at(segment, SOURCES))
        sink = opened.enter_context(host_at(segment, f"{SIEM}/16"))
        relays = [opened.enter_context(relay(segment, f"{node}/16", SETTINGS + REPLYING)) for node in NODES]
        for each, node in zip(relays, NODES, strict=True):
            each.host.sysctl("net.ipv4.ip_nonlocal_bind", 1)
            each.start(*SERVICES)
            conf = configured(each.stack.directory, node)
            files = [str(each.stack.directory / f"{name}.pid") for name in ("keepalived", "vrrp")]
            each.spawn("keepalived", program, "-nlD", "-f", str(conf), "-p", files[0], "-r", files[1])
        directory = relays[0].stack.directory
        (siem,) = opened.enter_context(collectors(sink, directory, SIEM, [9514]))
        wait_until(lambda: len(holders(relays)) == 1, "one has the address")
        sent = opened.enter_context(exporters(sources, directory, "10.20.1.1", f"{VIP}:5514", rate))
        world = World(relays, sent, rate, siem, lambda: holders(relays), 1)
        world.exporters = sources
        wait_until(world.is_whole, lambda: relays[0].stack["keepalived"].text)
        world.flows()
        yield world


def configured(directory: Path, node: str) -> Path:
    """Write keepalived.conf for a node, with nothing but addresses and the place of the check changed."""
    text = (HA / "keepalived.conf").read_text()
    install = block("deploy/ha/README.md", "ha-install").replace("/usr/local/bin/", f"{directory}/")
    subprocess.run(install, shell=True, cwd=CHECKOUT, check=True)
    peer = next(each for each in NODES if each != node)
    text = re.sub(r"^\$THIS=.*$", f"$THIS={node}", text, flags=re.MULTILINE)
    text = re.sub(r"^\$PEER=.*$", f"$PEER={peer}", text, flags=re.MULTILINE)
    path = directory / "keepalived.conf"
    path.write_text(text.replace("/usr/local/bin", str(directory)))
    return path


@pytest.mark.parametrize("program", ["keepalived", "bird"])
def test_files_are_sound(lab: None, tmp_path: Path, program: str) -> None:
    """The programs' own checks find nothing wrong with the files, and do find a mistake."""
    found = need_root(program) if program == "keepalived" else need(program)
    path = HA / f"{program}.conf"
    command = [found, *({"keepalived": ["-t", "-f"], "bird": ["-p", "-c"]}[program])]
    with Host() as host, host.entered():
        End(host, "eth0").make("bridge")  # keepalived wants to know the interface
        sound = tmp_path / "sound.conf"
        sound.write_text(path.read_text().replace("/usr/local/bin/fanwire-ready", str(HA / "fanwire-ready")))
        done = subprocess.run([*command, sound], capture_output=True, text=True, check=False)
        # keepalived 2.2.7 ends by SIGTERM after a sound file with scripts of other users.
        assert (done.stdout, done.stderr, done.returncode in (0, -signal.SIGTERM)) == ("", "", True)
        broken = tmp_path / "broken.conf"
        broken.write_text(sound.read_text().replace("interface", "interfaces").replace("neighbor", "neighbour"))
        assert subprocess.run([*command, broken], capture_output=True, text=True, check=False).stderr


def test_readme_agrees_with_files() -> None:
    """The file by which a relay hands over, and the paths of programs, are the same in README and files."""
    _, standby = block("deploy/ha/README.md", "ha-switch").split()
    assert f":-{standby}}}" in (HA / "fanwire-ready").read_text()
    *_, place = block("deploy/ha/README.md", "ha-install").split()
    for name, program in (("keepalived.conf", "fanwire-ready"), ("fanwire-announce.service", "fanwire-announce")):
        assert f"{place}{program}" in (HA / name).read_text()


def holders(relays: list[Relay]) -> list[Relay]:
    """Return the relays that have the address."""
    return [each for each in relays if f" {VIP}/" in each.host.run("ip", "-4", "address", "show", "dev", "eth0")]


def replies(world: World) -> bool:
    """Return whether an answer comes from the address that was asked: a connected socket takes no other."""
    assert world.exporters is not None
    with world.exporters.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(60)
        sock.connect((VIP, 515))
        sock.send(b"who?")
        return sock.recv(100) == b"here"


def is_preferred(each: Relay) -> bool:
    """Return whether keepalived, where it runs, has last found its relay ready."""
    told = [re.findall(r"VRRP_Script.ready. (\w+)", running.text) for running in each.stack.running
            if running.name == "keepalived"]  # fmt: skip
    return all(changes and changes[-1] == "succeeded" for changes in told)


@pytest.mark.soak
def test_the_address_moves(lab: None) -> None:
    """A switch that was asked for loses next to nothing, the death of a relay a second; who returns takes nothing."""
    with keepalived(3000) as world:
        (first,) = holders(world.relays)
        planned = world.lose(first.standby.touch, world.others(first), "the address moves")
        assert planned["gap"] < 1
        (second,) = holders(world.relays)
        assert replies(world)
        unready = world.lose(second.standby.touch, lambda: not is_preferred(second), "it is unready")
        assert len(holders(world.relays)) == 1  # both are unready now, and one of them has the address
        second.standby.unlink()
        wait_until(lambda: is_preferred(second) and holders(world.relays) == [second], "who is ready has the address")
        first.standby.unlink()
        wait_until(world.is_whole, "both are ready again")
        (third,) = holders(world.relays)
        killed = world.lose(third.kill, world.others(third), "the address moves")
        assert 0 < killed["gap"] < 10
        whole = world.end()
        assert whole["doubled"] == 0
        assert whole["lost"] <= planned["lost"] + unready["lost"] + killed["lost"]


@contextmanager
def anycast(rate: int) -> Iterator[World]:
    """Relays that announce the address to a router by BIRD, and exporters behind that."""
    bird, birdc = need_root("bird"), need("birdc")
    need("curl")
    with ExitStack() as opened:
        segment = Segment(opened)
        router = opened.enter_context(host_at(segment, f"{ROUTER}/16"))
        router.forward()
        sources = opened.enter_context(Host())
        addresses = " ".join(f"10.30.1.{number}/16" for number in range(1, 201))
        opened.enter_context(veth(End(sources, "eth0", addresses), End(router, "out", "10.30.0.254/16")))
        sources.route(f"{ANYCAST}/32", via="10.30.0.254")
        sink = opened.enter_context(host_at(segment, f"{SIEM}/16"))
        relays = [opened.enter_context(relay(segment, f"{node}/16", SETTINGS)) for node in NODES]
        directory = relays[0].stack.directory
        (directory / "router.conf").write_text(ROUTER_CONF)
        with router.entered():
            relays[0].stack.spawn("router", [bird, "-f", "-c", "router.conf", "-s", "router.ctl", "-P", "router.pid"])
        for each, node in zip(relays, NODES, strict=True):
            each.host.run("ip", "address", "add", f"{ANYCAST}/32", "dev", "lo")
            each.start(*SERVICES)
            text = (HA / "bird.conf").read_text().replace("RELAY_IP = 10.20.0.11", f"RELAY_IP = {node}")
            (each.stack.directory / "bird.conf").write_text(text)
            each.spawn("bird", bird, "-f", "-c", "bird.conf", "-s", "bird.ctl", "-P", "bird.pid")
            each.spawn("announce", "env", f"BIRDC={birdc} -s bird.ctl", str(HA / "fanwire-announce"))
        (siem,) = opened.enter_context(collectors(sink, directory, SIEM, [9514]))
        wait_until(lambda: len(announced(relays, router)) == 2, "the router has both")
        sent = opened.enter_context(exporters(sources, directory, "10.30.1.1", f"{ANYCAST}:5514", rate))
        world = World(relays, sent, rate, siem, lambda: announced(relays, router), 2)
        world.flows()
        yield world


def announced(relays: list[Relay], router: Host, network: str = f"{ANYCAST}/32") -> list[Relay]:
    """Return the relays that a router sends to."""
    via = re.findall(r"via (\S+)", router.run("ip", "route", "show", network))
    return [each for each, node in zip(relays, NODES, strict=True) if node in via]


@pytest.mark.soak
def test_the_address_is_announced_while_ready(lab: None) -> None:
    """A relay withdraws the address before it stops, which loses nothing; one that dies is withdrawn in a second."""
    with anycast(3000) as world:
        first, second = world.relays
        planned = world.lose(first.standby.touch, world.others(first), "the first is withdrawn")
        assert planned["lost"] == 0
        # Where none is ready, the network around the address leads to both.
        unready = world.lose(second.standby.touch, lambda: not world.serving(), "the second is withdrawn too")
        assert unready["lost"] == 0
        second.standby.unlink()
        wait_until(world.others(first), "it is announced again")
        first.standby.unlink()
        wait_until(lambda: len(world.serving()) == 2, "both are")
        killed = world.lose(second.kill, world.others(second), "the dead one is withdrawn")
        assert 0 < killed["gap"] < 10
        whole = world.end()
        assert whole["doubled"] == 0
        assert whole["lost"] <= killed["lost"]


@contextmanager
def dual_feed(rate: int) -> Iterator[World]:
    """Relays that both get everything, and both send it."""
    with ExitStack() as opened:
        segment = Segment(opened)
        sources = opened.enter_context(host_at(segment, SOURCES))
        sink = opened.enter_context(host_at(segment, f"{SIEM}/16"))
        relays = [opened.enter_context(relay(segment, f"{node}/16", SETTINGS)) for node in NODES]
        for each in relays:
            each.start(*SERVICES)
        directory = relays[0].stack.directory
        (siem,) = opened.enter_context(collectors(sink, directory, SIEM, [9514]))
        both = ",".join(f"{node}:5514" for node in NODES)
        sent = opened.enter_context(exporters(sources, directory, "10.20.1.1", both, rate))
        world = World(relays, sent, rate, siem, lambda: relays, 2)
        world.flows()
        yield world


EVENTS: Final = ("switch", "node gone", "relay killed")


@pytest.mark.soak
@pytest.mark.parametrize("way", [keepalived, anycast, dual_feed])
def test_losses_at_30_000_a_second(lab: None, way: Callable[[int], AbstractContextManager[World]]) -> None:
    """Prints what a switch, a node without network and a dead relay cost; between those nothing is lost."""
    with way(30_000) as world:
        lost = 0
        for event in EVENTS * 5:
            relay = world.serving()[0]
            over = world.others(relay) if way is not dual_feed else lambda: True
            if event == "switch":
                told = world.lose(relay.standby.touch, over, "another one serves")
                relay.standby.unlink()
            elif event == "node gone":
                told = world.lose(partial(cable, relay, "down"), over, "another one serves")
                cable(relay, "up")
            else:
                told = world.lose(relay.kill, over, "another one serves")
                relay.start(*SERVICES)
            print(f"{way.__name__}, {event}: {told}")
            lost += int(told["lost"])
            wait_until(world.is_whole, "all is as before")
        whole = world.end()
        print(f"{way.__name__}, all of {world.sent.count}: {whole}")
        assert whole["lost"] == lost


def cable(relay: Relay, state: str) -> None:
    """Plug or unplug a relay's network."""
    relay.host.run("ip", "link", "set", "eth0", state)

"""Three nodes of a cluster, each a relay and a NATS server, with an address that they share, and 12 collectors."""

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import Final

import numpy as np

from deploy.ha.cluster.layout import nats
from deploy.ha.cluster.traffic import CAME, SILENCE_NS, Counted, Numbers, Sent
from shared.ledger.counters import PERHAPS_TWICE
from tests.builders import BusEnds, accounts_when
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
from tests.deploy.taps import Taps, taps
from tests.stack import ask_json, wait_until

NODES: Final = {"a": "10.20.0.11", "b": "10.20.0.12", "c": "10.20.0.13"}
ADDRESS, SIEM, FIRST = "10.20.0.10", "10.20.0.20", "10.20.1.1"
EXPORTERS: Final = " ".join(f"10.20.1.{number}/16" for number in range(1, 201))
RELAYED, ORIGINAL = range(9500, 9506), range(9510, 9516)
SERVICES: Final = ("broker", "gateway", "forwarder", "transmitter", "uplink", "ingest", "console")
CALM_SECONDS: Final = 6.0
"""After an event, before figures are taken."""


class Cluster:
    """The nodes, what was sent, and what each collector got."""

    def __init__(
        self, nodes: dict[str, Relay], sent: Sent, counted: dict[int, Counted], rate: int, arrived: Taps
    ) -> None:
        self.nodes, self.sent, self.counted, self.rate, self.arrived = nodes, sent, counted, rate, arrived
        self.began = 0
        self._twice: dict[tuple[str, int], int] = {}
        """The copies to a collector that each node has counted as `perhaps_twice`, as it told last."""
        self.answered: set[str] = set()
        """Names whose registration was answered with `ok`."""

    def holder(self) -> str:
        """Return the node that has the address."""
        found = [
            name
            for name, node in self.nodes.items()
            if f" {ADDRESS}/" in node.host.run("ip", "-4", "address", "show", "dev", "eth0")
        ]
        return found[0] if len(found) == 1 else ""

    def moved_from(self, name: str) -> bool:
        """Return whether another node has the address."""
        return self.holder() not in ("", name)

    def register(self, node: str) -> bool:
        """Sign a client up at a node; return whether that was answered with `ok`."""
        name = f"client-{node}-{random.getrandbits(32):08x}"
        with self.nodes[node].host.entered():
            try:
                answer = ask_json({"op": "register", "name": name})
            except (OSError, ValueError):
                return False
        if answer["ok"]:
            self.answered.add(name)
        return bool(answer["ok"])

    def listed(self, node: str) -> set[str]:
        """Return the names that a node lists."""
        with self.nodes[node].host.entered():
            return set(ask_json({"op": "list"})["clients"])

    def suffer(self, name: str, event: Callable[[], object], over: Callable[[], object]) -> dict[int, dict[str, float]]:
        """Do something to a node; return each collector's figures, by its port, until a while after it is over."""
        began = self.sent.count
        first = began - self.rate
        before = {port: each.doubled() for port, each in self.counted.items()}
        twice = self.perhaps_twice()
        for each in self.counted.values():
            each.state[SILENCE_NS] = 0
        event()
        wait_until(over, self.state, 120)
        time.sleep(CALM_SECONDS)
        sent = self.sent.count
        time.sleep(CALM_SECONDS)
        told = {port: figures(each, sent, self.rate, first) for port, each in self.counted.items()}
        lost = {port: each.lost(sent, first) for port, each in self.counted.items()}
        by_all = reduce(np.intersect1d, lost.values())
        now_twice = self.perhaps_twice()
        return {
            port: told[port]
            | {"doubled": told[port]["doubled"] - before[port], "perhaps twice": now_twice[port] - twice[port]}
            | self.fates(lost[port], by_all, name, began)
            for port in told
        }

    def fates(self, lost: Numbers, by_all: Numbers, name: str, began: int) -> dict[str, float]:
        """Tell lost datagrams apart by the link that they got to, at which time.

        `held`: the node had them when it began. `astray`: nobody took them in, as they were sent while the address
        moved. `living`: another node took them in, and this collector alone has not got them, which is a fault.
        """
        held = self.arrived.at(name, lost[lost < began])
        living = np.unique(np.concatenate([self.arrived.at(other, lost) for other in self.nodes if other != name]))
        living = np.setdiff1d(living, by_all)
        return {"held": len(held), "living": len(living), "astray": len(lost) - len(held) - len(living)}

    def perhaps_twice(self) -> Counter[int]:
        """Return what nodes have counted of each collector's copies as `perhaps_twice`, by its port."""
        for name, node in self.nodes.items():
            if node.stack["broker"].process.poll() is None:
                with BusEnds(node.stack.bus) as bus:
                    for service in ("forwarder.1", "transmitter.1"):
                        for account, counts in accounts_when(bus, service, bool).items():
                            if account.startswith("collector/at"):
                                self._twice[name, int(account[-4:])] = counts.get(PERHAPS_TWICE, 0)
        found: Counter[int] = Counter()
        for (_, port), count in self._twice.items():
            found[port] += count
        return found

    def end(self) -> int:
        """Send no more, and wait for what comes late; return the number of datagrams that were sent."""
        self.sent.stop()
        before = -1
        while (now := sum(int(each.state[CAME]) for each in self.counted.values())) != before:
            before = now
            time.sleep(CALM_SECONDS)
        return self.sent.count

    def totals(self) -> dict[int, dict[str, float]]:
        """Return each collector's figures since `began`, the number from which on all collectors get copies."""
        return {port: figures(each, self.sent.count, self.rate, self.began) for port, each in self.counted.items()}

    def kill(self, name: str) -> None:
        """Kill relay and NATS server of a node, all at once."""
        mortal = [each for each in self.nodes[name].stack.running if each.name != "keepalived"]
        for each in mortal:
            if each.process.poll() is None:
                each.process.send_signal(signal.SIGKILL)
        for each in mortal:
            each.process.wait(30)

    def start(self, name: str) -> None:
        """Start relay and NATS server of a node."""
        directory = self.nodes[name].stack.directory
        self.nodes[name].spawn("nats", need("nats-server"), "-c", str(directory / "nats.conf"))
        self.nodes[name].start(*SERVICES)

    def stop(self, name: str) -> None:
        """Let a node hand over, then end relay and NATS server, as for an upgrade."""
        node = self.nodes[name]
        node.standby.touch()
        wait_until(partial(self.moved_from, name), "another node has the address")
        services = [node.stack[service] for service in SERVICES]
        for each in services:
            each.process.send_signal(signal.SIGTERM)
        for each in services:
            each.process.wait(30)
        node.stack["nats"].stop(signal.SIGTERM)

    def upgrade(self, name: str) -> None:
        """Stop a node and start it again, perhaps as another version."""
        self.stop(name)
        self.start(name)
        self.nodes[name].standby.unlink()
        wait_until(self.nodes[name].is_ready, "the node is ready")

    def part(self, name: str, seconds: float) -> None:
        """Part a node from all others for a while."""
        link = ("ip", "link", "set", "eth0")
        self.nodes[name].host.run(*link, "down")
        time.sleep(seconds)
        self.nodes[name].host.run(*link, "up")

    def state(self) -> str:
        """Return the reasons that nodes give for not being ready."""
        asked = {
            name: node.host.run("curl", "-s", "http://127.0.0.1:8080/readyz").strip()
            for name, node in self.nodes.items()
        }
        return f"all nodes are ready; {self.holder() or 'none'} has the address, {asked}"

    def is_whole(self) -> bool:
        """Return whether all nodes are ready."""
        return bool(self.holder()) and all(node.is_ready() for node in self.nodes.values())


@contextmanager
def three_nodes(rate: int) -> Iterator[Cluster]:
    """Start all; datagrams flow to every collector when this is entered."""
    keepalived = need_root("keepalived")
    need("nats-server")
    with ExitStack() as opened:
        segment = Segment(opened)
        sources = opened.enter_context(host_at(segment, EXPORTERS))
        sink = opened.enter_context(host_at(segment, f"{SIEM}/16"))
        nodes = {name: opened.enter_context(relay(segment, f"{at}/16", settings(name))) for name, at in NODES.items()}
        for name, node in nodes.items():
            (node.stack.directory / "nats.conf").write_text(nats(name, NODES, node.stack.directory))
            (node.stack.directory / "keepalived.conf").write_text(shared_address(name))
        directory = nodes["a"].stack.directory
        counted = dict(zip(RELAYED, opened.enter_context(collectors(sink, directory, SIEM, RELAYED)), strict=True))
        original = opened.enter_context(collectors(sink, directory, SIEM, ORIGINAL, FIRST))
        counted |= dict(zip(ORIGINAL, original, strict=True))
        sent = Sent(directory / "sent", new=True)
        arrived = opened.enter_context(taps(directory / "taps", {name: node.host for name, node in nodes.items()}))
        cluster = Cluster(nodes, sent, counted, rate, arrived)
        for name in nodes:
            cluster.start(name)
        for node in nodes.values():
            files = [str(node.stack.directory / name) for name in ("keepalived.conf", "keepalived.pid", "vrrp.pid")]
            node.spawn("keepalived", keepalived, "-nlD", "-f", files[0], "-p", files[1], "-r", files[2])
        wait_until(cluster.is_whole, cluster.state, 120)
        time.sleep(CALM_SECONDS)  # streams of JetStream and their consumers are made
        cluster.sent = opened.enter_context(exporters(sources, directory, FIRST, f"{ADDRESS}:514", rate))
        wait_until(lambda: all(each.state[CAME] for each in counted.values()), "all collectors get some", 120)
        cluster.began = cluster.sent.count
        yield cluster


def settings(name: str) -> str:
    """Return the settings of a relay."""
    servers = [NODES[name], *(at for other, at in NODES.items() if other != name)]
    named = ", ".join(f'"nats://{at}:4222"' for at in servers)
    sites = ", ".join(f'"{other}"' for other in NODES)
    text = f"""
[uplink]
servers = [{named}]
plain_beyond_loopback = true
site = "{name}"
replicas = 3
keep_bytes = {1 << 30}
nodes = [{sites}]
registry = "try"
[[stream]]
name = "syslog"
listen = ["udp://0.0.0.0:514"]
"""
    for source, ports in (("relay", RELAYED), ("original", ORIGINAL)):
        for port in ports:
            text += f'[[collector]]\nname = "at{port}"\nstreams = ["syslog"]\n'
            text += f'address = "{SIEM}"\nport = {port}\nsource = "{source}"\n'
    return text


def shared_address(name: str) -> str:
    """Return deploy/ha/keepalived.conf for one of three nodes."""
    text = (HA / "keepalived.conf").read_text()
    peers = "\n    ".join(at for other, at in NODES.items() if other != name)
    missed = str(3 + 2 * list(NODES).index(name))
    for variable, value in {"THIS": NODES[name], "ADDRESS": f"{ADDRESS}/16", "MISSED": missed}.items():
        text = re.sub(rf"^\${variable}=.*$", f"${variable}={value}", text, flags=re.MULTILINE)
    return text.replace("    $PEER\n", f"    {peers}\n").replace(
        "/usr/local/bin/fanwire-ready", str(HA / "fanwire-ready")
    )


def ranges(told: dict[int, dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return the least and the most that any collector lost, had doubled, and so on."""
    return {
        name: (min(each[name] for each in told.values()), max(each[name] for each in told.values()))
        for name in next(iter(told.values()))
    }

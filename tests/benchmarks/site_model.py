"""A model of many sites on one NATS cluster: what each part has to do, and which of them is full first.

`python -m tests.benchmarks.site_model` prints the tables of deploy/ha/SCALE.md. Costs are CPU, as
`tests.benchmarks.sites` measures them with one, two and three servers; `MEASURED` has a run of it. All rates are
datagrams a second.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Final, NamedTuple


class Cost(NamedTuple):
    """CPU in µs: of each datagram, and of each message however much is in it."""

    datagram: float
    message: float

    def of(self, datagrams: float, messages: float) -> float:
        """Return the cores that are busy with so many of both a second."""
        return (self.datagram * datagrams + self.message * messages) / 1e6


OUT: Final = Cost(0.2, 520)
"""The uplink of a site that sends; of a message also all that it reads from the bus for it."""
IN: Final = Cost(0.6, 230)
"""The uplink of a site that receives."""
SERVERS: Final[Mapping[int, Cost]] = {1: Cost(0.8, 400), 2: Cost(1.3, 1250), 3: Cost(1.8, 1650)}
"""All servers together, by the copies that JetStream keeps; for one site that sends and one that receives."""
DELIVERY: Final = Cost(0.3, 120)
"""Each further site that receives, at the servers: a part of the above, by what a server reads and sends for it."""
LOCAL, COPY = Cost(1.0, 0), 0.7
"""Costs of a datagram at a relay without an uplink, and each copy of it, in µs (tests/benchmarks/README.md)."""
MESSAGE_BYTES, ROW_BYTES, HEAD_BYTES = 450_000, 20, 300
DISK_BYTES: Final = 420e6
"""Bytes a second that one disk of these machines writes, with `sync_interval: always`."""
LEADER: Final = 345_000
"""Datagrams of 220 bytes a second that one stream of three copies took, all of it on two cores; of full messages."""
FULL: Final = 0.7
"""The part of anything that is to be used in the steady state: the rest is for catching up."""


@dataclass(frozen=True)
class Plan:
    """Sites that send all they have to each other, or to `receivers` of them."""

    sites: int = 3
    exporters: int = 200
    per_exporter: float = 150.0
    size: int = 220
    collectors: int = 12
    receivers: int = 1
    """Other sites that receive each site's streams."""
    relays: int = 1
    """Relays of a site, each with a part of its exporters."""
    streams: int = 1
    """Streams in JetStream of a site, with a leader each."""
    workers: int = 1
    """Workers of ingest at each site."""
    fill_seconds: float = 0.005
    """`[uplink] fill_ms`: a worker sends one message in so long a time at the most, unless it is full."""
    nodes: int = 3
    copies: int = 3
    cores: int = 8
    """Cores of a relay, and of a node of the cluster."""
    link_bits: float = 1e9
    node_bits: float = 10e9

    @property
    def rate(self) -> float:
        """Datagrams a second of one site."""
        return self.exporters * self.per_exporter

    @property
    def bytes(self) -> float:
        """Bytes a second that one site sends."""
        return self.rate * (self.size + ROW_BYTES) + self.messages * HEAD_BYTES

    @property
    def messages(self) -> float:
        """Messages a second of one site."""
        filled = self.rate * (self.size + ROW_BYTES) / MESSAGE_BYTES
        return min(self.rate, max(filled, self.workers / self.fill_seconds))


class Load(NamedTuple):
    """A part, and how much of it is used: 1 is all of it."""

    part: str
    used: float


def loads(plan: Plan) -> Iterator[Load]:
    """Yield how much is used of each kind of part, at its busiest."""
    yield Load("relay: CPU", (relay_cores(plan) + uplink_cores(plan)) / plan.relays / plan.cores)
    yield Load("relay: uplink, one core", uplink_cores(plan) / plan.relays)
    yield Load("site: link in", plan.bytes * plan.receivers * 8 / plan.link_bits)
    yield Load("site: link out", plan.bytes * 8 / plan.link_bits)
    yield Load("node: CPU", server_cores(plan) / plan.nodes / plan.cores)
    written = plan.bytes * plan.sites * plan.copies
    yield Load("node: disk", written / plan.nodes / DISK_BYTES)
    passed = plan.bytes * plan.sites * (plan.copies - 1 + plan.receivers)
    yield Load("node: network out", passed * 8 / plan.nodes / plan.node_bits)
    yield Load("JetStream: a stream's leader", plan.rate * (plan.size + ROW_BYTES) / plan.streams / (LEADER * 240))


def relay_cores(plan: Plan) -> float:
    """Return the cores that a relay needs without an uplink: its exporters' datagrams and those of other sites."""
    return LOCAL.of(plan.rate * (1 + plan.receivers), 0) + COPY * plan.collectors * plan.rate / 1e6


def uplink_cores(plan: Plan) -> float:
    """Return the cores that an uplink needs, both ways."""
    out = OUT.of(plan.rate, plan.messages)
    return out + IN.of(plan.rate * plan.receivers, plan.messages * plan.receivers)


def server_cores(plan: Plan) -> float:
    """Return the cores that all servers need together."""
    one = SERVERS[plan.copies].of(plan.rate, plan.messages)
    more = DELIVERY.of(plan.rate, plan.messages) * (plan.receivers - 1)
    return plan.sites * (one + more)


def first_full(plan: Plan) -> tuple[Load, float]:
    """Return what is full first as all exporters send more, and how many times the plan's rate that is."""
    low, high = 0.0, 1e9 / max(1.0, plan.rate)
    for _ in range(60):
        middle = (low + high) / 2
        if max(load.used for load in loads(faster(plan, middle))) < FULL:
            low = middle
        else:
            high = middle
    return max(loads(faster(plan, high)), key=lambda load: load.used), high


def faster(plan: Plan, times: float) -> Plan:
    """Return the plan with exporters that send so many times as much."""
    return replace(plan, per_exporter=plan.per_exporter * times)


def sharded(plan: Plan) -> Plan:
    """Return the plan with as many relays, streams and nodes as it needs, so that none is used more than `FULL`."""
    used = {load.part: load.used for load in loads(plan)}
    relays = ceil(max(used["relay: CPU"], used["relay: uplink, one core"]) / FULL)
    streams = ceil(used["JetStream: a stream's leader"] / FULL)
    busiest = max(used["node: CPU"], used["node: disk"], used["node: network out"])
    nodes = max(plan.copies, ceil(plan.nodes * busiest / FULL))
    return replace(plan, relays=plan.relays * relays, streams=plan.streams * max(relays, streams), nodes=nodes)


class Bill(NamedTuple):
    """Needs of a million datagrams a second, from one site to the receiving ones: cores, and bytes a second."""

    relay_cores: float
    uplink_cores: float
    server_cores: float
    disk_bytes: float
    link_bytes: float


def bill(plan: Plan) -> Bill:
    """Return what a plan's sites take for a million datagrams a second of one of them."""
    per = 1e6 / plan.rate
    servers = server_cores(plan) / plan.sites
    disk, link = plan.bytes * plan.copies, plan.bytes * (1 + plan.receivers)
    return Bill(relay_cores(plan) * per, uplink_cores(plan) * per, servers * per, disk * per, link * per)


class Predicted(NamedTuple):
    """CPU in µs a datagram, from one relay to another."""

    out: float
    into: float
    servers: float


def predict(copies: int, rate: float, *, waited: bool = False) -> Predicted:
    """Return what a datagram of 220 bytes costs at a rate; if it has `waited`, messages are full and out of memory."""
    plan = Plan(sites=1, exporters=1, per_exporter=rate, nodes=copies, copies=copies)
    messages = rate * 240 / MESSAGE_BYTES if waited else plan.messages
    out = OUT.datagram if waited else OUT.of(rate, messages) / rate * 1e6
    return Predicted(out, IN.of(rate, messages) / rate * 1e6, SERVERS[copies].of(rate, messages) / rate * 1e6)


MEASURED: Final[Mapping[tuple[int, int], Predicted]] = {
    (1, 5_000): Predicted(9.90, 5.76, 9.40),
    (1, 50_000): Predicted(2.40, 1.57, 2.50),
    (1, 0): Predicted(0.17, 0.62, 0.96),
    (2, 5_000): Predicted(18.37, 11.11, 57.53),
    (2, 50_000): Predicted(2.02, 1.32, 6.17),
    (2, 0): Predicted(0.20, 0.55, 1.65),
    (3, 5_000): Predicted(22.17, 13.96, 86.81),
    (3, 50_000): Predicted(2.19, 1.43, 7.81),
    (3, 0): Predicted(0.23, 0.73, 2.72),
}
"""A run of `tests.benchmarks.sites`, by servers and rate; 0: of what had waited."""
PLANS: Final[Mapping[str, Plan]] = {
    "three sites, one of them receives": Plan(),
    "three sites, each receives the others": Plan(receivers=2),
    "30 sites, received one each": Plan(sites=30),
    "300 sites": Plan(sites=300),
    "300 sites, `fill_ms = 100`": Plan(sites=300, fill_seconds=0.1),
    "300 sites of 5,000 exporters, `fill_ms = 100`": Plan(sites=300, exporters=5000, fill_seconds=0.1, workers=4),
}


def tables() -> Iterator[str]:
    """Yield the rows of the tables in SCALE.md."""
    yield "| datagrams/s | servers | out | in | servers' CPU |"
    yield "| --- | --- | --- | --- | --- |"
    for (servers, rate), measured in MEASURED.items():
        found = predict(servers, rate or 500_000, waited=not rate)
        cells = [f"{one:.2f}, {other:.2f}" for one, other in zip(found, measured, strict=True)]
        yield f"| {f'{rate:,}' if rate else 'had waited'} | {servers} | {' | '.join(cells)} |"
    yield ""
    yield "| plan | datagrams/s of a site | relays, streams a site | nodes | full first then | at |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, plan in PLANS.items():
        needed = sharded(plan)
        (part, _), times = first_full(needed)
        yield (
            f"| {name} | {plan.rate:,.0f} | {needed.relays}, {needed.streams} | {needed.nodes} | {part} "
            f"| {times * plan.rate:,.0f} |"
        )
    yield ""
    yield "| a million datagrams/s | relay | uplinks | servers | disk | links |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for copies in SERVERS:
        each = bill(Plan(copies=copies, collectors=1, per_exporter=1000))
        cores = " | ".join(f"{count:.1f} cores" for count in each[:3])
        rates = f"{each.disk_bytes / 1e6:,.0f} MB/s | {each.link_bytes * 8 / 1e9:.1f} Gbit/s"
        yield f"| {copies} {'copies' if copies > 1 else 'copy'} | {cores} | {rates} |"


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("\n".join(tables()))


if __name__ == "__main__":
    main()

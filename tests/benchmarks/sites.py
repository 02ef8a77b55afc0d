"""Measures the uplink: what a datagram costs it each way, and how late one site's datagrams arrive at another.

`python -m tests.benchmarks.sites` runs two stacks and one NATS server in a network namespace of its own, at steady
rates of 220 bytes. CPU is from /proc/PID/schedstat of each process, lateness from the send call to the receive call of
a collector of the other site. `--servers 3` runs three servers, and JetStream keeps three copies. `--drain N` also
measures how fast N datagrams get from relay to relay that have waited for the servers.
"""

import argparse
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

from tests.benchmarks.site_model import predict
from tests.builders import BusEnds, accounts_when
from tests.lab import enter_lab
from tests.once import made_for_run
from tests.services.uplink.nats import NatsCluster, free_port
from tests.services.uplink.sites import Site, away, exporter, flows, home
from tests.stack import CHECKOUT, wait_until

UDP_SEGMENT: Final = 103
"""Socket option by which the kernel cuts one buffer into datagrams (udp(7))."""
MEMORY: Final = 3 << 30
"""Ceiling of an uplink: what waits in it at the end is to find room."""
SIZE: Final = 220
EXPORTERS: Final = 16
RATES: Final = (100, 1000, 10_000, 30_000, 60_000)
SECONDS: Final = 5.0
TICK: Final = 0.001
MOST: Final = 50
"""Datagrams of one send call."""


def send(port: int, rate: int, seconds: float) -> int:
    """Send datagrams at a steady rate, each with the time; return their number."""
    sockets = [exporter(f"127.0.0.{number + 2}") for number in range(EXPORTERS)]
    for sock in sockets:
        sock.connect(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SIZE)
    sent, began = 0, time.monotonic()
    for sock in itertools.cycle(sockets):
        elapsed = time.monotonic() - began
        if elapsed >= seconds:
            return sent
        due = int(elapsed * rate) - sent
        if due <= 0:
            time.sleep(max(TICK, 1 / rate) / 2)
            continue
        count = min(due, MOST)
        sock.send(time.monotonic_ns().to_bytes(8, "little").ljust(SIZE, b".") * count)
        sent += count
    return sent


def receive(sock: socket.socket, sender: "subprocess.Popen[bytes]") -> list[float]:
    """Return the lateness of each datagram in ms, until the sender has ended and nothing comes any more."""
    late: list[float] = []
    buffer = bytearray(65_536)
    sock.settimeout(1.0)
    while True:
        try:
            sock.recv_into(buffer)
        except TimeoutError:
            if sender.poll() is not None:
                return late
            continue
        late.append((time.monotonic_ns() - int.from_bytes(buffer[:8], "little")) / 1e6)


def measure(a: Site, b: Site, servers: NatsCluster, port: int, collector: socket.socket, rate: int) -> None:
    """Print one row."""
    pids = {"out": [a.uplink.process.pid], "in": [b.uplink.process.pid], "server": servers.pids}
    before = {name: sum(map(cpu_seconds, some)) for name, some in pids.items()}
    command = [sys.executable, "-m", "tests.benchmarks.sites", "--send", f"{port},{rate},{SECONDS}"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) as sender:
        late = receive(collector, sender)
        assert sender.stdout is not None
        sent = int(sender.stdout.read())
    cost = {name: (sum(map(cpu_seconds, some)) - before[name]) / len(late) * 1e6 for name, some in pids.items()}
    out, into, model = predict(len(servers.each), rate)
    p50, p99 = statistics.median(late), statistics.quantiles(late, n=100)[98]
    lost = sent - len(late)
    print(
        f"| {rate:,} | {cost['out']:.2f}, {out:.2f} | {cost['in']:.2f}, {into:.2f} "
        f"| {cost['server']:.2f}, {model:.2f} | {p50:.1f}, {p99:.1f} | {lost} |",
        flush=True,
    )


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in units of 1 ns where the kernel tells them (schedstat)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def received(b: Site) -> int:
    """Return the datagrams of other sites that a site's uplink has put on its bus."""
    with BusEnds(b.bus) as bus:
        found = accounts_when(bus, "uplink.1", lambda accounts: "stream/flows" in accounts)
    return found["stream/flows"]["received"]


def pass_on(a: Site, b: Site, servers: NatsCluster, port: int, count: int) -> float:
    """Print how fast datagrams get from relay to relay that have waited for the servers; return how many a second.

    The servers stand still while they are sent, and both uplinks, so that nothing else needs the cores afterwards.
    """
    had, pids = received(b), {"out": [a.uplink.process.pid], "in": [b.uplink.process.pid], "servers": servers.pids}
    for pid in (*servers.pids, b.uplink.process.pid):
        os.kill(pid, signal.SIGSTOP)
    command = [sys.executable, "-m", "tests.benchmarks.sites", "--send", f"{port},60000,{count / 60_000}"]
    sent = int(subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, check=True).stdout)
    with BusEnds(a.bus) as bus:
        accounts_when(bus, "uplink.1", lambda accounts: accounts["sending/flows"]["held"] >= sent)
    before, began = {name: sum(map(cpu_seconds, some)) for name, some in pids.items()}, time.monotonic()
    for pid in (*servers.pids, b.uplink.process.pid):
        os.kill(pid, signal.SIGCONT)
    with BusEnds(b.bus) as bus:
        accounts_when(bus, "uplink.1", lambda accounts: accounts["stream/flows"]["received"] >= had + sent)
    took = time.monotonic() - began
    cost = {name: (sum(map(cpu_seconds, some)) - before[name]) / sent * 1e6 for name, some in pids.items()}
    found = predict(len(servers.each), 500_000, waited=True)
    told = ", ".join(
        f"{name} {each:.2f} ({model:.2f})" for (name, each), model in zip(cost.items(), found, strict=True)
    )
    print(f"{sent:,} had waited: {sent / took:,.0f} a second from relay to relay; µs CPU each: {told}", flush=True)
    return sent / took


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--send", help=argparse.SUPPRESS)
    parser.add_argument("--drain", type=int, default=0, metavar="N")
    parser.add_argument("--rates", type=int, nargs="+", default=RATES)
    parser.add_argument("--servers", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--settings", default="", help="more lines of [uplink]")
    arguments = parser.parse_args()
    if arguments.send:
        port, rate, seconds = arguments.send.split(",")
        print(send(int(port), int(rate), float(seconds)))
        return
    assert not enter_lab()
    with made_for_run(), ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(NatsCluster(directory, arguments.servers))
        more = f"replicas = {arguments.servers}\nmemory = {MEMORY}\n{arguments.settings}"
        port = free_port()
        a = stack.enter_context(Site(directory / "a", "a", server, home("flows", port), f'send = ["flows"]\n{more}'))
        b = stack.enter_context(Site(directory / "b", "b", server, away("flows"), f'receive = ["a/flows"]\n{more}'))
        a.begin("broker", "gateway", "ingest", "uplink")
        wait_until(lambda: "made the stream" in a.uplink.text, "there is a stream")
        b.begin()
        flows(b)
        collector = stack.enter_context(closing(b.sign_up("flows", 9514)))
        print("µs CPU a datagram: measured, and as tests.benchmarks.site_model predicts it")
        print("| datagrams/s | out | in | servers | late: p50, p99 ms | lost |")
        print("| --- | --- | --- | --- | --- | --- |")
        for rate in arguments.rates:
            measure(a, b, server, port, collector, rate)

        if arguments.drain:
            pass_on(a, b, server, port, arguments.drain)


if __name__ == "__main__":
    main()

"""Measures the uplink: what a datagram costs it each way, and how late one site's datagrams arrive at another.

`python -m tests.benchmarks.sites` runs two stacks and one NATS server in a network namespace of its own, at steady
rates of 220 bytes. CPU is from /proc/PID/schedstat of each process, lateness from the send call to the receive call of
a collector of the other site. `--drain N` also measures how fast N datagrams that wait in JetStream are taken.
"""

import argparse
import itertools
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

from tests.builders import BusEnds, accounts_when
from tests.lab import enter_lab
from tests.services.uplink.nats import NatsServer, free_port
from tests.services.uplink.sites import Site, away, exporter, flows, home
from tests.stack import CHECKOUT, wait_until

UDP_SEGMENT: Final = 103
"""Socket option by which the kernel cuts one buffer into datagrams (udp(7))."""
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


def measure(a: Site, b: Site, server: NatsServer, port: int, collector: socket.socket, rate: int) -> None:
    """Print one row."""
    assert server.process is not None
    pids = {"out": a.uplink.process.pid, "in": b.uplink.process.pid, "server": server.process.pid}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    command = [sys.executable, "-m", "tests.benchmarks.sites", "--send", f"{port},{rate},{SECONDS}"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) as sender:
        late = receive(collector, sender)
        assert sender.stdout is not None
        sent = int(sender.stdout.read())
    cost = {name: (cpu_seconds(pid) - before[name]) / len(late) * 1e6 for name, pid in pids.items()}
    p50, p99 = statistics.median(late), statistics.quantiles(late, n=100)[98]
    lost = sent - len(late)
    print(
        f"| {rate:,} | {cost['out']:.2f} | {cost['in']:.2f} | {cost['server']:.2f} | {p50:.1f}, {p99:.1f} | {lost} |",
        flush=True,
    )


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in units of 1 ns where the kernel tells them (schedstat)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def drain(b: Site, port: int, count: int) -> None:
    """Print what a datagram costs an uplink that takes those that have waited in JetStream, at full speed."""
    with BusEnds(b.bus) as bus:

        def received() -> int:
            return accounts_when(bus, "uplink.1", lambda accounts: "stream/flows" in accounts)["stream/flows"][
                "received"
            ]

        had = received()
        b.uplink.process.send_signal(signal.SIGSTOP)
        command = [sys.executable, "-m", "tests.benchmarks.sites", "--send", f"{port},40000,{count / 40_000}"]
        sent = int(subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, check=True).stdout)
        time.sleep(1)
        before = cpu_seconds(b.uplink.process.pid)
        b.uplink.process.send_signal(signal.SIGCONT)
        wait_until(lambda: received() == had + sent, "all has come")
    cost = (cpu_seconds(b.uplink.process.pid) - before) / sent * 1e6
    print(f"{sent:,} had waited in JetStream: {cost:.2f} µs CPU each")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--send", help=argparse.SUPPRESS)
    parser.add_argument("--drain", type=int, default=0, metavar="N")
    parser.add_argument("--rates", type=int, nargs="+", default=RATES)
    parser.add_argument("--settings", default="", help="more lines of [uplink]")
    arguments = parser.parse_args()
    if arguments.send:
        port, rate, seconds = arguments.send.split(",")
        print(send(int(port), int(rate), float(seconds)))
        return
    assert not enter_lab()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(NatsServer(directory))
        port = free_port()
        a = stack.enter_context(
            Site(directory / "a", "a", server, home("flows", port), f'send = ["flows"]\n{arguments.settings}')
        )
        b = stack.enter_context(
            Site(directory / "b", "b", server, away("flows"), f'receive = ["a/flows"]\n{arguments.settings}')
        )
        a.begin("broker", "gateway", "ingest", "uplink")
        wait_until(lambda: "made the stream" in a.uplink.text, "there is a stream")
        b.begin()
        flows(b)
        collector = stack.enter_context(closing(b.sign_up("flows", 9514)))
        print("| datagrams/s | out: µs CPU | in: µs CPU | server: µs CPU | late: p50, p99 ms | lost |")
        print("| --- | --- | --- | --- | --- | --- |")
        for rate in arguments.rates:
            measure(a, b, server, port, collector, rate)
        if arguments.drain:
            drain(b, port, arguments.drain)


if __name__ == "__main__":
    main()

"""Rate and CPU a datagram, side by side with the relays found on PATH. Run by `make bench`.

Backlog method: the relay is stopped, its socket buffer is filled, the relay goes on, and the draining is timed until
the last copy has reached its collector's socket. The sender costs nothing meanwhile, and the collectors are sockets
that the kernel counts and empties by itself, so on a small machine the relay has the cores to itself. A first round,
not timed, reads every copy and checks it: none lost, order kept.

Peers without CAP_NET_ADMIN code of their own get no more buffer than net.core.rmem_max: raise it before, or they are
measured by the part of the workload that fits.

Everything runs in a network namespace of its own, with loopback and nothing else.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.sockets import MEMINFO, SO_MEMINFO, enlarge_receive_buffer, refuse_input
from tests.lab import enter_lab
from tests.stack import Running, Stack, ask_json

PORT = 7000
COLLECTOR_PORT = 9100
BUFFER = 1 << 27
QUIET_SECONDS = 0.15


@dataclass(frozen=True)
class Workload:
    """Datagram sizes and how many exporters send them, in bursts of `burst`."""

    name: str
    count: int
    exporters: int
    burst: int
    size: Callable[[random.Random], int]


WORKLOADS = (
    Workload("netflow", 40_000, 16, 16, lambda _: 1464),
    Workload("small", 40_000, 4, 64, lambda _: 200),
    Workload("syslog", 40_000, 500, 1, lambda draw: min(400, max(80, int(draw.lognormvariate(5.2, 0.4))))),
    Workload("mixed", 40_000, 64, 4, lambda draw: draw.randint(64, 1400)),
)


@dataclass(frozen=True)
class Figures:
    """What one run gave."""

    rate: float
    cpu_us: dict[str, float]
    lost: int

    @property
    def cpu_total_us(self) -> float:
        """CPU µs a received datagram, all processes together."""
        return sum(self.cpu_us.values())


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process, in nanoseconds (proc(5), schedstat)."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


class Sink:
    """A collector's socket. `discard` makes the kernel drop what arrives at the very end of its way, and count it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        enlarge_receive_buffer(self.socket, BUFFER)
        self.socket.bind(("127.0.0.1", port))
        self.socket.setblocking(False)

    def discard(self) -> None:
        """Count from now on, and queue nothing."""
        refuse_input(self.socket)

    @property
    def arrived(self) -> int:
        """Datagrams discarded, or bytes queued: grows with every one that arrives."""
        queued, *_, dropped = MEMINFO.unpack(self.socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))
        return int(queued + dropped)


def drain(sock: socket.socket) -> tuple[int, bool]:
    """Read all that lies in a collector's buffer; return how many, and whether each exporter's order was kept."""
    count, in_order = 0, True
    last: dict[bytes, int] = {}
    while True:
        try:
            payload = sock.recv(65536)
        except BlockingIOError:
            return count, in_order
        exporter, number = payload[:4], int.from_bytes(payload[4:8])
        in_order = in_order and last.get(exporter, -1) < number
        last[exporter] = number
        count += 1


def fill(workload: Workload) -> None:
    """Send the whole workload; each datagram names its exporter and its number."""
    draw = random.Random(7)
    exporters = []
    for number in range(workload.exporters):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((f"127.0.{1 + number // 250}.{1 + number % 250}", 0))
        sock.connect(("127.0.0.1", PORT))
        exporters.append(sock)
    body = bytes(2048)
    for number in range(workload.count):
        exporter = number // workload.burst % workload.exporters
        head = exporter.to_bytes(4) + number.to_bytes(4)
        exporters[exporter].send(head + body[: workload.size(draw) - 8])
    for sock in exporters:
        sock.close()


def run_backlog(workload: Workload, stopped: list[int], sinks: list[Sink]) -> float:
    """Fill the relay's buffer while the processes that hold the socket are stopped; return seconds to drain it."""
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    fill(workload)
    began = time.perf_counter()
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    seen, changed_at = -1, began
    while time.perf_counter() - changed_at < QUIET_SECONDS:
        now = sum(sink.arrived for sink in sinks)
        if now != seen:
            seen, changed_at = now, time.perf_counter()
        time.sleep(0.001)
    return changed_at - began


def check(workload: Workload, stopped: list[int], sinks: list[Sink]) -> None:
    """One run in which every copy is read."""
    run_backlog(workload, stopped, sinks)
    assert all(in_order for _, in_order in (drain(sink.socket) for sink in sinks)), "an exporter's order was not kept"


def measure(workload: Workload, stopped: list[int], counted: dict[str, int], sinks: list[Sink]) -> Figures:
    """One timed run; `counted` are the processes whose CPU counts."""
    arrived = [sink.arrived for sink in sinks]
    before = {name: cpu_ns(pid) for name, pid in counted.items()}
    seconds = run_backlog(workload, stopped, sinks)
    spent = {name: cpu_ns(pid) - before[name] for name, pid in counted.items()}
    counts = [sink.arrived - at for sink, at in zip(sinks, arrived, strict=True)]
    # Not every relay can have a buffer that holds the whole workload: what it did get is what it is measured by.
    relayed = max(counts)
    lost = workload.count * len(sinks) - sum(counts)
    return Figures(relayed / seconds, {name: ns / 1000 / relayed for name, ns in spent.items()}, lost)


def measure_all(
    workload: Workload, stopped: list[int], counted: dict[str, int], ports: range, rounds: int
) -> list[Figures]:
    """Check once, warm up once, then measure `rounds` times."""
    sinks = [Sink(port) for port in ports]
    check(workload, stopped, sinks)
    for sink in sinks:
        sink.discard()
    figures = [measure(workload, stopped, counted, sinks) for _ in range(rounds + 1)][1:]
    for sink in sinks:
        sink.socket.close()
    return figures


@contextmanager
def fanwire(stack: Stack, fan_out: int) -> Iterator[tuple[list[int], dict[str, int]]]:
    """The stack with one worker and `fan_out` collectors signed up."""
    listen = f'[[stream]]\nname = "bench"\nlisten = ["udp://127.0.0.1:{PORT}"]\nreceive_buffer = {BUFFER}\n'
    stack.configure(listen)
    stack.start_all()
    for number in range(fan_out):
        request = {"op": "register", "name": f"c{number}", "streams": ["bench"], "port": COLLECTOR_PORT + number}
        answer = ask_json(request)
        assert answer["ok"], answer
    names = ("ingest.1", "broker", "forwarder")
    yield [stack["ingest.1"].process.pid], {name: stack[name].process.pid for name in names}
    for name in ("ingest.1", "forwarder", "gateway", "broker"):
        stack[name].stop()


@contextmanager
def peer(stack: Stack, name: str, command: list[str]) -> Iterator[tuple[list[int], dict[str, int]]]:
    """Another relay, configured as its users would."""
    running: Running = stack.spawn(name, command)
    time.sleep(0.5)
    assert running.process.poll() is None, running.text
    yield [running.process.pid], {name: running.process.pid}
    running.stop()


def socat(stack: Stack, fan_out: int) -> list[str] | None:
    """Relays one to one, a datagram at a time."""
    if fan_out > 1:
        return None
    option = f"rcvbuf={BUFFER}"
    return ["socat", "-u", "-b65535", f"UDP4-RECV:{PORT},{option}", f"UDP4-DATAGRAM:127.0.0.1:{COLLECTOR_PORT}"]


def samplicate(stack: Stack, fan_out: int) -> list[str]:
    """Relays to many, a datagram at a time."""
    targets = [f"127.0.0.1/{COLLECTOR_PORT + number}" for number in range(fan_out)]
    return ["samplicate", "-s", "127.0.0.1", "-p", str(PORT), "-b", str(BUFFER), *targets]


PEERS = {"samplicate": samplicate, "socat": socat}


def run(workload: Workload, fan_out: int, rounds: int) -> dict[str, list[Figures]]:
    """All relays in turn, `rounds` times each."""
    results: dict[str, list[Figures]] = {}
    ports = range(COLLECTOR_PORT, COLLECTOR_PORT + fan_out)
    with tempfile.TemporaryDirectory() as directory, Stack(Path(directory)) as stack:
        with fanwire(stack, fan_out) as (stopped, counted):
            results["fanwire"] = measure_all(workload, stopped, counted, ports, rounds)
        for name, command_for in PEERS.items():
            command = command_for(stack, fan_out)
            if command is None or shutil.which(command[0]) is None:
                continue
            with peer(stack, name, command) as (stopped, counted):
                results[name] = measure_all(workload, stopped, counted, ports, rounds)
    return results


def show(workload: Workload, fan_out: int, results: dict[str, list[Figures]]) -> list[dict[str, object]]:
    """Print medians and ratios; return them for the JSON."""
    ours = statistics.median(figures.rate for figures in results["fanwire"])
    rows = []
    for name, runs in results.items():
        rate = statistics.median(figures.rate for figures in runs)
        cpu = {key: statistics.median(figures.cpu_us[key] for figures in runs) for key in runs[0].cpu_us}
        lost = sum(figures.lost for figures in runs)
        parts = " ".join(f"{key} {value:.2f}" for key, value in cpu.items()) if len(cpu) > 1 else ""
        print(f"{workload.name:8} x{fan_out:<3} {name:11} {rate:10,.0f}/s  fanwire is {ours / rate:5.2f} x"
              f"  CPU {sum(cpu.values()):6.2f} us a datagram  lost {lost}  {parts}")  # fmt: skip
        rows.append({"workload": workload.name, "fan_out": fan_out, "relay": name, "rate": rate, "cpu_us": cpu,
                     "ratio": ours / rate, "lost": lost})  # fmt: skip
        assert name != "fanwire" or lost == 0, f"fanwire lost {lost} datagrams"
    return rows


def main() -> None:
    """Measure every workload at every fan-out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fan-out", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--workload", nargs="*", default=[workload.name for workload in WORKLOADS])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    refused = enter_lab()
    if refused or os.geteuid() != 0:
        sys.exit(f"needs root, for receive buffers that hold a backlog, and a network namespace {refused}")
    rows = []
    for workload in WORKLOADS:
        for fan_out in arguments.fan_out:
            if workload.name in arguments.workload:
                rows += show(workload, fan_out, run(workload, fan_out, arguments.rounds))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

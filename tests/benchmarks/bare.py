"""Compares each stage with a bare loop in C of the system call that it lives by, in CPU µs a datagram.

Ingest is compared with `recvmmsg` alone, which does nothing with what it takes; forwarder and transmitter with
`sendmmsg` of the very messages that they make of a batch, built before the clock starts. `bare.c` is compiled here.
Each runs by itself, the loops as the stages: first ingest while who sends is stopped, then that one.
"""

import ctypes
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from services.forwarder.plan import SendPlan
from services.transmitter.packet_socket import PACKET_VNET_HDR, SOCKADDR_LL, SOL_PACKET
from services.transmitter.packets.addressing import Addressing, Identification
from services.transmitter.packets.headers import ETHERTYPE_IPV4
from services.transmitter.plan import FramePlan
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.datagrams.gathered import MAX_GATHERED, Gathered
from shared.datagrams.limits import MAX_ROWS
from shared.datagrams.mmsg import IOVEC
from shared.net.addresses import pack_address
from shared.net.sockets import enlarge_receive_buffer, enlarge_send_buffer
from tests.benchmarks.backlog import settle
from tests.benchmarks.programs import Program, Task, running
from tests.benchmarks.site import COLLECTOR_PORT, PORT, RELAY, Offer, Site, collector_address
from tests.benchmarks.workloads import Workload, exporter_address

STAGE_SECONDS: Final = 0.4
STAGE_DATAGRAMS: Final = 24 * MAX_ROWS
"""A number that shared memory can hold while the next stage is stopped."""
SOURCE: Final = Path(__file__).with_name("bare.c")


@contextmanager
def compiled(source: Path = SOURCE) -> Iterator[Path | None]:
    """The program of a source file; None without a C compiler."""
    compiler = shutil.which("cc")
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / source.stem
        if compiler is None:
            yield None
            return
        subprocess.run([compiler, "-O2", "-Wall", "-o", str(program), str(source)], check=True)
        yield program


def receive_us(program: Path, site: Site, offer: Offer, buffer: int, rounds: int) -> float:
    """CPU µs a datagram that recvmmsg costs alone, from a backlog like that of ingest."""
    with site.relay.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        enlarge_receive_buffer(sock, buffer)
        sock.bind((RELAY, PORT))
        process = subprocess.Popen([program, "receive", str(sock.fileno())], pass_fds=[sock.fileno()])
        running, found = Program("bare", {"bare": process.pid}), []
        count = min(offer.count, STAGE_DATAGRAMS)
        try:
            for _ in range(rounds + 1):
                running.signal(signal.SIGSTOP)
                offer.send(0, count)
                before = running.cpu_ns()["bare"]
                running.signal(signal.SIGCONT)
                time.sleep(0.3)
                found.append((running.cpu_ns()["bare"] - before) / 1000 / count)
        finally:
            process.kill()
            process.wait()
    return statistics.median(found[1:])


def stages_us(task: Task, site: Site, offer: Offer, rounds: int) -> dict[str, float]:
    """CPU µs a datagram that ingest and who sends cost, one after the other."""
    with site.sinks(task.fan_out) as sinks, running("fanwire", task, site) as program:
        settle(program, offer, sinks)
        time.sleep(1.0)  # payloads are not lent while somebody is new
        for sink in sinks:
            sink.discard()
        ingest, _, sender = program.processes
        count = min(offer.count, STAGE_DATAGRAMS)
        found: dict[str, list[float]] = {ingest: [], sender: []}
        for _ in range(rounds + 1):
            for stage in (sender, ingest):
                os.kill(program.processes[stage], signal.SIGSTOP)
            offer.send(0, count)
            for stage in (ingest, sender):
                before = program.cpu_ns()[stage]
                os.kill(program.processes[stage], signal.SIGCONT)
                time.sleep(STAGE_SECONDS)
                found[stage].append((program.cpu_ns()[stage] - before) / 1000 / count)
            for sink in sinks:
                sink.read()
    return {stage: statistics.median(costs[1:]) for stage, costs in found.items()}


def batches_of(workload: Workload) -> Iterator[Gathered]:
    """The workload as ingest cuts it and as a service under load takes it along."""
    payloads = workload.payloads()
    sources = [pack_address(str(exporter_address(each))) for each in range(workload.exporters)]
    batches = []
    for start in range(0, len(payloads), MAX_ROWS):
        part = payloads[start : start + MAX_ROWS]
        exporters = [workload.exporter(start + number) for number in range(len(part))]
        rows = make_rows([len(each) for each in part], [sources[each] for each in exporters], 20_000)
        batches.append(DatagramBatch("bench", 0, rows, b"".join(part)))
    together = MAX_GATHERED // MAX_ROWS
    for start in range(0, len(batches), together):
        yield Gathered(batches[start : start + together])


def _bytes_of(message: np.void) -> bytes:
    pieces = np.frombuffer(ctypes.string_at(int(message["iov"]), int(message["iovlen"]) * IOVEC.itemsize), IOVEC)
    return b"".join(ctypes.string_at(base, size) for base, size in pieces.tolist())


def _record(segment: int, name: bytes, data: bytes) -> bytes:
    return np.array([segment, len(name), len(data), 0], "=u4").tobytes() + name + data


def send_us(program: Path, site: Site, workload: Workload, rounds: int) -> dict[str, float]:
    """CPU µs a datagram that sendmmsg costs alone, for the messages of the forwarder and of the transmitter."""
    collector = collector_address(0)
    with ExitStack() as opened:
        opened.enter_context(site.relay.entered())
        udp = opened.enter_context(closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        udp.connect((collector, COLLECTOR_PORT))
        packet = opened.enter_context(closing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)))
        packet.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        files = {sock: opened.enter_context(tempfile.NamedTemporaryFile()) for sock in (udp, packet)}
        plan, frames, numbers = SendPlan(), FramePlan(), Identification()
        ethernet = site.ethernet_to_collectors + ETHERTYPE_IPV4.to_bytes(2)
        target = Addressing(4, socket.inet_aton(collector), COLLECTOR_PORT, 64, 0, site.up_index, ethernet)
        name = SOCKADDR_LL.pack(socket.AF_PACKET, socket.htons(ETHERTYPE_IPV4), site.up_index, 0, 0, 6, ethernet[:6])
        for batch in batches_of(workload):
            plan.build(batch, None, workload.mtu - 28)
            for message in plan.headers[: plan.sends]:
                segment = (
                    int.from_bytes(ctypes.string_at(int(message["control"]) + 16, 2), "little")
                    if message["control"]
                    else 0
                )
                files[udp].write(_record(segment, b"", _bytes_of(message)))
            frames.build(batch, None, 4, workload.mtu, link=True, segmentation=True)
            frames.address([target], [name], [numbers])
            for message in frames.messages[: frames.frames]:
                files[packet].write(_record(0, name, _bytes_of(message)))
        found = {}
        for sock, stage in ((udp, "forwarder"), (packet, "transmitter")):
            enlarge_send_buffer(sock, 1 << 22)
            files[sock].flush()
            command = [str(program), "send", str(sock.fileno()), files[sock].name, str(MAX_ROWS)]
            times = [
                int(subprocess.run(command, pass_fds=[sock.fileno()], capture_output=True, check=True).stdout)
                for _ in range(rounds + 1)
            ][1:]
            found[stage] = statistics.median(times) / 1000 / workload.count
        return found

"""Sockets that systemd holds and passes: a worker comes and goes, what is queued in them stays."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.ledger.accounts import Accounts
from shared.net.sockets import kernel_drops
from tests.builders import BusEnds, accounts_when, freeze, take_datagrams, take_mark, wait_wanted
from tests.stack import PATIENCE_SECONDS, Running, Stack

LISTEN = '"udp://127.0.0.1:6667", "udp://[::1]:6667", "tcp://127.0.0.1:6667", "tcp://[::1]:6667"'
STREAM = f'[[stream]]\nname = "messages"\nlisten = [{LISTEN}]\n'
PASS_ON = """
import os, sys
count, *command = sys.argv[1:]
for number, descriptor in enumerate(sorted(map(int, count.split(",")))):
    os.dup2(descriptor, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(number + 1))
os.execv(command[0], command)
"""
"""Puts descriptors where sd_listen_fds(3) looks for them."""


@pytest.fixture
def bus(stack: Stack, bus: BusEnds) -> BusEnds:
    """The bus, and settings with this stream."""
    stack.configure(STREAM)
    return bus


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """The sockets that the service manager, here the test, holds."""
    with ExitStack() as opened:
        yield opened


def listen(held: ExitStack, kind: socket.SocketKind, port: int = 6667) -> socket.socket:
    """A socket as a socket unit with ReusePort=yes makes it."""
    sock = held.enter_context(socket.socket(socket.AF_INET, kind))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def activate(stack: Stack, *descriptors: int, name: str = "ingest.1") -> Running:
    """Start a worker with these descriptors."""
    output = stack.directory / f"{name}.{len(stack.running)}.log"
    listed = ",".join(map(str, descriptors))
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", PASS_ON, listed, sys.executable, "-m", "services.ingest"],
            stdout=file,
            stderr=file,
            env=stack.environment | {"HONCHO_PROCESS_NAME": name},
            cwd=stack.directory,
            pass_fds=descriptors,
        )
    stack.running.append(Running(name, process, output))
    return stack.running[-1]


def activate_ready(stack: Stack, *sockets: socket.socket) -> Running:
    """Start a worker with these sockets, and wait until it is ready."""
    running = activate(stack, *(sock.fileno() for sock in sockets))
    running.wait_for('"event": "ready"')
    return running


def numbered(sender: socket.socket, numbers: range) -> list[bytes]:
    """Send a datagram for each number; return what was sent."""
    payloads = [b"%d" % number for number in numbers]
    for payload in payloads:
        sender.send(payload)
    return payloads


def test_killed_worker_loses_nothing_that_is_queued(stack: Stack, bus: BusEnds, held: ExitStack) -> None:
    """SIGKILL with datagrams queued: its successor takes them all, in order, with what came while there was none."""
    udp, tcp = listen(held, socket.SOCK_DGRAM), listen(held, socket.SOCK_STREAM)
    worker = activate_ready(stack, udp, tcp)
    subscriber = bus.subscriber("datagrams/messages/")
    take_mark(subscriber)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(udp.getsockname())
        freeze(worker)
        sent = numbered(sender, range(50))
        worker.stop(signal.SIGKILL)
        sent += numbered(sender, range(50, 100))
        with socket.create_connection(tcp.getsockname()) as connection:
            connection.sendall(b"by TCP\n")
            activate_ready(stack, udp, tcp)
            came = [payload for _, _, payload in take_datagrams(subscriber, 101)]
    assert [payload for payload in came if payload != b"by TCP"] == sent
    assert b"by TCP" in came


def test_drained_worker_leaves_the_rest_to_its_successor(stack: Stack, bus: BusEnds, held: ExitStack) -> None:
    """SIGTERM neither empties a socket that was passed nor stops what arrives: every datagram comes once, in order."""
    udp = listen(held, socket.SOCK_DGRAM)
    worker = activate_ready(stack, udp)
    subscriber = bus.subscriber("datagrams/messages/")
    take_mark(subscriber)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(udp.getsockname())
        freeze(worker)
        sent = numbered(sender, range(50))
        worker.process.send_signal(signal.SIGTERM)
        worker.process.send_signal(signal.SIGCONT)
        assert worker.process.wait(PATIENCE_SECONDS) == 0
        sent += numbered(sender, range(50, 100))
    activate_ready(stack, udp)
    assert [payload for _, _, payload in take_datagrams(subscriber, 100)] == sent
    assert kernel_drops(udp) == 0


def test_nothing_is_taken_before_the_broker_is_there(stack: Stack, lab: None, held: ExitStack) -> None:
    """A worker that still waits for the broker, hence knows nobody who wants datagrams, leaves them queued."""
    stack.configure(STREAM)
    broker = stack.start("broker")
    udp = listen(held, socket.SOCK_DGRAM)
    with BusEnds(stack.bus) as bus, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        subscriber, publisher = bus.subscriber("datagrams/messages/"), bus.publisher("test.1")
        wait_wanted(publisher, "datagrams/messages/")
        freeze(broker)
        sender.connect(udp.getsockname())
        sent = numbered(sender, range(100))
        activate(stack, udp.fileno()).wait_for("waiting for the broker")
        broker.process.send_signal(signal.SIGCONT)
        assert [payload for _, _, payload in take_datagrams(subscriber, 100)] == sent


def test_listener_that_was_not_passed_is_bound(stack: Stack, bus: BusEnds, held: ExitStack) -> None:
    """A worker binds the listeners of the settings that it was passed no socket for."""
    activate_ready(stack, listen(held, socket.SOCK_DGRAM))
    subscriber = bus.subscriber("datagrams/messages/")
    take_mark(subscriber)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"over IPv6", ("::1", 6667))
    assert take_datagrams(subscriber, 1)[0][2] == b"over IPv6"


def test_drops_are_counted_from_the_start_of_the_worker(stack: Stack, bus: BusEnds, held: ExitStack) -> None:
    """Kernel drops before a worker started are not in its account; later ones are."""
    stack.configure(STREAM + "receive_buffer = 4096\n")
    udp = listen(held, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(udp.getsockname())
        for _ in range(100):
            sender.send(bytes(1000))
        before = kernel_drops(udp)
        assert before > 0
        worker = activate_ready(stack, udp)
        queued = 100 - before

        def all_taken(accounts: Accounts) -> bool:
            return accounts["stream/messages"].get("received") == queued

        assert accounts_when(bus, "ingest.1", all_taken)["stream/messages"]["kernel_dropped"] == 0
        freeze(worker)
        for _ in range(100):
            sender.send(bytes(1000))
        worker.process.send_signal(signal.SIGCONT)

    def complete(accounts: Accounts) -> bool:
        account = accounts["stream/messages"]
        return account["received"] + account["kernel_dropped"] == queued + 100

    assert accounts_when(bus, "ingest.1", complete)["stream/messages"]["kernel_dropped"] == kernel_drops(udp) - before


def test_path_that_was_passed_outlives_the_worker(stack: Stack, bus: BusEnds, held: ExitStack, tmp_path: Path) -> None:
    """An AF_UNIX socket that was passed serves, and its file is there for the next worker."""
    path = str(tmp_path / "in.sock")
    stack.configure(f'[[stream]]\nname = "local"\nlisten = ["unixgram://{path}"]\n')
    sock = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    sock.bind(path)
    subscriber = bus.subscriber("datagrams/local/")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for payload in (b"first", b"second"):
            worker = activate_ready(stack, sock)
            sender.sendto(payload, path)
            assert take_datagrams(subscriber, 1)[0][2] == payload
            assert worker.stop(signal.SIGTERM) == 0


def refusal(stack: Stack, *descriptors: int, name: str = "ingest.1") -> str:
    """The one line of a worker that does not start with these descriptors, and exits with 78."""
    worker = activate(stack, *descriptors, name=name)
    assert worker.process.wait(60) == 78, worker.text
    (line,) = worker.text.splitlines()
    return line


@pytest.mark.parametrize(("kind", "port"), [(socket.SOCK_DGRAM, 6668), (socket.SOCK_SEQPACKET, 0)])
def test_socket_of_no_listener_is_refused(
    stack: Stack, lab: None, held: ExitStack, kind: socket.SocketKind, port: int
) -> None:
    """A socket that no listener of the settings is for ends the start with 78: what comes there would wait for ever."""
    stack.configure(STREAM)
    if port:
        sock = listen(held, kind, port)
    else:
        sock = held.enter_context(socket.socket(socket.AF_UNIX, kind))
        sock.bind(str(stack.directory / "x.sock"))
    line = refusal(stack, sock.fileno())
    assert f"the inherited socket {kind.name} {sock.getsockname()} is no listener of this worker" in line
    assert "make [[stream]] listen and the socket unit agree" in line


def test_path_passed_to_another_than_the_first_worker_is_refused(stack: Stack, lab: None, held: ExitStack) -> None:
    """Paths belong to the first worker, sockets that were passed included."""
    path = str(stack.directory / "in.sock")
    stack.configure(f'[[stream]]\nname = "local"\nlisten = ["unixgram://{path}"]\n')
    sock = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    sock.bind(path)
    assert path in refusal(stack, sock.fileno(), name="ingest.2")


def test_descriptor_that_is_no_socket_is_refused(stack: Stack, lab: None, held: ExitStack) -> None:
    """A file or a FIFO that was passed ends the start with 78."""
    reader, writer = os.pipe()
    held.callback(os.close, reader)
    held.callback(os.close, writer)
    assert "inherited descriptors: Socket operation on non-socket" in refusal(stack, reader)

"""SIGHUP to a worker: its listeners follow the settings, and those that did not change are not touched."""

import contextlib
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.bus.loans.lender import GRACE_SECONDS
from shared.bus.zmq_sockets import Subscriber
from shared.ledger.accounts import Accounts
from shared.ledger.equations import discrepancies
from tests.builders import BusEnds, accounts_when, freeze, take_datagrams, take_mark
from tests.services.ingest.test_activation import activate_ready, held, listen
from tests.services.ingest.test_worker import follow, is_closed, sender, take_shaped
from tests.stack import Running, Stack, wait_until

__all__ = ["held"]

A = '[[stream]]\nname = "a"\nlisten = ["udp://127.0.0.1:7000"]\n'
B = '[[stream]]\nname = "b"\nlisten = ["udp://127.0.0.1:7001", "tcp://127.0.0.1:7001"]\n'


@pytest.fixture
def bus(stack: Stack, bus: BusEnds) -> BusEnds:
    """The bus, and settings with two streams."""
    stack.configure(A + B)
    return bus


def reload(stack: Stack, worker: Running, settings: str) -> str:
    """Let a worker read these settings; return what it says of that."""
    stack.configure(settings)
    event: str = worker.reload()["event"]
    return event


def listeners(worker: Running) -> dict[str, str]:
    """The inode of each of a worker's UDP and TCP listeners, by kind and local address."""
    ours = set()
    for path in Path(f"/proc/{worker.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            ours.add(str(path.readlink()))
    found = {}
    for kind in ("udp", "tcp"):
        for line in Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in ours and fields[2].endswith(":0000"):
                found[f"{kind} {fields[1]}"] = fields[9]
    return found


def wait_listening(worker: Running, count: int) -> None:
    """Wait until a worker has so many UDP and TCP listeners: one that goes is emptied first."""
    wait_until(lambda: len(listeners(worker)) == count, f"{worker.name} has {count} listeners")


def payloads(subscriber: Subscriber, count: int) -> list[bytes]:
    """The payloads that come next."""
    return [payload for _, _, payload in take_datagrams(subscriber, count)]


def test_listeners_that_stay_are_the_same_sockets(stack: Stack, bus: BusEnds) -> None:
    """A new stream, a new listener of an old one, and a new name for a stream leave every socket there is in place."""
    worker = stack.start("ingest")
    before = listeners(worker)
    assert len(before) == 3
    more = B.replace('"tcp', '"udp://127.0.0.1:7009", "tcp')
    for settings, added in ((A + B.replace("7001", "7003") + more.replace('"b"', '"c"'), 3), (A + B, 0)):
        assert reload(stack, worker, settings) == "reloaded"
        wait_listening(worker, 3 + added)
        assert listeners(worker).items() >= before.items()
    subscriber = follow(bus, "b")
    with sender(port=7001) as sock:
        sock.send(b"x")
    assert payloads(subscriber, 1) == [b"x"]


def test_stream_that_goes_is_drained(stack: Stack, bus: BusEnds) -> None:
    """Datagrams queued in the kernel when a listener goes are published; its account stays, and goes on with it."""
    worker = stack.start("ingest")
    subscriber = follow(bus, "b")
    sent = [b"%d" % number for number in range(600)]
    for settings, expected in ((A, 600), (A + B, 600), (A, 1200)):
        with sender(port=7001) as sock:
            freeze(worker)
            for payload in sent if settings == A else ():
                sock.send(payload)
            stack.configure(settings)
            worker.process.send_signal(signal.SIGHUP)
            worker.process.send_signal(signal.SIGCONT)
            assert payloads(subscriber, 600 if settings == A else 0) == (sent if settings == A else [])
        wait_listening(worker, 1 if settings == A else 3)

        def complete(accounts: Accounts, expected: int = expected) -> bool:
            return accounts["stream/b"].get("received") == expected

        assert list(discrepancies(accounts_when(bus, "ingest.1", complete))) == []


def test_renamed_stream_goes_on_under_its_new_name(stack: Stack, bus: BusEnds) -> None:
    """A listener that only changes its stream loses nothing: what is queued comes under the new name."""
    worker = stack.start("ingest")
    subscriber = bus.subscriber("datagrams/c/")
    sent = [b"%d" % number for number in range(100)]
    with sender(port=7001) as sock, socket.create_connection(("127.0.0.1", 7001), timeout=60) as connection:
        connection.sendall(b"first\n")
        wait_until(lambda: accounts_when(bus, "ingest.1", lambda accounts: "stream/b" in accounts), "it is there")
        stack.configure(A + B.replace('"b"', '"c"'))
        freeze(worker)
        for payload in sent:
            sock.send(payload)
        worker.process.send_signal(signal.SIGHUP)
        worker.process.send_signal(signal.SIGCONT)
        wait_until(lambda: worker.reloads, "it reloads")
        take_mark(subscriber, "c")
        sock.send(b"last")
        came = payloads(subscriber, 1)
        while came[-1] != b"last":
            came += payloads(subscriber, 1)
        assert is_closed(connection)
    with socket.create_connection(("127.0.0.1", 7001), timeout=60) as connection:
        connection.sendall(b"by TCP\n")
        assert payloads(subscriber, 1) == [b"by TCP"]


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_port_in_use_keeps_the_old_settings(stack: Stack, bus: BusEnds, kind: socket.SocketKind) -> None:
    """No new listener is opened when one can't be had, one line names it, and the old ones go on."""
    worker = stack.start("ingest")
    subscriber = follow(bus, "a")
    before, lines = listeners(worker), len(worker.text.splitlines())
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 7005))
        if kind == socket.SOCK_STREAM:
            holder.listen()
        path = stack.directory / "in.sock"
        scheme = "udp" if kind == socket.SOCK_DGRAM else "tcp"
        new = f'"udp://127.0.0.1:7004", "unixgram://{path}", "tcp://127.0.0.1:7004", "{scheme}://127.0.0.1:7005"'
        settings = A + B.replace('"b"', '"c"') + f'[[stream]]\nname = "d"\nlisten = [{new}]\n'
        said = reload(stack, worker, settings)
    title = '[[stream]] "d" listen'
    assert said.startswith(f"not reloaded, the old settings stay: {title}: {scheme}://127.0.0.1:7005: Address already")
    assert len(worker.text.splitlines()) == lines + 1
    assert listeners(worker) == before
    assert not path.exists()
    with sender(port=7000) as sock:
        sock.send(b"x")
    assert payloads(subscriber, 1) == [b"x"]
    assert reload(stack, worker, settings) == "reloaded"
    assert path.is_socket()
    assert reload(stack, worker, A) == "reloaded"
    wait_until(lambda: not path.exists() and len(listeners(worker)) == 1, "what is new has gone again")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            A + B.replace("7001", "7000"),
            '[[stream]] "b" listen: udp://127.0.0.1:7000 is the address of another listener too; give each its own',
        ),
        (A.replace("127.0.0.1", "0.0.0.0") + 'reply = "x"\n', '[[stream]] "a" listen: a reply on udp://0.0.0.0:7000'),
        (A + B.replace("127.0.0.1", "nobody.invalid"), '[[stream]] "b" listen: udp://nobody.invalid:7001: '),
        (A + B.replace("127.0.0.1", "192.0.2.1"), '[[stream]] "b" listen: udp://192.0.2.1:7001: Cannot assign'),
    ],
)
def test_listener_that_may_not_be_keeps_the_old_settings(stack: Stack, bus: BusEnds, settings: str, says: str) -> None:
    """A fault that would end the start of a worker costs a running one only a line."""
    worker = stack.start("ingest")
    before = listeners(worker)
    assert reload(stack, worker, settings).startswith(f"not reloaded, the old settings stay: {says}")
    assert listeners(worker) == before


def test_reply_and_receive_buffer_change_in_place(stack: Stack, bus: BusEnds) -> None:
    """A stream's reply and receive buffer follow the settings, on the same socket."""
    worker = stack.start("ingest")
    before, subscriber = listeners(worker), follow(bus, "a")
    with sender(port=7000) as sock:
        for reply in (b"one", b"two", b""):
            settings = A + (f'reply = "{reply.decode()}"\n' if reply else "")
            assert reload(stack, worker, settings + B) == "reloaded"
            sock.send(b"x")
            if reply:
                assert sock.recv(100) == reply
        assert payloads(subscriber, 3) == [b"x"] * 3
        accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/a"].get("replied") == 2)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
        assert reload(stack, worker, A + "receive_buffer = 4096\n" + B) == "reloaded"
        freeze(worker)
        for _ in range(20):
            sock.send(bytes(1000))
        worker.process.send_signal(signal.SIGCONT)
    accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/a"].get("kernel_dropped", 0) > 0)
    assert listeners(worker) == before


def test_connections_end_with_their_listener(stack: Stack, bus: BusEnds) -> None:
    """Messages sent on a TCP connection before its listener goes are published; one of another listener stays open."""
    stack.configure(B + B.replace('"b"', '"a"').replace("7001", "7000"))
    worker = stack.start("ingest")
    of_a, of_b = follow(bus, "a"), follow(bus, "b")
    with (
        socket.create_connection(("127.0.0.1", 7000), timeout=60) as stays,
        socket.create_connection(("127.0.0.1", 7001), timeout=60) as goes,
    ):
        stays.sendall(b"1\n")
        assert payloads(of_a, 1) == [b"1"]
        freeze(worker)
        goes.sendall(b"whole\nunfinished")
        with socket.create_connection(("127.0.0.1", 7001), timeout=60) as waiting:
            waiting.sendall(b"waits\n")
            stack.configure(B.replace('"b"', '"a"').replace("7001", "7000"))
            worker.process.send_signal(signal.SIGHUP)
            worker.process.send_signal(signal.SIGCONT)
            assert sorted(payloads(of_b, 2)) == [b"waits", b"whole"]
            assert is_closed(goes)
            assert is_closed(waiting)
        stays.sendall(b"2\n")
        assert payloads(of_a, 1) == [b"2"]
    account = accounts_when(bus, "ingest.1", lambda accounts: "dropped_cut_off" in accounts["stream/b"])["stream/b"]
    assert account["dropped_cut_off"] == 1


def test_what_is_lent_stays_whole_when_a_stream_is_back(stack: Stack, bus: BusEnds) -> None:
    """Large payloads of a stream that went and came back are lent again, to who has never let go, byte for byte."""
    worker = stack.start("ingest")
    subscriber, shapes = follow(bus, "b"), Counter[str]()
    with sender(port=7001) as sock:
        for number in range(12):
            if number % 4 == 3:
                for settings in (A, A + B):
                    assert reload(stack, worker, settings) == "reloaded"
                wait_listening(worker, 3)
            freeze(worker)
            sent = [b"%d.%d," % (number, row) * 200 for row in range(40)]
            for payload in sent:
                sock.send(payload)
            worker.process.send_signal(signal.SIGCONT)
            assert take_shaped(subscriber, len(sent), shapes) == sent
            if not number:
                time.sleep(GRACE_SECONDS)
    assert subscriber.rejected == {}
    assert shapes["in place"] + shapes["end to end"]


def test_spread_follows(stack: Stack, bus: BusEnds) -> None:
    """Under `spread` new listeners are shared out too, and the address of one that is gone can be had anew."""
    spread = '[ingest]\nspread = "source"\n'
    stack.configure(spread + A)
    workers = [stack.start(f"ingest.{number}") for number in (1, 2)]
    subscriber = bus.subscriber("datagrams/b/")
    for _ in range(3):
        for settings in (spread + A + B, spread + A):
            for worker in workers:
                assert reload(stack, worker, settings) == "reloaded"
            if B in settings:
                with sender(port=7001) as sock:
                    sock.send(b"x")
                    assert payloads(subscriber, 1) == [b"x"]
    assert not any("kernel refuses" in worker.text for worker in workers)


def test_inherited_listeners_stay(stack: Stack, bus: BusEnds, held: ExitStack) -> None:
    """Sockets that systemd holds stay; a new listener is bound; that one of them is left unread is refused."""
    stack.configure(A)
    udp = listen(held, socket.SOCK_DGRAM, 7000)
    worker = activate_ready(stack, udp)
    subscriber = follow(bus, "a")
    with sender(port=7000) as sock:
        freeze(worker)
        sock.send(b"queued")
        stack.configure(A + B)
        worker.process.send_signal(signal.SIGHUP)
        worker.process.send_signal(signal.SIGCONT)
        wait_until(lambda: worker.reloads, "it reloads")
        wait_listening(worker, 3)
        assert "the inherited socket SOCK_DGRAM ('127.0.0.1', 7000) is no listener" in reload(stack, worker, B)
        sock.send(b"goes on")
        assert payloads(subscriber, 2) == [b"queued", b"goes on"]
        assert reload(stack, worker, A) == "reloaded"
        wait_listening(worker, 1)

import errno
import gc
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from services.ingest.batch_publisher import new_pools
from services.ingest.tcp_connections import SPARE_DESCRIPTORS
from services.operator.doctor.listening_facts import listening_facts
from shared.bus.continuity import Continuity
from shared.bus.loans.lender import CHUNK, GRACE_SECONDS, Room
from shared.bus.messages import Datagrams, status_topic
from shared.bus.zmq_sockets import Subscriber
from shared.datagrams.limits import MAX_DATAGRAM
from shared.ledger.accounts import Accounts
from shared.ledger.equations import discrepancies
from shared.net.addresses import LOCAL_SENDER, unpack_address
from shared.net.sockets import checksum_errors, receive_buffer
from shared.settings.file import load
from tests.builders import (
    BusEnds,
    Datagram,
    accounts_when,
    freeze,
    kill_all,
    take,
    take_datagrams,
    take_last_report,
    take_mark,
)
from tests.capabilities import held_by_a_program
from tests.forging import forging
from tests.services.ingest.flows.exported import netflow_v9
from tests.services.transmitter.started import IS_ROOT, as_nobody, readable_interpreter
from tests.stack import PATIENCE_SECONDS, Stack, wait_until

PORT = 6667
REPLY = b"Got your message!"
LISTEN = '"udp://127.0.0.1:6667", "udp://[::1]:6667", "tcp://127.0.0.1:6667", "tcp://[::1]:6667"'
STREAM = f'[[stream]]\nname = "messages"\nlisten = [{LISTEN}]\nreply = "Got your message!"\n'
UNIX = '[[stream]]\nname = "local"\nlisten = ["unixgram://{path}", "udp://127.0.0.1:6668"]\n'
ALL = "datagrams/"


@pytest.fixture
def bus(stack: Stack, bus: BusEnds) -> BusEnds:
    """The bus, and settings with this stream."""
    stack.configure(STREAM)
    return bus


def follow(bus: BusEnds, stream: str = "messages") -> Subscriber:
    """A subscriber to a stream, once it flows."""
    subscriber = bus.subscriber(f"datagrams/{stream}/")
    take_mark(subscriber, stream)
    return subscriber


@contextmanager
def sender(host: str = "127.0.0.1", port: int = PORT) -> Iterator[socket.socket]:
    """A UDP socket connected to the worker."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, port))
        sock.settimeout(60)
        yield sock


def connect(host: str = "127.0.0.1") -> socket.socket:
    """A TCP connection to the worker."""
    return socket.create_connection((host, PORT), timeout=60)


def is_closed(connection: socket.socket) -> bool:
    """Return whether the worker closes the connection, waited for."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # closed with some of what we sent unread
        return True


def forge(port_from: int, port_to: int, payload: bytes) -> None:
    """Send a datagram from a port of 127.0.0.1 that need not be ours, or be any."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as sock:
        sock.sendto(struct.pack(">4H", port_from, port_to, 8 + len(payload), 0) + payload, ("127.0.0.1", 0))


def refusal(stack: Stack, settings: str) -> tuple[int, str]:
    """The exit code and the one line of a worker that does not start with these settings."""
    stack.configure(settings)
    running = stack.start("ingest", ready=False)
    code = running.process.wait(60)
    (line,) = running.text.splitlines()
    return code, line


def test_number_that_is_in_use_is_refused(stack: Stack, lab: None, bus: BusEnds) -> None:
    """A second worker with the same number ends with 73 and one line, and the first goes on; once killed it is free."""
    first = stack.start("ingest")
    subscriber = follow(bus)
    second = stack.start("ingest", ready=False)
    assert second.process.wait(60) == 73
    (line,) = second.text.splitlines()
    assert "number 1" in line
    assert "HONCHO_PROCESS_NAME" in line
    with sender() as sock:
        sock.send(b"one")
    assert [payload for *_, payload in take_datagrams(subscriber, 1)] == [b"one"]
    first.process.kill()
    first.process.wait()
    stack.start("ingest")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_arrive_with_source_and_payload(stack: Stack, bus: BusEnds, host: str) -> None:
    """Datagrams of every size, from none to 65,507 bytes, arrive whole and in order, from where they came."""
    stack.start("ingest")
    subscriber = follow(bus)
    payloads = [b"", b"x", b"%s\0{[", bytes(range(256)) * 6, b"z" * MAX_DATAGRAM, b""]
    with sender(host) as sock:
        for payload in payloads:
            sock.send(payload)
        own = sock.getsockname()[:2]
    assert take_datagrams(subscriber, len(payloads)) == [(*own, payload) for payload in payloads]


def test_batch_longer_than_a_bus_message_is_cut(stack: Stack, bus: BusEnds) -> None:
    """A receive call of more than a message's limit goes as several, with nothing lost or turned around."""
    worker = stack.start("ingest")
    subscriber = follow(bus)
    payloads = [bytes([number]) * MAX_DATAGRAM for number in range(30)]
    freeze(worker)
    with sender() as sock:
        for payload in payloads:
            sock.send(payload)
    worker.process.send_signal(signal.SIGCONT)
    assert [payload for _, _, payload in take_datagrams(subscriber, 30)] == payloads


def take_shaped(subscriber: Subscriber, count: int, shapes: Counter[str]) -> list[bytes]:
    """The next `count` payloads, waited for; in `shapes` it is counted how those of each batch came."""
    found: list[bytes] = []
    while len(found) < count:
        message = take(subscriber)
        assert isinstance(message.body, Datagrams)
        assert message.batch is not None
        found += [payload for _, _, payload in message.batch.datagrams()]
        lent = "in place" if message.body.stride else "end to end"
        shapes["in the message" if message.body.chunk is None else lent] += 1
    return found


@pytest.mark.parametrize("way", ["udp", "unixgram"])
def test_what_is_received_is_lent_whatever_its_sizes(stack: Stack, bus: BusEnds, tmp_path: Path, way: str) -> None:
    """Equal, growing, ragged, small and oversized datagrams, one batch after the other, arrive whole, lent or not."""
    stack.configure(UNIX.format(path=tmp_path / "s"))
    worker = stack.start("ingest")
    subscriber = follow(bus, "local")
    draw, shapes = random.Random(9), Counter[str]()
    time.sleep(GRACE_SECONDS)
    longest = MAX_DATAGRAM if way == "udp" else 100_000
    rounds = [[1400] * 60, [1400] * 60, [1400] * 59 + [1401], [1400] * 30, [9000] * 100, [9000] * 100, [1] * 40]
    rounds += [[draw.choice([0, 1, draw.randrange(3000), 1464]) for _ in range(90)] for _ in range(3)]
    rounds += [[*[20_000] * 20, longest], [*[20_000] * 20, longest, 20_000, longest, longest], [longest] * 40, [5]] * 2
    with socket.socket(socket.AF_INET if way == "udp" else socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 6668) if way == "udp" else str(tmp_path / "s"))
        sock.settimeout(60)
        for number, lengths in enumerate(rounds):
            payloads = [(b"%d.%d," % (number, row) * (size // 4 + 1))[:size] for row, size in enumerate(lengths)]
            if way == "udp":  # a path's queue holds ten
                freeze(worker)
            for payload in payloads:
                sock.send(payload)
            worker.process.send_signal(signal.SIGCONT)
            wanted = [payload for payload in payloads if len(payload) <= MAX_DATAGRAM]
            assert take_shaped(subscriber, len(wanted), shapes) == wanted
    assert subscriber.rejected == {}
    assert shapes["in place"]
    assert shapes["end to end"]
    assert shapes["in the message"]


def test_new_subscriber_is_told_where_the_stream_stands(stack: Stack, bus: BusEnds) -> None:
    """Each subscription is answered by a batch without rows that carries the running count."""
    stack.start("ingest")
    first = bus.subscriber(ALL)
    mark = take(first)
    assert mark.batch is not None
    assert (len(mark.batch), mark.envelope.total) == (0, 0)
    with sender() as sock:
        for _ in range(3):
            sock.send(b"x")
    take_datagrams(first, 3)
    late = take(bus.subscriber(ALL))
    assert late.batch is not None
    assert (len(late.batch), late.envelope.total, late.envelope.boot) == (0, 3, mark.envelope.boot)


def test_sender_gets_its_reply(stack: Stack, bus: BusEnds) -> None:
    """Every datagram is answered by the documented reply, over both families, whether or not anybody subscribes."""
    stack.start("ingest")
    for host in ("127.0.0.1", "::1"):
        with sender(host) as sock:
            for payload in (b"Hello", b""):
                sock.send(payload)
                assert sock.recv(100) == REPLY
    messages = accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"]["replied"] == 4)[
        "stream/messages"
    ]
    assert messages["reply_failed"] == 0


def test_sender_without_a_port_gets_no_reply(stack: Stack, bus: BusEnds) -> None:
    """A datagram from port 0 is taken like any other; its reply, which has nowhere to go, is counted as failed."""
    stack.start("ingest")
    subscriber = follow(bus)
    forge(0, PORT, b"from nowhere")
    assert take_datagrams(subscriber, 1) == [("127.0.0.1", 0, b"from nowhere")]
    accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"].get("reply_failed") == 1)


def test_senders_without_a_port_do_not_cost_others_their_reply(stack: Stack, bus: BusEnds) -> None:
    """A datagram that can be answered gets its reply, however many of its batch can't."""
    worker = stack.start("ingest")
    freeze(worker)
    for _ in range(100):
        forge(0, PORT, b"from nowhere")
    with sender() as sock:
        sock.send(b"Hello")
        worker.process.send_signal(signal.SIGCONT)
        assert sock.recv(100) == REPLY


def test_two_that_reply_do_not_answer_each_other(stack: Stack, bus: BusEnds) -> None:
    """A reply is not answered, so a datagram forged from one listener to another comes to rest."""
    other = STREAM.replace("messages", "others").replace("6667", "6668")
    stack.configure(STREAM + other)
    stack.start("ingest")
    forge(6667, 6668, b"Hello")
    found = accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"].get("reply_failed"))
    assert found["stream/others"]["replied"] == 1
    time.sleep(0.2)
    found = accounts_when(bus, "ingest.1", lambda _: True)
    assert found["stream/messages"]["received"] == found["stream/others"]["received"] == 1


def test_reply_beyond_loopback_has_to_be_asked_for(stack: Stack, bus: BusEnds) -> None:
    """A reply on an address that others reach is refused with 78 and the cures, unless the settings insist."""
    stream = '[[stream]]\nname = "messages"\nlisten = ["udp://0.0.0.0:6667"]\nreply = "Got your message!"\n'
    code, line = refusal(stack, stream)
    assert code == 78
    assert "a reply on udp://0.0.0.0:6667 would let forged sources aim it at others" in line
    assert "set reply_beyond_loopback = true" in line
    stack.configure(stream + "reply_beyond_loopback = true\n")
    stack.start("ingest")
    with sender() as sock:
        sock.send(b"Hello")
        assert sock.recv(100) == REPLY


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connection_brings_messages(stack: Stack, bus: BusEnds, host: str) -> None:
    """`Hello` and close is a message, lines and octet counts are several, each from where the connection came."""
    stack.start("ingest")
    subscriber = follow(bus)
    with connect(host) as connection:
        own = connection.getsockname()[:2]
        connection.sendall(b"one\ntwo\r\n11 <34>counted")
        assert take_datagrams(subscriber, 3) == [(*own, each) for each in (b"one", b"two", b"<34>counted")]
        connection.sendall(b"Hello")
    assert take_datagrams(subscriber, 1) == [(*own, b"Hello")]


def test_connection_with_many_messages_at_once(stack: Stack, bus: BusEnds) -> None:
    """More messages in a read than a batch has rows all arrive, in order."""
    stack.start("ingest")
    subscriber = follow(bus)
    lines = [b"%d" % number for number in range(10_000)]
    with connect() as connection:
        connection.sendall(b"\n".join(lines))
    assert [payload for _, _, payload in take_datagrams(subscriber, len(lines))] == lines


@pytest.mark.parametrize("text", [b"<34>message %d", b'{"short_message":"%d"}', b"%d"])
def test_messages_that_end_with_nul(stack: Stack, bus: BusEnds, text: bytes) -> None:
    """Messages that end with NUL (RFC 6587, 3.4.2) all arrive, syslog, GELF or anything, however many a connection."""
    stack.start("ingest")
    subscriber = follow(bus)
    sent = [text % number for number in range(3000)]
    with connect() as connection:
        connection.sendall(b"".join(message + b"\0" for message in sent))
        assert [payload for _, _, payload in take_datagrams(subscriber, len(sent))] == sent


def test_message_that_fits_no_datagram_ends_its_connection(stack: Stack, bus: BusEnds) -> None:
    """One too long is counted as oversized and its connection closed; one cut off before its count is counted so."""
    stack.start("ingest")
    subscriber = follow(bus)
    with connect() as connection:
        connection.sendall(b"before\n" + b"x" * (MAX_DATAGRAM + 20))
        assert is_closed(connection)
    with connect() as connection:
        connection.sendall(b"99 <34>cut off")
    assert take_datagrams(subscriber, 1)[0][2] == b"before"
    found = accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"].get("dropped_cut_off") == 1)
    assert found["stream/messages"]["dropped_oversized"] == 1
    assert found["stream/messages"]["received"] == 3
    (line,) = [
        line for line in stack["ingest"].log if line["event"].startswith("connection closed: a message is longer")
    ]
    assert (line["stream"], line["messages_lost"]) == ("messages", 1)
    assert MAX_DATAGRAM < line["bytes_lost"] <= MAX_DATAGRAM + 20


def test_connections_are_bounded(stack: Stack, bus: BusEnds) -> None:
    """One connection more than allowed is closed at once and counted; when another has gone there is room again."""
    stack.configure(STREAM + "[ingest]\ntcp_connections = 2\n")
    stack.start("ingest")
    subscriber = follow(bus)
    with connect() as first, connect() as second:
        for connection in (first, second):
            connection.sendall(b"served\n")
        take_datagrams(subscriber, 2)
        with connect() as third:
            assert is_closed(third)
        second.close()
        accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"]["connections_refused"] == 1)

        def served_again() -> bool:
            with connect() as another:
                another.sendall(b"again\n")
                another.shutdown(socket.SHUT_WR)
                assert is_closed(another)
            return subscriber.receive() is not None

        wait_until(served_again, "there is room for another")
        first.sendall(b"still served\n")
        while take_datagrams(subscriber, 1)[0][2] != b"still served":
            pass


def test_one_address_does_not_take_all_connections(stack: Stack, bus: BusEnds) -> None:
    """An address that opens all the connections that there may be leaves others theirs: 20 of 20 messages come."""
    stack.configure(STREAM + "[ingest]\ntcp_connections = 60\ntcp_connections_per_address = 30\n")
    stack.start("ingest")
    subscriber = follow(bus)
    with ExitStack() as silent:
        for _ in range(60):
            silent.enter_context(socket.create_connection(("127.0.0.1", PORT), 10, ("127.0.0.2", 0)))
        accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"].get("connections_refused") == 30)
        senders = [silent.enter_context(connect()) for _ in range(20)]
        for number, sender in enumerate(senders):
            sender.sendall(b"%d\n" % number)
        came = {payload for _, _, payload in take_datagrams(subscriber, 20)}
        assert came == {b"%d" % number for number in range(20)}


def test_idle_connection_expires(stack: Stack, bus: BusEnds) -> None:
    """A connection that sends nothing for too long is closed; a message it had not finished is counted as cut off."""
    stack.configure(STREAM + "[ingest]\ntcp_idle_seconds = 0.2\n")
    stack.start("ingest")
    subscriber = follow(bus)
    with connect() as connection:
        connection.sendall(b"whole\nhalf a mess")
        assert is_closed(connection)
    assert take_datagrams(subscriber, 1)[0][2] == b"whole"
    accounts = accounts_when(bus, "ingest.1", lambda found: found["stream/messages"].get("connections_expired") == 1)
    assert (accounts["stream/messages"]["received"], accounts["stream/messages"]["dropped_cut_off"]) == (2, 1)


def test_workers_share_the_port(stack: Stack, bus: BusEnds, tmp_path: Path) -> None:
    """Two workers on one port each get some of the senders, and every datagram arrives once. A path is the first's."""
    at_path, others = f"unixgram://{tmp_path}/in.sock", LISTEN.replace('"', "").split(", ")
    stack.configure(STREAM.replace("listen = [", f'listen = ["{at_path}", '))
    one, other = (stack.start(name) for name in ("ingest.1", "ingest.2"))
    assert [each.events("ready")[0]["listen"] for each in (one, other)] == [[at_path, *others], others]
    left = "listeners that can't be shared are left to the first worker of this host"
    assert [line["listen"] for line in other.events(left)] == [[at_path]]
    assert not one.events(left)
    subscriber = bus.subscriber(ALL)
    assert {take(subscriber).envelope.sender for _ in range(2)} == {"ingest.1", "ingest.2"}
    expected = set()
    for number in range(64):
        with sender() as sock:
            sock.send(b"%d" % number)
            expected.add((*sock.getsockname(), b"%d" % number))
    workers, found = set(), list[Datagram]()
    while len(found) < 64:
        message = take(subscriber)
        assert message.batch is not None
        workers.add(message.envelope.sender)
        found += message.batch.datagrams()
    assert set(found) == expected
    assert workers == {"ingest.1", "ingest.2"}


def test_path_takes_datagrams(stack: Stack, bus: BusEnds, tmp_path: Path) -> None:
    """Datagrams on a path arrive as from loopback, port 0; one longer than UDP carries is counted and dropped."""
    path = tmp_path / "in.sock"
    stack.configure(UNIX.format(path=path))
    worker = stack.start("ingest")
    subscriber = follow(bus, "local")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(str(path))
        for payload in (b"one", bytes(100_000), b"", b"z" * MAX_DATAGRAM):
            sock.send(payload)
    source = unpack_address(LOCAL_SENDER)
    assert take_datagrams(subscriber, 3) == [(source, 0, each) for each in (b"one", b"", b"z" * MAX_DATAGRAM)]
    found = accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/local"]["received"] == 4)
    assert found["stream/local"]["dropped_oversized"] == 1
    assert worker.stop(signal.SIGTERM) == 0
    assert not path.exists()


def test_path_belongs_to_the_first_worker(stack: Stack, bus: BusEnds, tmp_path: Path) -> None:
    """A second worker leaves the path alone, when it starts and when it ends."""
    path = tmp_path / "in.sock"
    stack.configure(UNIX.format(path=path))
    second = stack.start("ingest.2")
    assert not path.exists()
    stack.start("ingest.1")
    assert second.stop(signal.SIGTERM) == 0
    assert path.is_socket()


def test_path_of_a_killed_worker_is_taken_over(stack: Stack, bus: BusEnds, tmp_path: Path) -> None:
    """A path that nobody listens on any more is bound anew; one that is in use, or is something else, is not."""
    path = tmp_path / "in.sock"
    settings = UNIX.format(path=path)
    stack.configure(settings)
    stack.start("ingest").stop(signal.SIGKILL)
    assert path.is_socket()
    stack.start("ingest")
    stack.bus = tmp_path / "another bus"  # where the number is free
    code, line = refusal(stack, settings.replace(":6668", ":6669"))
    assert code == 1
    assert f"unixgram://{path}: Address already in use" in line
    assert "`ss -xlp`" in line
    (tmp_path / "file").write_text("mine")
    code, line = refusal(stack, settings.replace("in.sock", "file").replace(":6668", ":6669"))
    assert (code, (tmp_path / "file").read_text()) == (1, "mine")


@pytest.mark.parametrize("scheme", ["udp", "tcp"])
def test_port_in_use_is_one_line(stack: Stack, lab: None, scheme: str) -> None:
    """A port that somebody holds without sharing it ends the start with 1, naming the endpoint and their process."""
    kind = socket.SOCK_DGRAM if scheme == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if scheme == "tcp":
            holder.listen()
        endpoint = f"{scheme}://127.0.0.1:{holder.getsockname()[1]}"
        with held_by_a_program(holder) as pid:
            code, line = refusal(stack, f'[[stream]]\nname = "a"\nlisten = ["{endpoint}"]\n')
    assert code == 1
    assert f"{endpoint}: Address already in use by process {pid} (" in line


@pytest.mark.parametrize(
    ("endpoint", "code"),
    [(f"udp://{'a' * 64}:6667", 78), ("udp://192.0.2.1:6667", 1)],
)
def test_address_that_cannot_be_had_is_one_line(stack: Stack, lab: None, endpoint: str, code: int) -> None:
    """A name that no host can have, and an address that is not ours, end the start with one line."""
    exit_code, line = refusal(stack, f'[[stream]]\nname = "a"\nlisten = ["{endpoint}"]\n')
    assert exit_code == code
    assert f'a\\" listen: {endpoint}: ' in line


def test_port_of_another_bus_is_refused(stack: Stack, lab: None) -> None:
    """A port of another bus's worker ends the start with one line that names both; those of one bus share it."""
    text = '[[stream]]\nname = "a"\nlisten = ["{}://{}:6671"]\n'
    stack.configure('[[stream]]\nname = "a"\nlisten = ["udp://127.0.0.1:6671", "tcp://[::]:6671"]\n')
    stack.start("broker")
    first = stack.start("ingest.1")
    stack.start("ingest.2")
    other = f'[bus]\ndirectory = "{stack.directory}/other"\n'
    mine = stack.directory / "fanwire.toml"
    for scheme, host in (("udp", "127.0.0.1"), ("udp", "0.0.0.0"), ("udp", "[::]"), ("tcp", "127.0.0.1")):
        mine.write_text(other + text.format(scheme, host))
        refused = stack.start("ingest", ready=False)
        assert refused.process.wait(60) == 1
        (line,) = refused.log
        named = re.search(
            r"the ingest worker with pid (\d+), of the bus in (\S+), listens there: each would", line["event"]
        )
        assert named
        assert (int(named[1]) in (first.process.pid, stack["ingest.2"].process.pid), named[2]) == (True, str(stack.bus))
        assert "stop that one, listen elsewhere, or set [ingest] share_ports = true" in line["event"]
    for apart in (text.format("udp", "127.0.0.2"), text.format("udp", "127.0.0.1") + "[ingest]\nshare_ports = true\n"):
        mine.write_text(other + apart)
        sharing = stack.start("ingest", ready=False)
        sharing.wait_for("waiting for the broker")
        if apart != text.format("udp", "127.0.0.2"):
            stack.configure(text.format("udp", "127.0.0.1"))
            (told,) = listening_facts(load(mine, {}), None).shared.values()
            assert told == f"the ingest worker with pid {sharing.process.pid}, of the bus in {stack.directory}/other,"
        sharing.stop()


def test_worker_waits_for_a_broker(stack: Stack, lab: None) -> None:
    """Without a broker a worker says after a while what it waits for, and is ready when one comes."""
    stack.configure(STREAM)
    worker = stack.start("ingest", ready=False)
    worker.wait_for("waiting for the broker; start it with")
    assert not worker.events("ready")
    stack.start("broker")
    worker.wait_for('"ready"')
    with BusEnds(stack.bus) as bus, sender() as sock:
        subscriber = follow(bus)
        sock.send(b"Hello")
        assert take_datagrams(subscriber, 1)[0][2] == b"Hello"


def test_stream_nobody_wants_is_counted(stack: Stack, bus: BusEnds) -> None:
    """Without a subscriber nothing is published, and what is dropped for that is counted, datagrams and messages."""
    stack.start("ingest")
    with sender() as sock, connect() as connection:
        for _ in range(5):
            sock.send(b"xyz")
            sock.recv(100)
        connection.sendall(b"xyz\n" * 2)
    found = accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"]["received"] == 7)[
        "stream/messages"
    ]
    assert found["dropped_no_subscriber"] == 7
    assert found["bytes"] == 21
    assert found.get("published", 0) == 0


def test_what_the_kernel_drops_is_counted(stack: Stack, bus: BusEnds) -> None:
    """Beyond a receive buffer that is full the kernel drops, and its count completes ours."""
    stack.configure(STREAM + "receive_buffer = 4096\n")
    worker = stack.start("ingest")
    freeze(worker)
    with sender() as sock:
        for _ in range(100):
            sock.send(bytes(1000))
    worker.process.send_signal(signal.SIGCONT)

    def complete(accounts: Accounts) -> bool:
        account = accounts["stream/messages"]
        return account.get("received", 0) + account["kernel_dropped"] == 100

    accounts = accounts_when(bus, "ingest.1", complete)
    listener = accounts[f"listener/messages/udp://127.0.0.1:{PORT}"]
    assert accounts["stream/messages"]["kernel_dropped"] == listener["kernel_dropped"] == drops_of("0100007F", PORT) > 0


def drops_of(address: str, port: int) -> int:
    """Return the datagrams that /proc/net/udp says the kernel has dropped at a socket: its last column."""
    lines = Path("/proc/self/net/udp").read_text().splitlines()[1:]
    return sum(int(line.split()[-1]) for line in lines if line.split()[1] == f"{address}:{port:04X}")


def test_small_buffer_is_said_with_its_cure(stack: Stack, bus: BusEnds) -> None:
    """Without CAP_NET_ADMIN a buffer may be smaller than asked for: one line has both sizes and the sysctl to set."""
    stack.configure(STREAM + f"receive_buffer = {1 << 30}\n")
    unprivileged = ["setpriv", "--bounding-set=-net_admin"] if os.geteuid() == 0 else []
    worker = stack.spawn("ingest", [*unprivileged, sys.executable, "-m", "services.ingest"])
    worker.wait_for('"ready"')
    (said,) = [line for line in worker.log if "receive buffers are smaller" in line["event"]]
    assert (said["level"], said["asked"]) == ("warning", 1 << 30)
    assert 0 < said["granted"] < 1 << 30
    assert f"sysctl -w net.core.rmem_max={1 << 30}" in said["cure"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 30)
        assert said["granted"] == receive_buffer(plain)


JOIN = """
import errno, socket
for address in ("127.0.0.1", "0.0.0.0", "::1", "::"):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            sock.bind((address, 6667))
        except OSError as error:
            print(address, errno.errorcode[error.errno])
        else:
            print(address, "bound")
"""


@pytest.mark.skipif(not IS_ROOT, reason="needs root, who can become another user")
@pytest.mark.parametrize("listen", ['"udp://127.0.0.1:6667", "udp://[::1]:6667"', '"udp://[::]:6667"'])
def test_no_other_user_gets_a_share(stack: Stack, bus: BusEnds, listen: str) -> None:
    """Another user can neither join the workers at an address, nor take a more or less special one before them."""
    stack.configure(f'[[stream]]\nname = "messages"\nlisten = [{listen}]\n')
    stack.start("ingest")
    command = [readable_interpreter(), "-I", "-c", JOIN]
    said = subprocess.run(command, preexec_fn=as_nobody, capture_output=True, text=True, check=True, cwd="/").stdout
    assert said.splitlines() == [f"{address} EADDRINUSE" for address in ("127.0.0.1", "0.0.0.0", "::1", "::")]
    stack.start("ingest.2")  # the same user may


def test_each_listener_has_its_account(stack: Stack, bus: BusEnds, tmp_path: Path) -> None:
    """Datagrams are told apart by the listener of a stream that they came by, whoever wants them: UDP, TCP, a path."""
    path = tmp_path / "in.sock"
    stack.configure(STREAM.replace("listen = [", f'listen = ["unixgram://{path}", '))
    stack.start("ingest")
    with sender() as one, sender("::1") as other, connect() as connection:
        for _ in range(3):
            one.send(b"xyz")
        other.send(b"xy")
        connection.sendall(b"a\nbc\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"1234", str(path))
        sock.sendto(bytes(70_000), str(path))  # longer than a slot: cut, and dropped
    accounts = accounts_when(bus, "ingest.1", lambda found: found["stream/messages"].get("received") == 8)
    came = {name.split("/", 2)[2]: (each.get("received", 0), each.get("bytes", 0)) for name, each in accounts.items()
            if name.startswith("listener/messages/")}  # fmt: skip
    assert came == {
        f"unixgram://{path}": (2, 4),
        "udp://127.0.0.1:6667": (3, 9),
        "udp://[::1]:6667": (1, 2),
        "tcp://127.0.0.1:6667": (2, 3),
        "tcp://[::1]:6667": (0, 0),
    }
    assert accounts["ingest"]["discrepancies"] == 0


def test_wrong_checksum_is_counted_for_the_host(stack: Stack, bus: BusEnds) -> None:
    """A datagram that the kernel drops for its checksum never comes to a worker, and is counted as the kernel does.

    Over IPv4 a datagram may do without one, and is taken; over IPv6 that is wrong.
    """
    before = checksum_errors()
    stack.start("ingest")
    subscriber = follow(bus)
    with forging() as forger:
        for host in ("127.0.0.1", "::1"):
            forger.send((host, 999), (host, PORT), b"oops", wrong=0x100)
            forger.send((host, 999), (host, PORT), b"without", checksum=False)
    assert take_datagrams(subscriber, 1) == [("127.0.0.1", 999, b"without")]
    accounts = accounts_when(
        bus, "ingest.1", lambda found: found["host"]["checksum_errors"] >= before + 3 and found["stream/messages"]
    )
    assert accounts["host"]["checksum_errors"] == before + 3
    assert accounts["stream/messages"]["received"] == 1


def test_what_is_missing_upstream_is_counted_whoever_wants_it(stack: Stack, bus: BusEnds) -> None:
    """A stream with a protocol counts what is missing from its exporters' numbers, and passes every byte on."""
    stack.configure('[[stream]]\nname = "flows"\nlisten = ["udp://127.0.0.1:6668"]\nprotocol = "netflow"\n')
    worker = stack.start("ingest")
    payloads = [netflow_v9(number, rest=bytes(number * 300)) for number in (1, 2, 4, 5, 9)]
    with sender(port=6668) as sock:
        for payload in payloads:
            sock.send(payload)
        accounts_when(bus, "ingest.1", lambda found: found["stream/flows"].get("exporter_missed") == 4)
        subscriber = follow(bus, "flows")
        for payload in (netflow_v9(10), b"none of it", netflow_v9(12)):
            sock.send(payload)
    assert [payload for *_, payload in take_datagrams(subscriber, 3)] == [netflow_v9(10), b"none of it", netflow_v9(12)]
    assert worker.stop(signal.SIGTERM) == 0
    account = worker.events("drained")[0]["stream/flows"]
    assert (account["exporter_missed"], account["not_flow"], account["exporters"]) == (5, 1, 1)


def test_full_bus_drops_and_counts(stack: Stack) -> None:
    """While the broker does not read, datagrams beyond the high-water mark are dropped and counted; then it goes on."""
    stack.start("broker")  # at its own mark, or it would drop what it took when it goes on
    stack.configure("high_water_mark = 2\n" + STREAM)  # [bus] comes first in the file
    stack.start("ingest")
    with BusEnds(stack.bus) as bus, sender() as sock:
        subscriber = follow(bus)
        freeze(stack["broker"])
        for _ in range(60):
            sock.send(bytes(60_000))
            sock.recv(100)
        stack["broker"].process.send_signal(signal.SIGCONT)
        found = accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"]["received"] == 60)
        published = found["stream/messages"]["published"]
        assert found["stream/messages"]["dropped_bus_full"] == 60 - published > 0
        assert len(take_datagrams(subscriber, published)) == published


def test_what_comes_without_a_broker_is_counted(stack: Stack) -> None:
    """While there is no broker the worker goes on: what its queue holds comes later, the rest is dropped and counted.

    What the new broker took before the subscriber was back is missed; everything is taken, missed or dropped.
    """
    broker = stack.start("broker")
    stack.configure("high_water_mark = 8\n" + STREAM)
    worker = stack.start("ingest")
    with BusEnds(stack.bus) as bus, sender() as sock:
        subscriber, continuity = follow(bus), Continuity()
        broker.stop(signal.SIGKILL)
        for _ in range(60):
            sock.send(b"for whom")
            assert sock.recv(100) == REPLY  # nothing holds it up
        stack.start("broker")

        def receive() -> list[bytes]:
            found = []
            while message := subscriber.receive():
                assert message.batch is not None
                continuity.observe(message.topic, message.envelope, len(message.batch))
                found += [payload for *_, payload in message.batch.datagrams()]
            return found

        def flows() -> bool:
            sock.send(b"again")
            assert sock.recv(100) == REPLY
            return b"again" in receive()

        wait_until(flows, "it flows again")
        assert worker.stop(signal.SIGTERM) == 0
        account = worker.events("drained")[0]["stream/messages"]
        (position,) = continuity.positions.values()
        wait_until(lambda: (receive(), position.reached == account["published"])[1], "all has come")
        assert account["dropped_bus_full"] > 0
        assert account["received"] == account["published"] + account["dropped_bus_full"] > 60
        assert account["published"] == position.baseline + position.taken + position.missed


def test_worker_drains_under_load(stack: Stack, bus: BusEnds) -> None:
    """SIGTERM under load: exit 0, all that was received is published or counted, and nothing of it is left open."""
    stack.configure(STREAM)
    worker = stack.start("ingest")
    subscriber, continuity = follow(bus), Continuity()
    taken = 0

    def receive() -> int:
        nonlocal taken
        while message := subscriber.receive():
            assert message.batch is not None
            continuity.observe(message.topic, message.envelope, len(message.batch))
            taken += len(message.batch)
        return taken

    with under_load():
        wait_until(lambda: receive() > 2000, "load flows")
        worker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: (receive(), worker.process.poll() is not None)[1], "the worker ends")
    assert worker.process.returncode == 0
    (drained,) = worker.events("drained")
    account = drained["stream/messages"]
    assert list(discrepancies({"stream/messages": account})) == []
    (position,) = continuity.positions.values()
    wait_until(
        lambda: (receive(), position.reached >= account["published"])[1], "everything published is accounted for"
    )
    assert position.reached == account["published"]
    assert position.taken == taken
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_INET, kind) as successor:
            successor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
            successor.bind(("127.0.0.1", PORT))


@contextmanager
def under_load() -> Iterator[None]:
    """Datagrams keep coming, as fast as a thread can send them."""
    ended = threading.Event()

    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while not ended.is_set():
                for _ in range(20):
                    sock.sendto(b"x" * 100, ("127.0.0.1", PORT))
                time.sleep(0.001)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_queue_of_the_kernel_is_drained(stack: Stack, bus: BusEnds) -> None:
    """Datagrams queued in the kernel when SIGTERM comes are published, all of them, in several batches if need be."""
    worker = stack.start("ingest")
    subscriber = follow(bus)
    freeze(worker)
    with sender() as sock:
        for number in range(1000):
            sock.send(b"%d" % number)
    worker.process.send_signal(signal.SIGTERM)
    worker.process.send_signal(signal.SIGCONT)
    payloads = [payload for _, _, payload in take_datagrams(subscriber, 1000)]
    assert payloads == [b"%d" % number for number in range(1000)]
    assert worker.process.wait(PATIENCE_SECONDS) == 0


def test_its_last_report_says_so(stack: Stack, bus: BusEnds) -> None:
    """A worker that is told to end says that this report is its last; whoever misses killed ones misses it not."""
    subscriber = bus.subscriber(status_topic("ingest.1"))
    worker = stack.start("ingest")
    worker.process.send_signal(signal.SIGTERM)
    take_last_report(subscriber)
    assert worker.process.wait(60) == 0
    assert subscriber.receive() is None


def test_open_connection_is_drained(stack: Stack, bus: BusEnds) -> None:
    """On SIGTERM all that has come on an open connection is published, but a message that has no end is cut off."""
    worker = stack.start("ingest")
    subscriber = follow(bus)
    with connect() as connection:
        connection.sendall(b"first\n")
        take_datagrams(subscriber, 1)
        lines = [b"%d" % number * 20 for number in range(5000)]
        connection.sendall(b"\n".join([*lines, b"half a mess"]))
        assert worker.stop(signal.SIGTERM) == 0
        assert [payload for _, _, payload in take_datagrams(subscriber, len(lines))] == lines
    assert worker.events("drained")[0]["stream/messages"]["dropped_cut_off"] == 1


def test_connection_that_waits_is_drained(stack: Stack, bus: BusEnds) -> None:
    """On SIGTERM messages of clients that the worker had not accepted yet are published too."""
    worker = stack.start("ingest")
    subscriber = follow(bus)
    freeze(worker)
    with ExitStack() as opened:
        for number in range(20):
            opened.enter_context(connect()).sendall(b"%d\n" % number)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.stop(signal.SIGCONT) == 0
    expected = sorted(b"%d" % number for number in range(20))
    assert sorted(payload for *_, payload in take_datagrams(subscriber, 20)) == expected


def test_restarted_worker_is_another_origin(stack: Stack, bus: BusEnds) -> None:
    """After SIGKILL a worker begins its count again under a new boot id, and its senders are served again."""
    worker = stack.start("ingest")
    subscriber = bus.subscriber(ALL)
    first = take(subscriber).envelope
    with sender() as sock:
        sock.send(b"x")
    take_datagrams(subscriber, 1)
    worker.stop(signal.SIGKILL)
    restarted = stack.start("ingest")
    with sender() as sock:
        sock.send(b"y")
        assert sock.recv(100) == REPLY
    message = take(subscriber)
    while message.batch is None or not len(message.batch):
        message = take(subscriber)
    assert message.envelope.total == 0
    assert message.envelope.boot != first.boot
    assert restarted.stop(signal.SIGTERM) == 0


def test_killed_worker_counts_as_gone_and_not_as_lost(stack: Stack, bus: BusEnds) -> None:
    """A killed worker is followed to its last message; that its successor counts from zero is no loss."""
    stack.configure(STREAM)
    worker = stack.start("ingest")
    subscriber, continuity = follow(bus), Continuity()
    for number in (5, 3):
        with sender() as sock:
            for _ in range(number):
                sock.send(b"x")
        taken = 0
        while taken < number:
            message = take(subscriber)
            assert message.batch is not None
            assert not continuity.observe(message.topic, message.envelope, len(message.batch))
            taken += len(message.batch)
        worker.stop(signal.SIGKILL)
        worker = stack.start("ingest")
    assert [position.reached for position in continuity.positions.values()] == [5, 3]
    assert not any(position.missed for position in continuity.positions.values())


def test_numbers_are_read_wherever_datagrams_were_received(stack: Stack, bus: BusEnds) -> None:
    """In the arena, in lent memory or partly in both: exporters' numbers are found, and nothing else is missed."""
    stack.configure('[[stream]]\nname = "flows"\nlisten = ["udp://127.0.0.1:6668"]\nprotocol = "netflow"\n')
    worker = stack.start("ingest")
    subscriber, shapes, number = follow(bus, "flows"), Counter[str](), 0
    time.sleep(GRACE_SECONDS)
    with sender(port=6668) as sock:
        for sizes in (
            [1400] * 60,
            [1400] * 60,
            [900] * 59 + [5000],
            [700] * 60,
            [*range(40, 1000, 16)],
            [3000, 40] * 30,
        ):
            payloads = [netflow_v9(number + at, rest=bytes(size)) for at, size in enumerate(sizes)]
            freeze(worker)
            for payload in payloads:
                sock.send(payload)
            worker.process.send_signal(signal.SIGCONT)
            assert take_shaped(subscriber, len(payloads), shapes) == payloads
            number += len(payloads) + 1  # one is lost between rounds
    assert worker.stop(signal.SIGTERM) == 0
    account = worker.events("drained")[0]["stream/flows"]
    assert (account["exporter_missed"], account.get("not_flow", 0), account.get("exporter_reordered", 0)) == (5, 0, 0)
    assert shapes["in place"]
    assert shapes["end to end"]


def test_two_streams_cannot_share_an_address(stack: Stack, lab: None) -> None:
    """The kernel would deal datagrams out between two streams on one address: the start is refused in one line."""
    both = "".join(f'[[stream]]\nname = "{name}"\nlisten = ["udp://127.0.0.1:6667"]\n' for name in "ab")
    code, said = refusal(stack, both)
    assert code == 78
    assert 'b\\" listen: udp://127.0.0.1:6667 is the address of another listener too; give each its own' in said


def test_running_out_of_descriptors_costs_nobody_else(stack: Stack, bus: BusEnds) -> None:
    """With few descriptors to be had, connections beyond them are refused and counted; datagrams go on."""
    command = ["prlimit", "--nofile=160:160", sys.executable, "-m", "services.ingest"]
    stack.spawn("few", command, HONCHO_PROCESS_NAME="ingest.1").wait_for('"event": "ready"')
    subscriber = follow(bus)
    with ExitStack() as opened:
        for _ in range(80):
            opened.enter_context(connect())
        with sender() as sock:
            sock.send(b"still here")
            assert sock.recv(100) == REPLY
        assert take_datagrams(subscriber, 1)[0][2] == b"still here"
        accounts = accounts_when(bus, "ingest.1", lambda found: "connections_refused" in found["stream/messages"])
        assert accounts["stream/messages"]["connections_refused"] == 80 - (160 - SPARE_DESCRIPTORS)


def test_what_comes_while_draining_is_counted(stack: Stack, bus: BusEnds) -> None:
    """From SIGTERM on the kernel refuses, and counts, what arrives: a light stream loses nothing beside a flood."""
    light = '[[stream]]\nname = "light"\nlisten = ["udp://127.0.0.1:6668"]\n'
    stack.configure(STREAM + light)
    worker = stack.start("ingest")
    follow(bus, "light")
    follow(bus)
    sent = 0
    with under_load(), sender(port=6668) as sock:
        for number in range(10_000):
            if number == 200:
                worker.process.send_signal(signal.SIGTERM)
            try:
                sock.send(b"light")
            except ConnectionRefusedError:  # the answer to the one before, which found nobody
                sent -= 1
                break
            sent += 1
            time.sleep(0.0005)
    assert worker.process.wait(60) == 0
    account = worker.events("drained")[0]["stream/light"]
    # Between the last count and the close there is a moment in which one more may come.
    assert sent - 2 <= account["received"] + account["kernel_dropped"] <= sent
    assert account["received"] == account["published"] >= 200


def test_datagram_longer_than_ipv4_carries_is_oversized(stack: Stack, bus: BusEnds) -> None:
    """UDP over IPv6 can bring 20 bytes more than a copy over IPv4 could carry: such are counted and dropped."""
    stack.start("ingest")
    subscriber = follow(bus)
    with sender("::1") as sock:
        for payload in (b"before", bytes(MAX_DATAGRAM + 1), bytes(MAX_DATAGRAM + 20), b"after"):
            sock.send(payload)
    assert [payload for _, _, payload in take_datagrams(subscriber, 2)] == [b"before", b"after"]
    found = accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/messages"]["received"] == 4)
    assert found["stream/messages"]["dropped_oversized"] == 2


STUCK = """
import sys, time
from services.ingest import receiver, __main__
receiver.DatagramReceiver.receive = lambda self: time.sleep(1000)
sys.exit(__main__.main([]))
"""


@pytest.mark.parametrize("broker", [True, False])
def test_watchdog_is_fed_by_turns(stack: Stack, lab: None, broker: bool) -> None:
    """A worker feeds the watchdog while its loop turns, idle or waiting for the broker; one that is stuck does not."""
    stack.configure(STREAM)
    if broker:
        stack.start("broker")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, sender() as sock:
        manager.bind(str(stack.directory / "notify"))
        manager.settimeout(60)
        asked = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "1000000"}
        stack.spawn("ingest", [sys.executable, "-c", STUCK], **asked)
        for _ in range(3):
            while manager.recv(100) != b"WATCHDOG=1":
                pass
        sock.send(b"it gets stuck on this")
        manager.settimeout(1.5)  # a turn comes at least each second
        with pytest.raises(TimeoutError):
            wait_until(lambda: not manager.recv(100), "it is fed no more")
    kill_all(stack)


def test_without_memory_to_lend_payloads_go_through_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that can't seal memory, as before Linux 5.1, costs the lending, and the worker starts."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    pools = new_pools(["a", "b"], 2 * CHUNK, Room(4 * CHUNK))
    assert set(pools) == {"a", "b"}
    for pool in pools.values():
        pool.close()
    del pools, pool
    gc.collect()
    assert new_pools(["a"], CHUNK - 1, Room(CHUNK)) == {}
    monkeypatch.setattr("fcntl.fcntl", refuse)
    assert new_pools(["a"], CHUNK, Room(CHUNK)) == {}

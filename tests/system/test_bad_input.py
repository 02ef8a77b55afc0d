"""Input that nobody should send, to the whole stack: each has its clear answer, and the good goes on."""

import os
import random
import socket
import subprocess
import sys
from contextlib import closing
from itertools import product

import msgpack
import pytest
import zmq

from shared.bus.endpoint import ipc_endpoint
from shared.bus.messages import REGISTRY_TOPIC, TRANSMIT_TOPIC, VERSION, datagrams_topic, serve_topic, status_topic
from tests.builders import heavy_bodies
from tests.capabilities import held_by_a_program
from tests.openly import OpenStack
from tests.stack import Stack, sign_up
from tests.traffic import open_receiver

TOPICS = (
    datagrams_topic("messages"),
    REGISTRY_TOPIC,
    TRANSMIT_TOPIC,
    serve_topic("relay"),
    serve_topic("original"),
    status_topic("ingest.1"),
    "reply/",
    "nobody/",
)


def garbage(draw: random.Random) -> list[bytes]:
    """Parts of any number, size and content, behind a topic that somebody listens to."""
    nested = b"\x91" * 100_000 + b"\x90"
    pool = (b"", b"\xff" * 40, draw.randbytes(300), nested, b"\x96\x01\xa9datagrams\xa1x\x01\x00\x00", b"\x80" * 50_000)
    return [draw.choice(TOPICS).encode(), *(draw.choice(pool) for _ in range(draw.randint(0, 6)))]


def test_garbage_on_every_topic_disturbs_nobody(open_stack: OpenStack) -> None:
    """Garbage on every bus topic is counted and dropped; every process runs on and copies of both kinds still flow."""
    stack = open_stack
    stack.start_all()
    stack.start("transmitter")
    draw = random.Random(3)
    before = {running.name: running.forget_peak() for running in stack.running}
    with zmq.Context() as context, context.socket(zmq.PUB) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(ipc_endpoint(stack.bus, "publish"))
        sinks = [open_receiver("127.0.0.1", port)[0] for port in (9100, 9101)]
        with closing(sinks[0]), closing(sinks[1]), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            for port, source in ((9100, "relay"), (9101, "original")):
                sign_up({"name": source, "streams": ["messages"], "port": port, "source": source})
            for sink in sinks:
                sink.settimeout(60)
            for number in range(50):
                for _ in range(20):
                    stranger.send_multipart(garbage(draw))
                sender.sendto(b"%d" % number, ("127.0.0.1", 6667))
                assert [sink.recv(100) for sink in sinks] == [b"%d" % number] * 2
            for topic, (kind, body) in product(TOPICS, heavy_bodies()):
                envelope = msgpack.packb([VERSION, kind, "ingest.9", 1, 0, 0])
                stranger.send_multipart([topic.encode(), envelope, body + b"\0"])  # wrong after all of it was read
                sender.sendto(b"on", ("127.0.0.1", 6667))
                assert [sink.recv(100) for sink in sinks] == [b"on"] * 2
            for sink in sinks:
                sink.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    sink.recv(100)
    for name in ("forwarder", "transmitter"):
        assert "bus message dropped" in stack[name].text
        assert len(stack[name].text.splitlines()) < 100, "more than a line a second"
    for running in stack.running:
        assert running.process.poll() is None, running.text
        assert running.resident_mb("VmHWM") - before[running.name] < 100, running.name
        assert "Traceback" not in running.text


@pytest.mark.parametrize("name", ["gateway", "ingest", "forwarder"])
def test_start_without_the_broker_says_so(stack: Stack, name: str) -> None:
    """A service without a broker says what it waits for, and is ready when the broker comes."""
    service = stack.start(name, ready=False)
    service.wait_for("waiting for the broker")
    assert service.process.poll() is None
    assert "accounts end" not in service.text, "the bus directory is there for its file of accounts"
    stack.start("broker")
    service.wait_for('"event": "ready"')


SERVICES = ("broker", "gateway", "ingest", "forwarder", "transmitter")
READ_ONLY = "mkdir -p {at} && mount -t tmpfs -o ro fanwire {at} && exec {python} -m services.{name}"


@pytest.mark.parametrize("name", SERVICES)
def test_read_only_file_system_is_one_line_everywhere(stack: Stack, name: str) -> None:
    """A service ends with 73 where no bus directory can be made, and one line: what, why, and which setting."""
    command = READ_ONLY.format(at=stack.directory / "ro", python=sys.executable, name=name)
    new = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*new, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own")
    running = stack.spawn(name, [*new, "sh", "-c", command], FANWIRE_BUS__DIRECTORY=str(stack.directory / "ro" / "bus"))
    assert running.process.wait(60) == 73
    lines = [line for line in running.text.splitlines() if "no raw sockets" not in line and line[0] == "{"]
    assert len(lines) == 1
    assert f"bus directory {stack.directory}/ro/bus: Read-only file system; set [bus] directory" in lines[0]
    assert "Traceback" not in running.text


@pytest.mark.parametrize("name", ["broker", "gateway", "ingest", "forwarder", "operator"])
def test_unknown_setting_is_one_line_everywhere(stack: Stack, name: str) -> None:
    """Settings with an unknown key end every program with 78 and one line: file, key, what was expected."""
    stack.configure("[gateway]\nmax_client = 5\n")
    arguments = ("streams",) if name == "operator" else ()
    running = stack.start(name, *arguments, ready=False)
    assert running.process.wait(60) == 78
    lines = [line for line in running.text.splitlines() if line != "Starting server..."]
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("fanwire.toml", "[gateway] max_client", "max_clients"))


def test_ports_in_use_are_named(stack: Stack) -> None:
    """A listener on a port in use ends the service with 1 and a line that names the port and who has it."""
    stack.start("broker")
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as udp, closing(socket.socket()) as tcp:
        udp.bind(("127.0.0.1", 6667))
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # others of this run have used it
        tcp.bind(("127.0.0.1", 5000))
        tcp.listen()
        with held_by_a_program(udp, tcp) as pid:
            for name, endpoint in (("ingest", "udp://localhost:6667"), ("gateway", "127.0.0.1:5000")):
                running = stack.start(name, ready=False)
                assert running.process.wait(60) == 1
                assert endpoint in running.text
                assert f"in use by process {pid} (sleep)" in running.text
                assert "Traceback" not in running.text


def test_operator_commands_without_a_broker_say_so(stack: Stack) -> None:
    """An operator command with no broker to talk to exits with 69 and one line that says how to start one."""
    for command in ("watch", "ledger", "clients"):
        running = stack.operator(command)
        assert running.process.wait(60) == os.EX_UNAVAILABLE
        assert len(running.text.splitlines()) == 1
        assert "fanwire run" in running.text

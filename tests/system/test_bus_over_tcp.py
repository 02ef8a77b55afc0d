"""The whole over TCP with keys, as with a second host, on loopback; and what the bus does not listen on."""

import os
import pwd
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from services.operator.doctor.facts import listen
from shared.bus.curve_keys import ROLES, write_keys
from shared.bus.endpoint import open_link
from shared.settings.model import Settings
from shared.settings.tables import Bus
from tests.builders import BusEnds, accounts_when, kill_all
from tests.openly import NOBODY, OpenStack
from tests.services.operator.played import run
from tests.stack import PATIENT, Stack, sign_up, wait_until
from tests.traffic import open_receiver

LISTEN = 'listen = ["tcp://localhost:5800"]\n'
CONNECT = 'connect = "tcp://127.0.0.1:5800"\n'


def make_keys(stack: Stack) -> str:
    """Make keys; return the setting that names them."""
    (stack.directory / "keys").mkdir()
    list(write_keys(stack.directory / "keys", ROLES))
    return f'keys = "{stack.directory}/keys"\n'


def apart(stack: Stack, setting: str) -> None:
    """Let programs started from now on reach the broker by TCP alone: their bus directory is another."""
    stack.bus = stack.directory / "other"
    stack.configure(setting)


def send(*payloads: bytes) -> None:
    """Send datagrams to the built-in stream."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as exporter:
        for payload in payloads:
            exporter.sendto(payload, ("127.0.0.1", 6667))


PAYLOADS = [bytes([number]) * size for number, size in enumerate((1, 1400, 60_000, 60_000, 65_507, 20_000, 60_000))]


@pytest.mark.parametrize("local", [(), ("ingest",), ("gateway", "forwarder")])
def test_whole_stack_delivers_over_tcp(stack: Stack, local: tuple[str, ...]) -> None:
    """Services that reach the broker by TCP do their work, whichever they are; large datagrams come in messages."""
    keys = make_keys(stack)
    stack.configure(LISTEN + keys + PATIENT)
    broker = stack.start("broker")
    for name in local:
        stack.start(name)
    apart(stack, CONNECT + keys + PATIENT)
    for name in {"gateway", "ingest", "forwarder"} - set(local):
        stack.start(name)
    receiver, _ = open_receiver("127.0.0.1", 9514)
    with closing(receiver):
        receiver.settimeout(60)
        sign_up({"name": "siem", "streams": ["messages"], "port": 9514})
        for _ in range(3):
            send(*PAYLOADS)
            assert [receiver.recv(65_536) for _ in PAYLOADS] == PAYLOADS
    code, text = run(stack, "ready", "broker", "gateway", "ingest", "forwarder")
    assert code == 0, text
    code, text = run(stack, "ledger")
    assert (code, text.splitlines()[-1]) == (0, "balanced")
    reached = Settings(
        bus=Bus(directory=str(stack.bus), connect="tcp://127.0.0.1:5800", keys=f"{stack.directory}/keys")
    )
    every = {"broker.1", "gateway.1", "ingest.1", "forwarder.1"}
    wait_until(lambda: every == {each.service for each in listen(reached)}, "all of them report")
    assert "refused" not in broker.text
    assert not [running for running in stack.running if "Traceback" in running.text]
    kill_all(stack)


def test_transmitter_that_becomes_another_user_has_its_key(open_stack: OpenStack) -> None:
    """A transmitter started by root reads its key as the user it becomes; one that can't says whose it must be."""
    stack = open_stack
    keys = make_keys(stack)
    stack.configure(keys)
    stack.start("broker")
    secret = stack.directory / "keys" / "transmitter.secret"
    if os.geteuid() == 0:
        refused = stack.start("transmitter", ready=False)
        assert refused.process.wait(60) == 78
        name = pwd.getpwuid(NOBODY).pw_name
        assert refused.text == f"{secret}: {name} can't read it; `chown {name} {secret}`, and open its directory\n"
        os.chown(secret, NOBODY, -1)
    stack.start("transmitter")
    with BusEnds(stack.bus, open_link(Bus(keys=f"{stack.directory}/keys"), "operator")) as bus:
        accounts_when(bus, "transmitter.1", lambda accounts: accounts["transmitter"])


def test_frames_are_asked_for_with_the_operators_key(open_stack: OpenStack) -> None:
    """With keys `fanwire frame` reaches the transmitter and gets its answer."""
    stack = open_stack
    stack.configure(make_keys(stack))
    stack.start("broker")
    if os.geteuid() == 0:
        os.chown(stack.directory / "keys" / "transmitter.secret", NOBODY, -1)
    stack.start("transmitter")
    mac = "02:00:00:00:00:01"
    ends = ("--destination", mac, "--source", mac)
    code, text = run(stack, "frame", "lo", *ends, "--ethertype", "0x0801", "--payload", "x")
    assert (code, "interfaces" in text) == (77, True), text


@pytest.mark.parametrize(
    ("program", "setting"),
    [
        ("broker", 'listen = ["tcp://0.0.0.0:5800"]\n'),
        ("broker", LISTEN),
        ("broker", 'listen = ["tcp://[::1]:5800"]\n'),
        ("forwarder", CONNECT),
        ("ingest", 'connect = "tcp://bus.example:5800"\n'),
        ("operator", CONNECT),
    ],
)
def test_tcp_takes_keys(stack: Stack, program: str, setting: str) -> None:
    """A start by TCP without keys is refused with 78 and one line that says what makes them, on loopback too."""
    stack.configure(setting)
    running = stack.start(program, *(("watch",) if program == "operator" else ()), ready=False)
    assert running.process.wait(60) == 78
    assert len(running.text.splitlines()) == 1
    assert "is open to every user" in running.text
    assert "`fanwire keys DIRECTORY`" in running.text
    assert not stack.bus.exists()


def _occupy(sock: socket.socket) -> str:
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return f"tcp://127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        (_occupy, "Address already in use; see which process listens"),
        (lambda _: "tcp://192.0.2.1:5800", "another [bus] listen"),
    ],
)
def test_address_that_cannot_be_had_is_one_line(
    stack: Stack, listen: Callable[[socket.socket], str], said: str
) -> None:
    """A broker that can't listen where it is told to ends with 1 and one line that names the address."""
    with closing(socket.socket()) as sock:
        at = listen(sock)
        stack.configure(f'listen = ["{at}"]\n{make_keys(stack)}')
        broker = stack.start("broker", ready=False)
        assert broker.process.wait(60) == 1
    assert len(broker.text.splitlines()) == 1
    assert at in broker.text
    assert said in broker.text


def test_no_broker_over_tcp_is_69(stack: Stack) -> None:
    """A command that finds nothing where `[bus] connect` points says where it looked."""
    stack.configure(CONNECT + make_keys(stack))
    code, text = run(stack, "watch")
    assert (code, len(text.splitlines())) == (69, 1)
    assert "no broker at tcp://127.0.0.1:5800" in text


def test_service_waits_for_a_broker_over_tcp(stack: Stack, tmp_path: Path) -> None:
    """A service that is started before its broker is ready when that comes."""
    keys = make_keys(stack)
    stack.configure(CONNECT + keys)
    ingest = stack.start("ingest", ready=False)
    ingest.wait_for("waiting for the broker")
    stack.bus = tmp_path / "elsewhere"
    stack.configure(LISTEN + keys)
    stack.start("broker")
    wait_until(lambda: ingest.events("ready"), "it has found the broker")

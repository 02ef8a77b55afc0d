"""The registry: what its clients say, what it answers them, and the file that it is kept in."""

import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

import structlog

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.peer import Peer
from services.gateway.protocol.decoder import Decoder
from services.gateway.protocol.requests import Register, RequestError, SignUp
from services.gateway.registry import registry, store
from services.gateway.registry.entry import Origin
from services.gateway.registry.store import Store
from services.operator.__main__ import make_parser
from services.operator.client.lease import Lease
from services.operator.commands import collect
from services.operator.doctor.network_paths import NetworkFacts, check_network_paths
from shared.bus.messages import REGISTRY_TOPIC, RegistrySnapshot, decode, encode
from shared.client import Client, Withheld
from shared.net.addresses import Endpoint
from shared.process import registry_client
from shared.process.lifecycle import OperatorError
from shared.process.registry_client import Access, RegistryClient
from shared.settings.model import Settings
from shared.settings.own_listeners import OwnListeners
from shared.settings.tables import Transmitter
from tests.fuzz.corpus import split_parts
from tests.fuzz.printing import check_line, printed

_destinations: Final = Destinations(["messages"], OwnListeners([("127.0.0.1", 6667)]), lambda _: False, lambda _: False)
_peer: Final = Peer(1, "192.0.2.1", 40_000)
ORDERS: Final = ("withhold siem --reason slow", "release siem")
_commands: Final = [
    make_parser(command.partition(" ")[0]).parse_args(command.split())
    for command in ("clients", "clients --json", "register siem --stream messages", "leave siem", "leave a", *ORDERS)
]
_silent: Final = structlog.wrap_logger(structlog.ReturnLogger(), processors=[])
_access: Final = Access(Endpoint("tcp", "127.0.0.1", 5000))


def json_lines(data: bytes) -> None:
    """A client's bytes, in two reads, make requests or refusals; requests are admitted or refused."""
    decoder, at = Decoder(), data[0] if data else 0
    for read in (b"{" + data[1:at], data[at:]):
        if read:
            decoder.feed(read)
    decoder.end()
    refusals = 0
    while refusals <= len(data):
        try:
            request = decoder.next_request()
            if request is None:
                break
            if isinstance(request, Register):
                _destinations.resolve(request, _peer)
        except RequestError as refused:
            assert refused.error
            assert str(refused)
            refusals += 1


def names(data: bytes) -> None:
    """A first read that is no JSON is one name or one refusal."""
    decoder = Decoder()
    decoder.feed(b"n" + data)
    try:
        request = decoder.next_request()
    except RequestError as refused:
        assert refused.closes
        return
    assert isinstance(request, SignUp)
    assert 1 <= len(request.name.encode()) <= 255
    assert request.name.isprintable() or not request.name.isascii()


def answers(data: bytes) -> None:
    """A gateway's lines, behind a challenge, keep a lease or not and are printed, or each command ends in a line."""
    challenge, said = (*split_parts(data, 2), b"", b"")[:2]
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        far.send(challenge)
        with _ended_in_a_line(said):
            _keep_lease(near)
    with _ended_in_a_line(said), RegistryClient(_access, 1.0) as asked:
        collectors = [entry for entry in asked.ask("list").entries().values() if entry.streams]
        assert list(
            check_network_paths(NetworkFacts(listeners=[("0.0.0.0", 9)]), collectors, Transmitter().destinations)
        )
    for command in _commands:
        with _ended_in_a_line(said, as_json=getattr(command, "json", False)):
            command.run(command, Settings())


@contextmanager
def _ended_in_a_line(said: bytes, *, as_json: bool = False) -> Iterator[None]:
    """Let the gateway say this to whoever connects, and no more; OperatorError is one line."""
    with ExitStack() as closing:

        def connect(_access: Access) -> socket.socket:
            near, far = map(closing.enter_context, socket.socketpair())
            far.sendall(said)
            far.shutdown(socket.SHUT_WR)
            return near

        closing.enter_context(mock.patch.object(registry_client, "_connect", connect))
        try:
            with printed(escaped=not as_json):
                yield
        except OperatorError as error:
            check_line(error)


def _keep_lease(receiver: socket.socket) -> None:
    """Do as `fanwire collect` does in some minutes, in no time: it renews, is told something, and signs up again."""
    lease = Lease(_access, 1.0, "siem", {"streams": ["messages"], "port": 9})
    lease.prove = lambda: collect._await_nonce(receiver)
    try:
        with mock.patch.object(collect, "PROOF_SECONDS", 0.01):
            lease.register()
            for _ in range(3):
                assert lease.seconds_left > 0
                lease._due_at = 0.0
                lease.keep()
                if lease.fileno() >= 0:
                    lease.heed()
    finally:
        lease.leave()
        assert lease.fileno() == -1


def registry_file(data: bytes) -> None:
    """A registry's file, and what SQLite keeps beside it, with bytes of it changed: a registry goes on from it.

    It has entries that others can rely on. What can't be read, a row or the file, is set aside.
    """
    with tempfile.TemporaryDirectory(prefix="fanwire-fuzz-") as directory:
        _go_on(Path(directory, "registry.sqlite"), data)


def _go_on(path: Path, data: bytes) -> None:
    for ending, content in zip(("", "-wal"), _changed(data), strict=True):
        if content:
            path.with_name(path.name + ending).write_bytes(content)
    try:
        with mock.patch.object(store, "log", _silent), Store(path, lambda: 0.0) as kept:
            entries = registry.Registry(lambda: 0.0, kept.generation + 1, kept.keep)
            entries.restore(kept.entries, kept.revision, kept.withheld)
            _check_told(entries)
            joined = entries.grant(_client("new"), _peer, Origin.JSON)
            revision = entries.commit()
        with Store(path, lambda: 0.0) as kept:
            assert joined.client in [entry.client for entry in kept.entries]
            assert kept.revision == revision
            assert len(kept.entries) == len(entries)
    except OperatorError as error:
        assert str(error).endswith("written by a later version of fanwire; upgrade, or name another [gateway] database")


def _check_told(entries: registry.Registry) -> None:
    """Check that the senders of copies accept what is sent to them."""
    told = RegistrySnapshot(entries.commit(), 0, 1, [entry.client for entry in entries.entries()])
    assert decode(encode(REGISTRY_TOPIC, told, sender="gateway.1", boot=1, sequence=0, total=0)).body == told


def _changed(data: bytes) -> tuple[bytes, bytes]:
    """The two files after changes: one byte for whether the second is there, then offset, length and bytes of each.

    Offsets have three bytes, and go on from the first file to the second; length has one, and 0 cuts the file off.
    """
    files = [bytearray(content) for content in _genuine(beside=bool(data[:1] > b"\x7f"))]
    at = 1
    while at + 4 <= len(data):
        offset, size = int.from_bytes(data[at : at + 3]), data[at + 3]
        content = data[at + 4 : at + 4 + size]
        at += 4 + size
        file = files[offset >= len(files[0])]
        offset -= len(files[0]) if file is files[1] else 0
        file[offset : offset + size if size else None] = content
    return bytes(files[0]), bytes(files[1])


@cache
def _genuine(*, beside: bool) -> tuple[bytes, bytes]:
    """A registry's file and what is beside it while it is open; else the file that is left when it is closed."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "registry.sqlite")
        with Store(path, lambda: 0.0) as kept:
            entries = registry.Registry(lambda: 0.0, 1, kept.keep)
            granted = {name: entries.grant(_client(name), _peer, Origin.JSON, ttl=5) for name in ("a", "b", "c")}
            entries.release(granted["b"])
            entries.withhold(granted["c"], Withheld("ops", 1.0, "slow"))
            if beside:
                return path.read_bytes(), path.with_name(f"{path.name}-wal").read_bytes()
        return path.read_bytes(), b""


def _client(name: str) -> Client:
    asked: dict[str, Any] = {"streams": ("messages",), "source": "original", "prefixes": ("10.0.0.0/8",), "sample": 10}
    return Client(name, 0, "192.0.2.1", 9, **asked, group="g", hop_limit=3, dscp=46)

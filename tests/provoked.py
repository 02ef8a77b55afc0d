"""Messages provoked by direct calls: those that no other test names by more than a word or two."""

import errno
import json
import os
import socket
import tempfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
import structlog
import zmq
from structlog.testing import capture_logs

from services.broker.ipc_peers import bind_tcp
from services.forwarder.destination import _why_not_open
from services.gateway.admission.address_proof import AddressProofs
from services.gateway.admission.destinations import Destinations
from services.gateway.admission.ownership import MOST_AT_A_PLACE, check_place
from services.gateway.admission.peer import Peer
from services.gateway.admission.readmission import readmit
from services.gateway.admission.rights import NOBODY, Rights
from services.gateway.admission.tokens import Tokens
from services.gateway.documented_client import sign_up
from services.gateway.handler import Handler
from services.gateway.protocol.client_names import parse_name
from services.gateway.protocol.decoder import MAX_LINE, Decoder, parse_request
from services.gateway.protocol.requests import EXPECTED, Auth, ListClients, Register, RequestError, SignUp
from services.gateway.registry.entry import Origin
from services.gateway.registry.store import Store, _Kept, _parse
from services.gateway.transport.deadlines import too_slow_reader
from services.gateway.transport.listeners import Listener
from services.gateway.transport.tls import check_listener, make_context
from services.ingest import listeners as ingest_listeners
from services.ingest.batch_publisher import new_pools
from services.ingest.listeners import bind_listener
from services.operator.cli.arguments import positive
from services.operator.client.gateway_options import access
from services.operator.commands import collect, keys, token
from services.operator.commands.clients import describe, run_leave
from services.operator.commands.frames import frame, wake
from services.operator.commands.running import ready
from services.operator.doctor.host import BACKLOG_NAME, ListeningSocket, Softnet, check_host
from services.operator.doctor.listening import check_listening
from services.operator.doctor.network_paths import CLOUDS, NetworkFacts, NetworkPath, check_network_paths
from services.operator.doctor.services import RawSocketFacts, check_services, why_not_raw
from services.operator.importing import pmacct, samplicator
from services.operator.importing.command import Lookup
from services.operator.importing.receivers import Line, ParseLine
from services.operator.top.screen import draw
from services.operator.top.state import ScreenState
from services.transmitter.policy import Audit, Policy
from services.transmitter.privileges import adopt
from services.transmitter.raw_frames import MAX_JOBS, RawFrames
from services.transmitter.raw_frames import _explain as explain_frame
from shared.bus.bodies.packing import pack
from shared.bus.curve_keys import load_keys, load_roles
from shared.bus.frame_requests import make_frame, parse_mac, parse_tags
from shared.bus.loans.lender import Room, _lock
from shared.bus.messages import Datagrams, Envelope, TransmitReply, TransmitRequest, borrow_nothing, decode, encode
from shared.bus.zmq_sockets import new_context, prepare_directory
from shared.client import Client
from shared.fanout.sending.next_hops import NextHops
from shared.monitoring.probe import probe, where_lost
from shared.net.addresses import Endpoint, pack_address, parse_endpoint, resolve
from shared.net.netlink import Link
from shared.net.port_holders import explain_bind
from shared.net.queues import Queue
from shared.process.lifecycle import OperatorError, Readiness
from shared.process.memory import Memory
from shared.process.privileges import _prctl
from shared.process.registry_client import (
    Access,
    Answer,
    Entry,
    RefusedError,
    RegistryClient,
    UnreachableError,
)
from shared.settings.entries import Stream, Token
from shared.settings.file import load
from shared.settings.model import Settings
from shared.settings.own_listeners import OwnListeners
from shared.settings.tables import Bus, Gateway, Transmitter
from shared.settings.values import leave_room
from tests.services.gateway.table import ELSEWHERE, HERE, Table
from tests.services.operator.doctor.test_host import FINE as HOST
from tests.services.operator.doctor.test_listening import FINE as LISTENING
from tests.services.operator.doctor.test_listening import SETTINGS
from tests.services.operator.doctor.test_network_paths import AT, collector
from tests.services.operator.doctor.test_services import DENIED, HEARD, ORIGINAL, RELAY
from tests.services.operator.doctor.test_services import FINE as SERVICES
from tests.services.operator.played import PlayedGateway
from tests.shared.monitoring.test_probe import BEFORE, after

Provocation = Callable[[], object]
CURVE_KEY: Final = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
"""The example of ZeroMQ RFC 32."""
TAGGED: Final = bytes(12) + b"\x81\x00\x00\x07\x08\x01"
TLS: Final = Endpoint("tls", "192.0.2.1", 5001)
SIEM: Final = Rights("siem", frozenset({"list"}), ("a",))


def said(provocations: Iterator[Provocation]) -> Iterator[str]:
    """Yield the texts of what provocations return or raise, and of what they log."""
    for provoke in provocations:
        with capture_logs() as logs, redirect_stdout(StringIO()) as out, redirect_stderr(out):
            try:
                texts = list(_texts(provoke()))
            except (RequestError, OperatorError, ValueError, OSError, ArgumentTypeError) as error:
                texts = [str(error)]
        yield from (*texts, out.getvalue(), *(str(line["event"]) for line in logs))


def _texts(result: object) -> Iterator[str]:
    """Yield every text in a result: of a refusal, a finding, a line of an imported file, and of lists of them."""
    if isinstance(result, str):
        yield result
    elif isinstance(result, Exception):
        yield str(result)
    elif isinstance(result, Line):
        yield from (*result.notes, *result.left_out)
    elif isinstance(result, msgspec.Struct):
        yield from _texts(list(msgspec.structs.asdict(result).values()))
    elif isinstance(result, list | tuple | Iterator):
        for each in result:
            yield from _texts(each)


def everything() -> Iterator[Provocation]:
    """Yield every provocation."""
    yield from _protocol()
    yield from _admission()
    yield from _starts()
    yield from _frames()
    yield from _commands()
    yield from _host()
    yield from _paths()
    yield from _services()
    yield from _probe()
    yield from _imports()
    yield from _shared()


def _protocol() -> Iterator[Provocation]:
    ops = {
        "token": "auth",
        "generation": "renew",
        "revision": "watch",
        "epoch": "watch",
        "nonce": "confirm",
        "per_second": "transmit",
    }
    for field in (*EXPECTED, "per_second"):
        request = json.dumps({"op": ops.get(field, "register"), field: [{}]}).encode()
        yield partial(parse_request, request)
    for line in (b"[]", b'{"op":"x"}', b'{"op":"list","op":"list"}', b'{"op":"list","more":1}', b'{"op":"renew"}'):
        yield partial(parse_request, line)
    for name in (b"GET / HTTP/1.1", b"n" * 300, b"\xff", b"a\x01b"):
        yield partial(parse_name, name)

    def too_long() -> object:
        decoder = Decoder()
        decoder.feed(b"{" * (MAX_LINE + 1))
        return decoder.next_request()

    yield too_long
    yield too_slow_reader


def _admission() -> Iterator[Provocation]:
    there = Peer(2, "192.0.2.7", 4001)
    own, network = OwnListeners([("127.0.0.1", 5514)]), "10.0.0.255".__eq__
    destinations = Destinations(["s"], own, lambda _: True, network)
    for asked in (
        Register(name="a", streams=("x",)), Register(name="a", streams=("s",)),
        *(Register(name="a", address=address, port=9) for address in ("224.0.0.1", "10.0.0.255", "fe80::1%e", "name")),
        Register(name="a", prefixes=("10.0.0.1/8",)),
        Register(name="a", streams=("s",), address="127.0.0.1", port=5514),
    ):  # fmt: skip
        yield partial(destinations.resolve, asked, there)

    def refuse_to_send(*_: object) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    sent = AddressProofs(lambda *_: None, lambda: 0.0)
    yield partial(sent.challenge, Register(name="a", port=9), "192.0.2.9", there)
    proofs = AddressProofs(refuse_to_send, lambda: 0.0)
    for port in (None, 9):
        yield partial(proofs.challenge, Register(name="a", port=port), "192.0.2.9", there)
    yield partial(proofs.redeem, "a", "nonce", there)
    yield partial(NOBODY.check, SignUp("a"))
    yield partial(NOBODY.check, ListClients())
    yield partial(SIEM.check, Register(name="a"))
    yield partial(SIEM.check_streams, ["b"])
    yield partial(Handler.authenticate, cast(Handler, None), Auth("token"), replace(there, rights=SIEM))

    registry = Table(max_clients_per_holder=1)
    entry = registry.join("a", ELSEWHERE)
    registry.join("set", HERE, Origin.SETTINGS)
    yield partial(registry.join, "a", HERE)
    yield partial(registry.join, "b", ELSEWHERE)
    yield partial(registry.renew_as, "a", entry.client.generation, replace(HERE, rights=replace(SIEM, holder="other")))
    yield partial(registry.renew_as, "a", 99, ELSEWHERE)
    yield partial(registry.renew_as, "set", 1, HERE)
    yield partial(registry.join, "set", HERE)
    yield from _places(destinations)
    unowned = Table()
    unowned.join("a", HERE)
    yield partial(unowned.join, "a", there)


def _places(destinations: Destinations) -> Iterator[Provocation]:
    table, wanted = Table(), Client("new", 0, "127.0.0.1", 9, streams=("messages",))
    for number in range(MOST_AT_A_PLACE):
        table.collect(f"old{number}")
        yield partial(check_place, table, wanted, HERE, Origin.JSON)
    owned = Table()
    for name, holder in (("gone", "other"), ("kept", "siem")):
        client = Client(name, 0, "192.0.2.7", 9, streams=("messages", "s"))
        owned.grant(client, replace(ELSEWHERE, rights=replace(SIEM, holder=holder)), Origin.JSON)
    siem = Token(name="siem", hash=f"sha256:{'0' * 64}", scopes=("collect",), streams=("s",))
    yield partial(readmit, owned, Tokens([siem]), destinations)


def _starts() -> Iterator[Provocation]:
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        for scheme in ("tcp", "tls"):
            at = Listener(Endpoint(scheme, "0.0.0.0", 5000), everywhere)
            yield partial(check_listener, at, [])
    missing = Gateway(certificate="/missing", key="/missing")
    for gateway in (Gateway(), missing):
        yield partial(make_context, gateway, [])
    for number in (errno.EADDRINUSE, errno.EACCES):
        yield partial(explain_bind, OSError(number, "why"), Endpoint("tcp", "127.0.0.1", 1), "[gateway] listen")
    for endpoint in (Endpoint("udp", "192.0.2.1", 514), Endpoint("unixgram", path="/run/x")):
        for number in (errno.EADDRINUSE, errno.ENODEV, errno.EADDRNOTAVAIL, errno.ENOENT, errno.EACCES):
            yield partial(ingest_listeners._cure, endpoint, OSError(number, "why"))
    yield partial(bind_listener, Stream(name="s", listen=("udp://a..b:9",)), Endpoint("udp", "a..b", 9), [])
    yield partial(Store, Path("/proc/registry"), lambda: 0.0)
    kept = _Kept(Client("a", 1, "192.0.2.1", 1), Origin.JSON, "192.0.2.1", 1, 0.0, False)
    yield partial(_parse, "b", msgspec.json.encode(kept), 0.0)
    with new_context() as context, context.socket(zmq.XPUB) as sock:
        yield partial(bind_tcp, sock, [Endpoint("tcp", "a..b", 9)], "publish")
    yield partial(new_pools, ["s"], 1 << 62, Room(1))
    yield partial(_prctl, 99_999, 0)
    readiness = Readiness("ingest.1", Bus(keys="/keys"), lambda: False)
    readiness._warn_at = 0.0
    yield readiness.check
    for number in (errno.EMFILE, errno.ENETUNREACH, errno.EINVAL):
        yield partial(_why_not_open, number)
    yield partial(adopt, "typed by hand")
    request = TransmitRequest(1, "reply/a/", "eth0", bytes(14))
    for number in (errno.ENODEV, errno.EPROTONOSUPPORT):
        yield partial(explain_frame, OSError(number, "why"), request)


def _frames() -> Iterator[Provocation]:
    replies: list[TransmitReply] = []
    links = {"eth0": Link(1, "eth0", True, bytes(6), 1500, True), "eth1": Link(2, "eth1", True, bytes(6), 1500, False)}
    policy = Policy(Transmitter(interfaces=("eth0", "eth1", "gone"), ethertypes=(0x0801,)), lambda: 0.0)
    hops = cast(NextHops, SimpleNamespace(link=links.get, blind=False))
    frames = RawFrames(
        [], hops, policy, Audit(structlog.get_logger().warning, lambda: 0.0), lambda _, reply: replies.append(reply)
    )

    def answers(*requests: TransmitRequest) -> list[TransmitReply]:
        for request in requests:
            frames.accept_request(request)
        return replies

    good = bytes(12) + b"\x08\x01"
    for interface, frame_bytes in (
        ("lo", good),
        ("gone", good),
        ("eth1", good),
        ("eth0", bytes(14)),
        ("eth0", b""),
        ("eth0", TAGGED),
    ):
        yield partial(answers, TransmitRequest(1, "reply/a/", interface, frame_bytes))
    yield partial(answers, *[TransmitRequest(2, "reply/a/", "eth0", good)] * (MAX_JOBS + 1))
    yield frames.close
    yield partial(answers)


def _commands() -> Iterator[Provocation]:
    yield partial(sign_up, "", [])
    yield partial(sign_up, "me", [Endpoint("tcp", "127.0.0.1", 1)])
    yield partial(positive, "0")
    yield partial(frame._pace, "nan")
    options = Namespace(gateway=Endpoint("tcp", "127.0.0.1", 1), authority=Path("a"), certificate=None, token_file=None)
    yield partial(access, options, Settings())
    yield partial(UnreachableError, TLS, "timed out")
    yield partial(RefusedError, Answer(False))
    yield partial(describe, Entry("a", "192.0.2.1", 1))
    yield partial(describe, Entry("a", "192.0.2.1", 1, streams=("s",), group="g", hop_limit=3))
    yield partial(ready.hints, Settings())
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "ingest.secret")
        there.touch()
        yield partial(keys.run, Namespace(directory=there.parent, roles=["ingest"]), Settings())
        yield partial(keys.run, Namespace(directory=there / "below", roles=["ingest"]), Settings())
        yield partial(token._write, there, "token")
        yield partial(collect._open_file, Namespace(write=there.parent, count=None), ExitStack())
        yield partial(keys.run, Namespace(directory=there.parent, roles=["broker"]), Settings())
    yield partial(draw, ScreenState(helping=True), None, 80, 40)
    drawn = Namespace(name="a", scopes=["list"], streams=None, destinations=None, write=None)
    yield partial(token.run, drawn, Settings())
    yield partial(wake.own_mac, "gone0")
    yield partial(collect._open_receiver, None, 9, ("192.0.2.250", 1))
    with PlayedGateway() as gateway:
        at = parse_endpoint(gateway.endpoint, ("tcp",))
        with RegistryClient(Access(at), 5.0) as client:
            yield partial(client.ask, "list", name="\udc80")
        leaving = Namespace(name="me", generation=None, gateway=at, token_file=None, authority=None, certificate=None)
        yield partial(run_leave, leaving, Settings())


def _host() -> Iterator[Provocation]:
    small, dropping = [ListeningSocket(4096, 0)], [ListeningSocket(1 << 30, 7)]
    cases: list[dict[str, Any]] = [
        {}, {"listeners": {"messages": small}}, {"listeners": {"messages": dropping}}, {"listeners": {}},
        {"listeners": {}, "sysctls": {**HOST.sysctls, "net.core.rmem_max": 1, "net.core.wmem_max": 1, BACKLOG_NAME: 1}},
        {"sysctls": {}}, {"softnet": Softnet(10, 3, 9)}, {"synchronised": False}, {"synchronised": None}, {"time": 0.0},
        {"counters": {"UdpRcvbufErrors": 1, "UdpInCsumErrors": 2, "IPReversePathFilter": 3}}, {"counters": {}},
        {"reverse_path": {"eth0": 1, "eth1": 1}}, {"sysctls": {**HOST.sysctls, "net.netfilter.nf_conntrack_count": 99}},
    ]  # fmt: skip
    for changes in cases:
        facts = replace(HOST, **changes)
        yield partial(check_host, facts, Settings())
    for account in ({}, {"receive_errno": errno.ENOSYS, "receive_errors": 600}, {"receive_errors": 2}):
        workers = {"ingest.1": {"listener/s/udp://192.0.2.1:6667": account}}
        for seen in (LISTENING, replace(LISTENING, groups={"udp://239.1.1.1%eth0:5514": False})):
            found = replace(seen, unassigned={"udp://192.0.2.1:6667": "192.0.2.1"})
            for each in (seen, found):
                yield partial(check_listening, each, workers, SETTINGS)
    closed = {path: replace(seen, closed_at="/run") for path, seen in LISTENING.paths.items()}
    yield partial(check_listening, replace(LISTENING, paths=closed), {"ingest.1": {}}, SETTINGS)


def _paths() -> Iterator[Provocation]:
    fine, original = NetworkPath(False, "eth0"), collector("flows", source="original")
    for path in (
        fine, None, replace(fine, up=False), replace(fine, next_hop=AT, neighbour=0x20), NetworkPath(True, "lo"),
        replace(fine, mtu=1400, link_mtu=1400), replace(fine, mtu=1400),
        replace(fine, queues=[Queue(1, "tbf", 7, False)]), replace(fine, queues=[Queue(1, "tbf", 0, False)]),
    ):  # fmt: skip
        for vendor in ("", *CLOUDS):
            facts = NetworkFacts({AT: path}, listeners=[(AT, 9514)], vendor=vendor)
            yield partial(check_network_paths, facts, [collector(), original], [])
            yield partial(check_network_paths, facts, [collector()], ["0.0.0.0/0"])
    yield partial(check_network_paths, NetworkFacts({AT: fine}), [collector(), collector("again")], [])
    yield partial(check_network_paths, NetworkFacts({AT: fine}), [collector(), original], ["0.0.0.0/0"])
    yield partial(check_network_paths, NetworkFacts({AT: fine}), [], [])
    six = "2001:db8::9"
    yield partial(check_network_paths, NetworkFacts({six: fine}), [collector(address=six)], [])
    for told in (after(expected=1, offered=1, filtered=1), after(expected=1, offered=1, sent=1)):
        yield partial(where_lost, BEFORE, told, "s", "doctor")


def _services() -> Iterator[Provocation]:
    restored = {**HEARD, "broker.1": {"broker": {"files_restored": 1}}}
    dropped = {**HEARD, "forwarder.1": {"collector/siem": {"dropped_refused": 2}}}
    waiting = msgspec.structs.replace(ORIGINAL, health="waiting")
    cases: list[dict[str, Any]] = [
        {}, {"removed": ["/x"]}, {"broker": False}, {"broker": False, "gateway": "why"}, {"accounts": {}},
        {"bus": "why"},
        {"accounts": restored},
        {"accounts": {**HEARD, "forwarder.2": {}}}, {"accounts": dropped}, {"descriptors": {"": 1}}, {"broker": None},
        {"accounts": {}, "raw": DENIED}, {"cleaned": True}, {"accounts": {**HEARD, "transmitter.1": {}}, "raw": DENIED},
    ]  # fmt: skip
    for changes in cases:
        facts = replace(SERVICES, **changes)
        for collectors in ([RELAY], [waiting], [ORIGINAL]):
            yield partial(check_services, facts, Settings(), collectors)
    for raw in (
        RawSocketFacts(errno.EACCES), RawSocketFacts(errno.EAFNOSUPPORT), RawSocketFacts(errno.EPERM, in_bounds=False),
        DENIED, RawSocketFacts(errno.EPERM, no_new_privileges=True), RawSocketFacts(unfit="why"),
    ):  # fmt: skip
        yield partial(why_not_raw, raw)


def _probe() -> Iterator[Provocation]:
    def refuse() -> RegistryClient:
        raise UnreachableError(TLS, "timed out")

    for listen in ("udp://192.0.2.9:7000", "tcp://127.0.0.1:7000", "udp://127.0.0.1:7000"):
        yield partial(probe, refuse, Stream(name="s", listen=(listen,)), "relay", dict)


def _imports() -> Iterator[Provocation]:
    def parsed(parse_line: ParseLine, text: str) -> Line:
        line = Line(1)
        parse_line(text, line, Lookup())
        return line

    for text in (
        "id=1 ip=192.0.2.1:9 src_port=7", "id=1 other=2 ip=192.0.2.1:9", "id=1 tag=5 ip=192.0.2.1:9", "id=1 id=1",
        "id=1 balance-alg=none ip=192.0.2.1:9,192.0.2.2:9",
    ):  # fmt: skip
        yield partial(parsed, pmacct.parse_line, text)
    for text in ("192.0.2.0/255.0.255.0: 192.0.2.1/9", "192.0.2.1/24: 192.0.2.1/9", "0.0.0.0: [192.0.2.1]9", ": 1/9"):
        yield partial(parsed, samplicator.parse_line, text)


def _shared() -> Iterator[Provocation]:
    for text in ("unix://x", "udp://::1:9", "udp://fe80::1:9", "udp://[fe80::1]:9", "tcp://239.1.1.1:9"):
        yield partial(parse_endpoint, text, ("udp", "tcp", "unix"))
    yield partial(pack_address, "fe80::1%eth0")
    yield partial(resolve, "a..b", 9, socket.SOCK_DGRAM)
    yield partial(parse_mac, "01")
    yield partial(parse_mac, "x")
    yield partial(parse_tags, bytes(12) + b"\x81\x00\x00")
    yield partial(make_frame, bytes(6), bytes(6), 1, b"", b"1", own_fcs=True)
    yield partial(leave_room, "[forwarder] held_memory", 9, 10)
    unknown_stream = Token(name="a", hash=f"sha256:{'0' * 64}", scopes=("list",), streams=("x",))
    yield partial(Settings().check_tokens, [unknown_stream])
    yield partial(load, None, {"FANWIRE_BUS__DIRECTORY": f"/{'x' * 200}"})
    yield partial(prepare_directory, Path("/proc/fanwire"))
    yield partial(borrow_nothing, Envelope(1, "datagrams", "ingest.1", 1, 0, 0), Datagrams("s", 1), 0)
    good = encode("datagrams/s/", Datagrams("s", 1), sender="ingest.1", boot=1, sequence=0, total=0)
    later = pack(Envelope(9, "status", "ingest.1", 1, 0, 0))
    for parts in (good[:1] * 3, [bytes(9999), b"", b""], [b"t/", later, b""], [b"other/", *good[1:], b"", b""]):
        yield partial(decode, parts)
    with tempfile.TemporaryDirectory() as folder:
        keys_of = Path(folder)
        (keys_of / "stranger.public").write_text("x")
        yield partial(load_keys, keys_of, "ingest")
        (keys_of / "ingest.secret").write_text("x")
        yield partial(load_keys, keys_of, "ingest")
        (keys_of / "ingest.secret").write_text(CURVE_KEY)
        (keys_of / "ingest.secret").chmod(0o644)
        yield partial(load_keys, keys_of, "ingest")
        (keys_of / "stranger.public").write_text(CURVE_KEY)
        yield partial(load_roles, keys_of)
        (keys_of / "settings.toml").write_text("=")
        yield partial(load, keys_of / "settings.toml", {})
        held = _lock(keys_of / "pool.1")
        yield partial(_lock, keys_of / "pool.1")
        os.close(held)
    yield partial(load, None, {"FANWIRE_BUS__NOTHING": "1"})
    yield Memory(1, "[ingest] memory").measure

"""Clients from elsewhere: by TLS, with a token or a certificate; a listener on every address stands for elsewhere."""

import contextlib
import hashlib
import json
import resource
import signal
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest

from services.gateway.handler import MAX_WRONG_TOKENS
from tests.certificates import Authority
from tests.services.gateway.talk import Talk
from tests.services.gateway.test_server import counters
from tests.stack import Running, Stack, ask, ask_json, wait_until

PORT = 5001
SCOPES = ("list", "collect", "transmit", "admin")


def entry(name: str, *scopes: str, by: str = "", **fields: list[str]) -> str:
    """A [[token]] of the settings: for the token `secret NAME`, or for a certificate."""
    known = (
        f'certificate = "{by}"' if by else f'hash = "sha256:{hashlib.sha256(b"secret " + name.encode()).hexdigest()}"'
    )
    more = "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())
    return f'[[token]]\nname = "{name}"\n{known}\nscopes = {json.dumps(scopes)}\n{more}'


class Site:
    """A gateway that listens on loopback, and by TLS on every address."""

    def __init__(self, stack: Stack, hosts: str = "DNS:localhost,IP:127.0.0.1") -> None:
        self.stack = stack
        self.authority = Authority(stack.directory)
        self.certificate, self.key = self.authority.sign("gateway", hosts=hosts)
        stack.start("broker")

    def start(self, *entries: str, **gateway: object) -> Running:
        """Start it with these tokens and settings."""
        settings = {
            "listen": ["tcp://127.0.0.1:5000", f"tls://[::]:{PORT}"],
            "certificate": str(self.certificate),
            "key": str(self.key),
            **gateway,
        }
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        self.stack.configure(f"[gateway]\n{lines}{''.join(entries)}")
        return self.stack.start("gateway")

    def connect(self, shown: tuple[Path, Path] | None = None) -> Talk:
        """Connect by TLS, showing a certificate if there is one."""
        context = ssl.create_default_context(cafile=self.authority.certificate)
        if shown:
            context.load_cert_chain(*shown)
        return Talk(context.wrap_socket(raw_connection(), server_hostname="localhost"))

    def connect_as(self, name: str) -> Talk:
        """Connect, and present the token of that name."""
        talk = self.connect()
        answer = talk.ask("auth", token=f"secret {name}")
        assert (answer["ok"], answer["holder"]) == (True, name)
        return talk


def raw_connection() -> socket.socket:
    """A TCP connection to the TLS port, which does not wait for acknowledgements."""
    connection = socket.create_connection(("127.0.0.1", PORT), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@pytest.fixture
def site(stack: Stack) -> Site:
    """A place with certificates and a broker."""
    return Site(stack)


def test_who_has_no_token_may_do_nothing(site: Site) -> None:
    """By TLS without a token every request is refused by name, a name too; on loopback nothing is needed."""
    site.start(entry("siem", "list"))
    with site.connect() as talk:
        for request in (
            {"op": "list"},
            {"op": "watch"},
            {"op": "streams"},
            {"op": "register", "name": "c"},
            {"op": "renew", "name": "c", "generation": 1},
            {"op": "leave", "name": "c", "generation": 1},
            {"op": "confirm", "name": "c", "nonce": "n"},
            {"op": "transmit", "interface": "lo", "frame": "00" * 14},
        ):
            answer = talk.ask(**request)
            assert (answer["error"], "token" in answer["message"]) == ("not_permitted", True), request
    with site.connect() as talk:
        talk.connection.sendall(b"name")
        assert json.loads(talk.rest())["error"] == "not_permitted"
    assert ask_json({"op": "list"})["clients"] == {}


@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_allows_its_own(site: Site, scope: str) -> None:
    """A request beyond a token's scopes is refused, and the sentence names what is lacking."""
    site.start(*(entry(each, each) for each in SCOPES))
    requests: dict[str, dict[str, Any]] = {
        "list": {"op": "list"},
        "collect": {"op": "register", "name": "c"},
        "transmit": {"op": "transmit", "interface": "lo", "frame": "00" * 14},
    }
    with site.connect_as(scope) as talk:
        for takes, request in requests.items():
            answer = talk.ask(**request)
            if scope in (takes, "admin"):
                # [gateway] allow_transmit forbids it to everybody, which is another sentence.
                assert answer["ok"] or "allow_transmit" in answer["message"], answer
            else:
                assert (answer["error"], takes in answer["message"]) == ("not_permitted", True)


def test_wrong_tokens_are_answered_alike_and_few(site: Site) -> None:
    """Each wrong token gets the same words; after a few the connection is closed; a right one is taken once."""
    site.start(entry("siem", "list"), entry("other", "list"))
    with site.connect() as talk:
        answers = [talk.ask("auth", token=wrong) for wrong in ("", "secret", "é" * 5000)]
        assert len(answers) == MAX_WRONG_TOKENS
        assert answers[0]["error"] == "not_permitted"
        assert answers[1:] == answers[:1] * 2
        assert talk.rest() == b""
    with site.connect_as("siem") as talk:
        again = talk.ask("auth", token="secret other")
        assert (again["error"], "'siem' already" in again["message"]) == ("not_permitted", True)
        assert talk.ask("list")["ok"]
    assert counters(site.stack)["wrong_tokens"] == MAX_WRONG_TOKENS


def test_a_token_counts_on_loopback_too(site: Site) -> None:
    """A client that presents a token on loopback acts as its holder from then on, with its rights alone."""
    site.start(entry("siem", "collect"))
    lines = [{"op": "auth", "token": "secret siem"}, {"op": "register", "name": "c"}, {"op": "list"}]
    answers = ask(b"".join(json.dumps(line).encode() + b"\n" for line in lines)).splitlines()
    assert [json.loads(answer)["ok"] for answer in answers] == [True, True, False]


def test_entries_belong_to_their_holder(site: Site) -> None:
    """Only its holder and admins renew, take over or take away an entry, whichever connection; also after a restart."""
    gateway = site.start(entry("siem", "collect"), entry("other", "collect"), entry("boss", "admin"))
    with site.connect_as("siem") as talk:
        made = talk.ask("register", name="c", ttl=600)["client"]["generation"]
    for _ in range(2):
        with site.connect_as("other") as talk:
            for op in ("renew", "leave"):
                assert talk.ask(op, name="c", generation=made)["error"] == "not_permitted"
            refused = talk.ask("register", name="c", take_over=True)
            assert (refused["error"], "'siem'" in refused["message"]) == ("name_taken", True)
        with site.connect_as("siem") as talk:
            assert talk.ask("renew", name="c", generation=made)["ok"]
        gateway.stop(signal.SIGKILL)
        gateway = site.stack.start("gateway")
    with site.connect_as("siem") as first, site.connect_as("siem") as second, site.connect_as("boss") as boss:
        held = first.ask("register", name="c", take_over=True, hold=True)["client"]["generation"]
        assert second.ask("register", name="c", take_over=True)["client"]["generation"] > held
        told = first.read()
        assert (told["event"], "by 'siem'" in told["message"]) == ("taken_over", True)
        last = boss.ask("register", name="c", take_over=True)["client"]["generation"]
        assert boss.ask("leave", name="c", generation=last)["ok"]


def test_streams_and_destinations_of_a_token(site: Site) -> None:
    """A holder signs up for its streams only, and for copies without proof where its token or the settings say so."""
    streams = '[[stream]]\nname = "netflow"\nlisten = ["udp://127.0.0.1:2055"]\n'
    bound = entry("bound", "collect", streams=["netflow"], destinations=["192.0.2.0/24"])
    site.start(bound, entry("free", "collect"), streams, destinations=["198.51.100.0/24"])
    wish = {"name": "c", "streams": ["netflow"], "port": 9000}
    with site.connect_as("bound") as talk:
        refused = talk.ask("register", **wish | {"streams": ["*"]})
        assert (refused["error"], "only: netflow" in refused["message"]) == ("not_permitted", True)
        assert talk.ask("register", **wish, address="192.0.2.9")["client"]["address"] == "192.0.2.9"
        assert talk.ask("register", **wish, address="198.51.100.9")["ok"]
        assert talk.ask("register", **wish, address="203.0.113.9")["error"] == "unproven_address"
        generation = talk.ask("register", **wish)["client"]["generation"]
        assert talk.ask("leave", name="c", generation=generation)["ok"]
    with site.connect_as("free") as talk:
        assert talk.ask("register", **wish, address="192.0.2.9")["error"] == "unproven_address"
        # The listener serves both families, and an IPv4 client shows as one.
        assert talk.ask("register", **wish | {"streams": ["*"]})["client"]["address"] == "127.0.0.1"


def test_client_certificates(site: Site) -> None:
    """A certificate of our authority is its holder; an expired one, one of others or none is not let in."""
    gateway = site.start(
        entry("siem", "list", "collect", by="siem.example"), client_authorities=str(site.authority.certificate)
    )
    stranger = Authority(site.stack.directory, "stranger")
    with site.connect(site.authority.sign("siem.example")) as talk:
        assert talk.ask("list")["ok"]
        talk.ask("register", name="c")
    with site.connect(site.authority.sign("unknown.example")) as talk:
        assert talk.ask("list")["error"] == "not_permitted"
    for shown in (site.authority.sign("expired", days=-1), stranger.sign("siem.example"), None):
        with pytest.raises(OSError), site.connect(shown) as talk:  # noqa: PT011, PT012
            talk.connection.sendall(b'{"op":"list"}\n')
            assert not talk.connection.recv(1)
            raise ConnectionResetError
    wait_until(lambda: counters(site.stack).get("handshakes_failed") == 3, "three handshakes failed")
    failed = gateway.events("a TLS handshake failed")[0]
    assert ("certificate" in failed["reason"], failed["origin"]) == (True, "127.0.0.1")


def test_certificate_or_token(site: Site) -> None:
    """A client may come without a certificate where there are tokens too; names take one, and leave."""
    authorities = str(site.authority.certificate)
    tokens = (entry("router", "list", "collect", by="router 7"), entry("viewer", "list"))
    shown = site.authority.sign("router 7")
    for allowed in (False, True):
        gateway = site.start(*tokens, client_authorities=authorities, names_beyond_loopback=allowed)
        with site.connect_as("viewer") as talk:
            assert talk.ask("list")["ok"]
        with site.connect(shown) as talk:
            talk.connection.sendall(b"router-7")
            answer = json.loads(talk.rest())
            assert ("router-7" in answer) is allowed
            assert allowed or answer["error"] == "not_permitted"
        with site.connect() as talk:
            talk.connection.sendall(b"nobody")
            assert json.loads(talk.rest())["error"] == "not_permitted"
        gateway.stop()


def test_renewed_certificate(site: Site) -> None:
    """A reload shows the files' present content at the next handshake; files that do not fit leave the former one."""
    gateway = site.start(entry("siem", "list"))
    with site.connect_as("siem") as talk:
        renewed = site.authority.sign("gateway")[0].read_text()
        assert gateway.reload()["event"] == "reloaded"
        assert ssl.get_server_certificate(("127.0.0.1", PORT)) == renewed
        assert talk.ask("list")["ok"]  # by the former one
    site.authority.sign("other")[1].replace(site.key)
    assert "not reloaded, the old settings stay: [gateway] certificate and key" in gateway.reload()["event"]
    assert ssl.get_server_certificate(("127.0.0.1", PORT)) == renewed


def test_another_protocol_on_the_port(site: Site) -> None:
    """Plain bytes, a close, and silence end the handshake, cost nobody else anything, and are counted."""
    gateway = site.start(entry("siem", "list"), request_seconds=0.5)
    for said in (b'{"op":"list"}\n', b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(70_000)):
        with raw_connection() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(said)
            assert not connection.recv(100).startswith(b"{")
    raw_connection().close()
    silent = [raw_connection() for _ in range(5)]
    with site.connect_as("siem") as talk:
        assert talk.ask("list")["ok"]
    for connection in silent:
        with connection, contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
    wait_until(lambda: counters(site.stack).get("handshakes_failed") == 9, "all are counted")
    assert "Traceback" not in gateway.text
    assert len(gateway.events("a TLS handshake failed")) < 9


def test_handshakes_count_as_connections(site: Site) -> None:
    """A silent connection takes up room for a while; beyond the limit connections are closed at once."""
    site.start(entry("siem", "list"), request_seconds=1, max_connections=1)
    waiting = [raw_connection() for _ in range(60)]
    wait_until(lambda: counters(site.stack).get("connections_refused", 0) >= 60 - 33, "those over it are closed")
    wait_until(lambda: counters(site.stack).get("handshakes_failed", 0) >= 33, "the others are, later")
    for connection in waiting:
        connection.close()
    with site.connect_as("siem") as talk:
        assert talk.ask("list")["ok"]


def test_one_silent_address_locks_nobody_out(site: Site) -> None:
    """Silent connections of one address, before their handshake too, keep no other client from being served."""
    site.start(entry("siem", "list"), request_seconds=60, max_connections=60, max_connections_per_address=20)
    silent = [socket.create_connection(("127.0.0.1", PORT), 30, ("127.0.0.2", 0)) for _ in range(260)]
    wait_until(
        lambda: counters(site.stack).get("connections_refused", 0) >= 260 - 24, "those over its share are closed"
    )
    for _ in range(6):
        with site.connect_as("siem") as talk:
            assert talk.ask("list")["ok"]
        assert ask_json({"op": "list"})["ok"]
    for connection in silent:
        connection.close()


def test_descriptors_run_out_and_come_back(site: Site) -> None:
    """Without a descriptor to be had who is connected by TLS is served, another waits, nothing spins, it recovers."""
    gateway = site.start(entry("siem", "list"))
    with site.connect_as("siem") as talk:
        limits = resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (1, limits[1]))
        with raw_connection():
            gateway.wait_for("TLS connections can't be accepted for now")
            begin, worked = time.monotonic(), gateway.cpu_seconds()
            for _ in range(20):
                assert talk.ask("list")["ok"]
                time.sleep(0.1)
            assert gateway.cpu_seconds() - worked < (time.monotonic() - begin) / 10
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, limits)
    with site.connect_as("siem") as talk:
        assert talk.ask("list")["ok"]
    assert "Traceback" not in gateway.text


def test_line_of_ten_megabytes(site: Site) -> None:
    """By TLS too the client can read that its line is too long, although it is still sending, and memory stays flat."""
    gateway = site.start(entry("siem", "list"))
    with site.connect_as("siem") as talk:
        talk.ask("list")
    before = gateway.resident_mb()
    for _ in range(3):
        with site.connect_as("siem") as talk:
            talk.connection.sendall(b'{"op":"list"' + b" " * 10_000_000)
            assert json.loads(talk.rest())["error"] == "too_long"
    assert gateway.resident_mb() - before < 10


def test_connections_cost_little_memory(site: Site) -> None:
    """A TLS connection that does nothing costs well under the 256 KiB that asyncio would take for each."""
    gateway = site.start(entry("siem", "list"))
    with site.connect_as("siem") as talk:
        talk.ask("list")
    before = gateway.resident_mb()
    talks = [site.connect_as("siem") for _ in range(200)]
    assert gateway.resident_mb() - before < 20
    for talk in talks:
        with talk:
            pass


def test_watch(site: Site) -> None:
    """Events come by TLS as they happen, however long the list before them is."""
    site.start(entry("siem", "list"))
    ask(b"".join(b'{"op":"register","name":"n%d"}\n' % number for number in range(5000)), seconds=60)
    with site.connect_as("siem") as talk:
        assert len(talk.ask("watch")["clients"]) == 5000
        assert ask_json({"op": "register", "name": "last"})["ok"]
        event = talk.read()
        assert (event["event"], event["client"]["name"]) == ("joined", "last")


def test_client_that_does_not_read(site: Site) -> None:
    """By TLS too it is dropped when it takes nothing for the time allowed, and memory stays flat."""
    gateway = site.start(entry("siem", "list"), request_seconds=0.5)
    ask(b"".join(b'{"op":"register","name":"n%d"}\n' % number for number in range(5000)), seconds=60)
    stalled = [site.connect_as("siem") for _ in range(20)]
    before = gateway.resident_mb()
    for talk in stalled:
        talk.connection.sendall(b'{"op":"list"}\n' * 1000)
    wait_until(lambda: counters(site.stack).get("too_slow") == 20, "stalled clients are dropped")
    assert gateway.resident_mb() - before < 30
    for talk in stalled:
        with talk:
            pass


@pytest.mark.parametrize("politely", [True, False])
def test_client_that_closes_its_side(site: Site, politely: bool) -> None:
    """It has ended the conversation: what it held goes, what it still asked may have no answer, nothing is wrong."""
    gateway = site.start(entry("siem", "list", "collect"))
    for number in range(20):
        with site.connect_as("siem") as talk:
            talk.ask("register", name=f"c{number}", hold=True)
            talk.connection.sendall(b'{"op":"list"}\n' * 50)
            with contextlib.suppress(OSError):  # the other side's bytes may come before its goodbye
                if politely:
                    assert isinstance(talk.connection, ssl.SSLSocket)
                    talk.connection.unwrap()
                else:
                    talk.connection.shutdown(socket.SHUT_WR)
    wait_until(lambda: ask_json({"op": "list"})["clients"] == {}, "held entries leave")
    wait_until(lambda: counters(site.stack)["connections"] == 0, "connections are closed")
    assert gateway.stop() == 0
    assert [line for line in gateway.log if line["level"] != "info"] == []
    assert "Traceback" not in gateway.text


def test_who_says_not_who_it_is_has_little_time(site: Site) -> None:
    """Without a token a connection is closed after `request_seconds`, whatever it says; with one it may be idle."""
    site.start(entry("siem", "list"), request_seconds=1)
    with site.connect_as("siem") as known, site.connect() as silent, site.connect() as busy:
        answers: list[dict[str, Any]] = []
        while not answers or answers[-1]["error"] == "not_permitted":
            answers.append(busy.ask("list"))
            time.sleep(0.1)
        assert (answers[-1]["error"], "auth" in answers[-1]["message"]) == ("too_slow", True)
        assert json.loads(silent.rest())["error"] == "too_slow"
        assert known.ask("list")["ok"]


def test_signal_ends_it(site: Site) -> None:
    """SIGTERM ends it with 0 whatever its TLS connections do."""
    gateway = site.start(entry("siem", "list"))
    with raw_connection(), site.connect_as("siem") as idle, site.connect_as("siem") as busy:
        busy.connection.sendall(b'{"op":"list"}\n' * 10_000)
        idle.connection.sendall(b'{"op":')
        assert gateway.stop() == 0
    assert "Traceback" not in gateway.text

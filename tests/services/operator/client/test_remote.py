"""Operator commands with a gateway that is not on this host."""

import hashlib
import signal
import tomllib
from pathlib import Path

import msgspec
import pytest

from services.operator.commands.token import TOKEN_BYTES
from shared.settings.entries import Token
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.services.gateway.transport.test_tls import Site, entry
from tests.services.operator.played import run
from tests.stack import Stack, ask_json
from tests.system.test_source_preserving import Exporters


def test_token_and_its_entry(stack: Stack) -> None:
    """`token` prints a token and the lines for the settings, which hold its hash; each is another, of 256 bits."""
    wishes = ("--scope", "collect", "--scope", "list", "--stream", "messages", "--destination", "10.0.0.0/8")
    tokens = set()
    for _ in range(2):
        command = stack.operator("token", "siem", *wishes)
        assert command.process.wait(60) == 0
        said, table, lines = command.text.partition("[[token]]")
        secret = said.splitlines()[1]
        (found,) = tomllib.loads(table + lines)["token"]
        assert msgspec.convert(found, Token) == Token(
            name="siem",
            hash=f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}",
            scopes=("collect", "list"),
            streams=("messages",),
            destinations=("10.0.0.0/8",),
        )
        assert len(secret) * 6 // 8 == TOKEN_BYTES
        tokens.add(secret)
    assert len(tokens) == 2


def test_token_in_a_file(stack: Stack, tmp_path: Path) -> None:
    """With `--write` the token goes to a new file of its owner alone, and only the rest is printed."""
    file = tmp_path / "siem.token"
    code, text = run(stack, "token", "siem", "--scope", "list", "--write", str(file))
    assert (code, text.startswith("[[token]]\n"), file.stat().st_mode & 0o777) == (0, True, 0o600)
    assert hashlib.sha256(file.read_text().strip().encode()).hexdigest() in text
    code, text = run(stack, "token", "siem", "--scope", "list", "--write", str(file))
    assert (code, "File exists" in text) == (73, True)
    code, text = run(stack, "token", "siem", "--scope", "list", "--stream", "nothing")
    assert (code, "there is no stream 'nothing'" in text) == (64, True)


def test_commands_by_tls(stack: Stack) -> None:
    """With `--gateway tls://` a token or a certificate is shown; what is refused, either way, ends with 77."""
    site = Site(stack)
    authority = str(site.authority.certificate)
    shown, key = site.authority.sign("boss.example")
    site.start(entry("viewer", "list"), entry("boss", "admin", by="boss.example"), client_authorities=authority)
    token = stack.directory / "token"
    token.write_text("secret viewer\n")
    where = ("--gateway", "tls://localhost:5001")
    trusting = (*where, "--authority", authority)
    with_token, by_certificate = ("--token-file", str(token)), ("--certificate", str(shown), "--key", str(key))
    assert run(stack, "register", "c", *trusting, *by_certificate)[0] == 0
    code, text = run(stack, "clients", *trusting, *with_token)
    assert (code, "c" in text) == (0, True)
    for arguments, expected, words in (
        (("leave", "c", *trusting, *with_token), 77, "needs scope collect"),
        (("clients", *trusting), 77, "--token-file"),
        (("clients", *where, *with_token), 77, "name who signed its certificate by --authority"),
        (
            ("clients", "--gateway", "tls://127.0.0.2:5001", "--authority", authority),
            77,
            "name the gateway as its certificate does",
        ),
        (("clients", "--gateway", "tcp://localhost:5001", *with_token), 69, "no gateway at tcp://localhost:5001"),
        (("clients", "--gateway", "tcp://localhost:5000", "--authority", authority), 64, "tls://"),
        (("clients", *trusting, "--token-file", "/none"), 64, "/none: No such file"),
        (("clients", *where, "--authority", str(token)), 64, "expected PEM"),
    ):
        code, text = run(stack, *arguments)
        assert (code, words in text) == (expected, True), text
        assert len(text.splitlines()) == 1
    token.write_text("wrong")
    code, text = run(stack, "clients", *trusting, *with_token)
    assert (code, "unknown token" in text) == (77, True)
    assert run(stack, "leave", "c")[0] == 0  # on this host it is the nearest gateway, and needs nothing


@pytest.mark.parametrize("elsewhere", [False, True])
def test_collector_on_another_host(open_stack: OpenStack, elsewhere: bool) -> None:
    """With a token a host signs itself up by TLS and gets copies; at another address where its token says so."""
    with (
        Host() as relay,
        Host() as siem,
        veth(End(relay, "eth", "10.2.0.1/24"), End(siem, "eth", "10.2.0.2/24")),
    ):
        siem.run("ip", "address", "add", "10.2.0.3/24", "dev", "eth")
        directory = open_stack.directory
        with relay.entered():
            site = Site(open_stack, hosts="IP:10.2.0.1")
            site.start(
                entry("siem", "collect", destinations=["10.2.0.3/32"]),
                '[[stream]]\nname = "messages"\nlisten = ["udp://10.2.0.1:6667"]\n',
                serve_seconds=10,
            )
            open_stack.start("forwarder")
            open_stack.start("ingest")
        (directory / "token").write_text("secret siem")
        arguments = ("--gateway", "tls://10.2.0.1:5001", "--authority", site.authority.certificate)
        more = ("--address", "10.2.0.3") if elsewhere else ()
        with siem.entered():
            command = open_stack.operator(
                "collect",
                "c",
                "--stream",
                "messages",
                *map(str, arguments),
                "--token-file",
                str(directory / "token"),
                *more,
            )
        at = "10.2.0.3" if elsewhere else "10.2.0.2"
        command.wait_for(f"collecting messages at {at}")
        with relay.entered(), Exporters(relay, [("10.2.0.1", 4000)], "10.2.0.1") as exporters:
            exporters.send(("10.2.0.1", 4000), b"a copy")
            command.wait_for("b'a copy'")
            assert command.stop(signal.SIGTERM) == 0
            assert ask_json({"op": "list"})["clients"] == {}

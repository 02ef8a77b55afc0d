import os
import pty
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.client import CHALLENGE_PREFIX
from tests.services.operator.played import PlayedGateway, Request, finish, run
from tests.stack import Running, Stack, wait_until

RUN_OPERATOR = 'runpy.run_module("services.operator", run_name="__main__", alter_sys=True)'


def collect(stack: Stack, gateway: PlayedGateway, *arguments: str) -> Running:
    """Start `collect` and wait until it has signed up."""
    command = stack.operator("collect", "siem", "--stream", "messages", "--gateway", gateway.endpoint, *arguments)
    command.wait_for("collecting messages")
    return command


def send(request: dict[str, Any], *payloads: bytes) -> int:
    """Send datagrams to where `request` asked for them; return the port they come from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for payload in payloads:
            sender.sendto(payload, ("127.0.0.1", request["port"]))
        return int(sender.getsockname()[1])


def test_prints_what_arrives_and_leaves(stack: Stack) -> None:
    """It signs up for as long as it runs at a port of its own, prints what comes there, and leaves at SIGTERM."""
    with PlayedGateway() as gateway:
        command = collect(stack, gateway, "--from", "10.0.0.0/8")
        (request,) = gateway.requests
        assert request.items() >= {"hold": True, "ttl": 30.0, "from": ["10.0.0.0/8"], "streams": ["messages"]}.items()
        port = send(request, b"Hello", b"")
        command.wait_for(f"Got message from ('127.0.0.1', {port}): b'Hello'\n")
        command.wait_for(f"Got message from ('127.0.0.1', {port}): b''\n")
        assert command.stop(signal.SIGTERM) == 0
        assert gateway.said("leave") == [{"op": "leave", "name": "siem", "generation": 1}]


def test_writes_payloads_and_ends_at_the_count(stack: Stack, tmp_path: Path) -> None:
    """`--write` appends payloads, a line each, and prints none; `--count` ends it with 0, and it leaves."""
    file = tmp_path / "collected"
    file.write_bytes(b"before\n")
    with PlayedGateway() as gateway:
        command = collect(stack, gateway, "--write", str(file), "--count", "3")
        send(gateway.requests[0], b"one", b"\0two", b"x" * 65_507, b"four")
        code, text = finish(command)
        assert (code, "Got message" in text) == (0, False)
        assert gateway.said("leave")
    assert file.read_bytes() == b"before\none\n\0two\n" + b"x" * 65_507 + b"\n"


@pytest.mark.parametrize("error", ["name_taken", "no_transmitter"])
def test_signs_up_again_when_the_gateway_was_away(stack: Stack, error: str) -> None:
    """A lost connection is said, and the same port signed up again, also when that is refused for a moment at first."""
    refusals = [{"ok": False, "error": error, "message": "wait"}]

    def register(request: Request) -> Request:
        if len(gateway.said("register")) == 2:
            return refusals.pop()
        return {"ok": True, "client": {**request, "address": "127.0.0.1", "generation": len(gateway.requests)}}

    with PlayedGateway(register=register) as gateway:
        command = collect(stack, gateway)
        gateway.drop()
        command.wait_for("signed up again as siem, generation 3")
        assert "closed the connection" in command.text
        first, refused, again = gateway.said("register")
        assert first == refused == again
        send(again, b"still here")
        command.wait_for("still here")
        assert command.stop(signal.SIGINT) == 0
        assert gateway.said("leave")[0]["generation"] == 3


def test_survives_a_gateway_that_stays_away(stack: Stack) -> None:
    """Without a gateway it keeps trying, goes on printing, and still ends cleanly."""
    with PlayedGateway() as gateway:
        command = collect(stack, gateway)
        request = gateway.requests[0]
    command.wait_for("signing up again")
    send(request, b"late")
    command.wait_for("late")
    assert command.stop(signal.SIGTERM) == 0


def test_a_refusal_ends_it(stack: Stack) -> None:
    """A refusal at the start ends it with the registry's sentence."""
    refusal = {"ok": False, "error": "name_taken", "message": "siem is signed up"}
    with PlayedGateway(register=lambda _: refusal) as gateway:
        arguments = ("collect", "siem", "--stream", "messages", "--gateway", gateway.endpoint)
        assert run(stack, *arguments) == (1, "fanwire collect: siem is signed up\n")


def test_proves_its_address(stack: Stack) -> None:
    """The nonce that comes to the address is brought back where the registry wants proof of it."""

    def challenge(request: Request) -> Request:
        send(request, b"not that", CHALLENGE_PREFIX + b"nonce")
        return {"ok": False, "error": "unproven_address", "message": "prove it"}

    def grant(request: Request) -> Request:
        return {"ok": True, "client": {**gateway.said("register")[0], "address": "127.0.0.1", "generation": 7}}

    with PlayedGateway(register=challenge, confirm=grant) as gateway:
        command = collect(stack, gateway)
        assert gateway.said("confirm") == [{"op": "confirm", "name": "siem", "nonce": "nonce"}]
        assert command.stop(signal.SIGTERM) == 0
        assert gateway.said("leave")[0]["generation"] == 7


def test_proof_that_does_not_come(stack: Stack) -> None:
    """The command ends with the registry's sentence when no nonce comes to the address."""
    refusal = {"ok": False, "error": "unproven_address", "message": "prove it"}
    with PlayedGateway(register=lambda _: refusal) as gateway:
        arguments = ("collect", "siem", "--stream", "messages", "--gateway", gateway.endpoint)
        assert run(stack, *arguments) == (1, "fanwire collect: prove it\n")


@pytest.mark.parametrize("port", ["taken", "70000"])
def test_a_port_that_cannot_be_had_is_one_line(stack: Stack, port: str) -> None:
    """A port that is taken or is none ends it with 73 and one line."""
    with PlayedGateway() as gateway, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        number = str(other.getsockname()[1]) if port == "taken" else port
        arguments = ("collect", "siem", "--stream", "messages", "--port", number, "--gateway", gateway.endpoint)
        code, text = run(stack, *arguments)
        assert (code, text.count("\n")) == (73, 1)
        assert not gateway.requests


def test_a_full_disk_ends_it(stack: Stack) -> None:
    """A disk that is full ends it with 1 and one line that names file and reason, and it leaves."""
    with PlayedGateway() as gateway:
        command = collect(stack, gateway, "--write", "/dev/full")
        send(gateway.requests[0], b"Hello")
        code, text = finish(command)
        assert code == 1
        assert text.splitlines()[1:] == [
            "fanwire collect: /dev/full: No space left on device; later datagrams are lost"
        ]
        assert gateway.said("leave")


def test_a_file_longer_than_allowed_ends_it(stack: Stack, tmp_path: Path) -> None:
    """A file that may grow no further (ulimit -f) ends it likewise; what was written before stays."""
    file = tmp_path / "collected"
    with PlayedGateway() as gateway:
        script = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); {RUN_OPERATOR}"
        arguments = ("collect", "siem", "--stream", "messages", "--gateway", gateway.endpoint, "--write", str(file))
        command = stack.spawn("collect", [sys.executable, "-c", script, *arguments])
        command.wait_for("collecting messages")
        send(gateway.requests[0], b"x" * 79, b"y" * 6000)
        code, text = finish(command)
        assert (code, text.count("\n")) == (1, 2)
        assert f"{file}: File too large" in text
    assert file.read_bytes() == b"x" * 79 + b"\n" + b"y" * 4920


def test_ends_when_its_terminal_closes(stack: Stack, tmp_path: Path) -> None:
    """With its terminal closed (SIGHUP), `collect --write` leaves and ends, though it prints nothing there."""
    file = tmp_path / "collected"
    with PlayedGateway() as gateway:
        process, terminal = pty.fork()
        if process == 0:
            command = [sys.executable, "-m", "services.operator", "collect", "siem", "--stream", "messages"]
            os.execve(
                command[0], [*command, "--gateway", gateway.endpoint, "--write", str(file)], dict(stack.environment)
            )
        wait_until(lambda: gateway.said("register"), "it signs up")
        send(gateway.requests[0], b"Hello")
        wait_until(lambda: file.exists() and file.read_bytes() == b"Hello\n", "it writes")
        os.close(terminal)
        wait_until(lambda: gateway.said("leave"), "it leaves")
        assert os.waitpid(process, 0)[1] == 0


def test_a_command_that_hang_ups_do_not_concern_goes_on(stack: Stack, tmp_path: Path) -> None:
    """Started with SIGHUP ignored, as by nohup, `collect --write` goes on after one."""
    file = tmp_path / "collected"
    with PlayedGateway() as gateway:
        script = f"import runpy, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); {RUN_OPERATOR}"
        arguments = ("collect", "siem", "--stream", "messages", "--gateway", gateway.endpoint, "--write", str(file))
        command = stack.spawn("collect", [sys.executable, "-c", script, *arguments])
        command.wait_for("collecting messages")
        command.process.send_signal(signal.SIGHUP)
        send(gateway.requests[0], b"Hello")
        wait_until(lambda: file.read_bytes() == b"Hello\n", "it writes")
        assert command.stop() == 0


def test_unreadable_file_is_one_line(stack: Stack, tmp_path: Path) -> None:
    """A file that can't be opened ends it with 73 before anything is signed up."""
    with PlayedGateway() as gateway:
        arguments = ("--write", str(tmp_path), "--gateway", gateway.endpoint)
        code, text = run(stack, "collect", "siem", "--stream", "messages", *arguments)
        assert (code, text.count("\n")) == (73, 1)
        wait_until(lambda: not gateway.requests, "nothing was asked", 1.0)

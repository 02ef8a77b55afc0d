"""A resolver that is silent holds up no service at its start or end, and no command for long."""

from inspect import signature
from typing import Final

import pytest

from shared.net.addresses import PATIENCE_SECONDS, resolve
from tests.name_server import NameServer, start_asking
from tests.stack import PATIENT, Stack, wait_until
from tests.system.test_bus_over_tcp import LISTEN, apart, make_keys

NAME = "bus.example.net"
HINT = f"`getent hosts {NAME}` says whether its name has an address here"
LONG = 30
"""Seconds that getaddrinfo(3) waits for one server: the most that resolv.conf(5) can have."""
LESS: Final = LONG / 2
"""Seconds in which a service ends, also on a busy machine, that does not wait for the resolver."""


def broker_by_name(stack: Stack) -> None:
    """Start a broker, which programs started from now on have to look up."""
    keys = make_keys(stack)
    stack.configure(LISTEN + keys + PATIENT)
    stack.start("broker")
    apart(stack, f'connect = "tcp://{NAME}:5800"\n{keys}{PATIENT}')


@pytest.mark.parametrize("name", ["ingest", "gateway", "forwarder", "console"])
def test_service_waits_for_the_name_of_the_broker_and_can_be_ended(stack: Stack, name: str) -> None:
    """It says what it waits for, and where to look; SIGTERM ends it in order though libzmq still asks."""
    broker_by_name(stack)
    with NameServer() as server:
        server.silent = True
        running = start_asking(stack, name, LONG, ready=False)
        running.wait_for(HINT)
        assert server.unanswered
        assert running.stop(seconds=LESS) == 0


def test_service_that_has_lost_the_broker_can_be_ended(stack: Stack) -> None:
    """It looks the name up again when the connection is gone; that nobody answers holds up nothing."""
    broker_by_name(stack)
    with NameServer() as server:
        server.addresses = {NAME: ["127.0.0.1"]}
        running = start_asking(stack, "ingest", LONG)
        server.silent = True
        stack["broker"].stop()
        wait_until(lambda: server.unanswered, "it looks for the broker again")
        assert running.stop(seconds=LESS) == 0


def test_command_says_where_to_look(stack: Stack) -> None:
    """Without an answer a command ends as it does without a broker, in one line, before the resolver gives up."""
    broker_by_name(stack)
    with NameServer() as server:
        server.silent = True
        ledger = start_asking(stack, "operator ledger", LONG, ready=False)
        assert ledger.process.wait(LONG) == 69
        assert ledger.text.startswith(f"fanwire ledger: no broker at tcp://{NAME}:5800; start it with `fanwire run`")
        assert ledger.text.endswith(f"; {HINT}\n")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ingest", '[[stream]]\nname = "x"\nlisten = ["udp://relay.example.net:7000"]\n'),
        ("gateway", '[gateway]\nlisten = ["tcp://relay.example.net:7000"]\n'),
    ],
)
def test_start_waits_a_while_for_the_name_of_a_listener(stack: Stack, name: str, settings: str) -> None:
    """Then it ends with one line that names it, before the resolver gives up; systemd tries again.

    Here it waits less long than the 10 s that are its bound.
    """
    assert signature(resolve).parameters["patience_seconds"].default == PATIENCE_SECONDS == 10
    stack.configure(settings)
    with NameServer() as server:
        server.silent = True
        running = start_asking(stack, name, LONG, ready=False, bound=2)
        assert running.process.wait(LONG) == 1
        assert server.unanswered
        assert "relay.example.net" in running.text
        assert "no answer within 2 s" in running.text.splitlines()[-1]


def test_start_ends_at_once_where_the_resolver_knows_no_such_listener(stack: Stack) -> None:
    """An answer that there is no such host ends it with the status of bad settings, and systemd tries no more."""
    stack.configure('[[stream]]\nname = "x"\nlisten = ["udp://relay.example.net:7000"]\n')
    with NameServer():
        running = start_asking(stack, "ingest", LONG, ready=False)
        assert running.process.wait(LONG) == 78
        assert "udp://relay.example.net:7000" in running.text.splitlines()[-1]

"""Clients whose host has vanished: nothing says so on their connections, and what is theirs goes by its lease."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from services.gateway.registry.expiry_pause import MIN_CLIENTS
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.services.gateway.talk import Talk, talk_to
from tests.services.gateway.test_server import counters
from tests.services.gateway.transport.test_tls import PORT, Site, entry
from tests.stack import Running, ask_json, wait_until

TTL = 4
MANY = MIN_CLIENTS + 2


class Field:
    """A host with clients, a link that can be cut, and the gateway at the other end of it, which somebody watches."""

    def __init__(self, host: Host, relay: Host, gateway: Running, site: Site, watcher: Talk) -> None:
        self.host, self.relay, self.gateway, self.site, self.watcher = host, relay, gateway, site, watcher

    def connect(self, holder: str) -> Talk:
        """A client's connection."""
        context = ssl.create_default_context(cafile=self.site.authority.certificate)
        sock = self.host.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(60)
        sock.connect(("10.2.0.1", PORT))
        talk = Talk(context.wrap_socket(sock, server_hostname="10.2.0.1"))
        assert talk.ask("auth", token=f"secret {holder}")["ok"]
        return talk

    def link(self, state: str) -> None:
        """Set the link up or down."""
        self.host.run("ip", "link", "set", "dev", "eth", state)

    def account(self) -> dict[str, int]:
        """The gateway's account."""
        with self.relay.entered():
            return counters(self.site.stack)


@pytest.fixture
def field(open_stack: OpenStack) -> Iterator[Field]:
    """A host in the field, connected by a cable."""
    with (
        Host() as relay,
        Host() as host,
        veth(End(relay, "eth", "10.2.0.1/24"), End(host, "eth", "10.2.0.2/24")),
        relay.entered(),
    ):
        site = Site(open_stack, hosts="IP:10.2.0.1")
        gateway = site.start(*(entry(f"field{number}", "collect", "list") for number in range(MANY)))
        watcher = talk_to()
        assert watcher.ask("watch")["ok"]
        yield Field(host, relay, gateway, site, watcher)
        watcher.close()


@contextmanager
def signed_up(field: Field, count: int, **terms: Any) -> Iterator[list[tuple[Talk, int]]]:
    """Sign up collectors, each with a token and a connection of its own; return them and their generations."""
    with ExitStack() as opened:
        talks = [opened.enter_context(field.connect(f"field{number}")) for number in range(count)]
        collectors = []
        for number, talk in enumerate(talks):
            answer = talk.ask("register", name=f"c{number}", streams=["messages"], port=9514 + number, **terms)
            collectors.append((talk, answer["client"]["generation"]))
            assert field.watcher.read()["event"] == "joined"
        yield collectors


def test_vanished_host_is_found_by_its_leases(field: Field) -> None:
    """The leases of a few collectors end when their host is gone, though their connections are as they were."""
    with signed_up(field, 3, ttl=TTL) as collectors:
        for number, (talk, generation) in enumerate(collectors):
            assert talk.ask("renew", name=f"c{number}", generation=generation)["ok"]
        open_before = field.account()["connections"]
        field.link("down")
        told = [field.watcher.read() for _ in collectors]
        assert sorted((line["event"], line["name"]) for line in told) == [("expired", f"c{each}") for each in range(3)]
        assert field.account()["connections"] == open_before


def test_many_that_vanish_at_once_stay(field: Field) -> None:
    """Nothing expires when the link to most is cut, and the log says so; once it is back, leases go on."""

    def renewals() -> list[bool]:
        for number, (talk, generation) in enumerate(collectors):
            talk.tell("renew", name=f"c{number}", generation=generation)
        return [talk.read()["ok"] for talk, _ in collectors]

    with signed_up(field, MANY, ttl=TTL) as collectors:
        assert all(renewals())  # however long signing up took: their leases end together
        field.link("down")
        field.gateway.wait_for("too many renewals are missing at once")
        assert field.account()["preserving"] == 1
        with field.relay.entered():
            assert len(ask_json({"op": "list"})["clients"]) == MANY
        field.link("up")
        # With few of them missing those are over, which the last one may be by now.
        assert sum(renewals()) >= MANY - 1
        field.gateway.wait_for("leases expire again")
        assert field.account()["preserving"] == 0


@pytest.mark.soak
@pytest.mark.parametrize("told", [False, True])
def test_vanished_holder(field: Field, told: bool) -> None:
    """An entry that a connection holds goes some minute after its host has, also when data was on its way there."""
    with signed_up(field, 1, hold=True) as ((talk, _),):
        assert talk.ask("watch")["ok"]
        field.link("down")
        if told:
            field.watcher.ask("register", name="news")
            assert field.watcher.read()["event"] == "joined"
        with field.relay.entered():
            wait_until(lambda: "c0" not in ask_json({"op": "list"})["clients"], "it is gone", 100)

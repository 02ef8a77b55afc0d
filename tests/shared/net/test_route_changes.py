import errno
import socket
from collections.abc import Iterator
from contextlib import closing
from unittest import mock

import pytest

from shared.net.route_changes import READS_AT_ONCE, RouteChanges
from tests.network import End, Host, veth

CHANGES = (
    "addr add 10.2.0.9/24 dev up",
    "addr add fd00:22::1/64 dev up nodad",
    "route add 10.9.0.0/24 via 10.2.0.2",
    "route add fd00:9::/64 via fd00:2::2",
    "route del 10.9.0.0/24",
    "rule add from 192.0.2.1 prohibit",
    "-6 rule add from 2001:db8::1 prohibit",
    "addr change fd00:22::1/64 dev up preferred_lft 0",
    "link set dev up down",
    "link set dev up up",
)


@pytest.fixture
def relay(lab: None) -> Iterator[Host]:
    """A host with a link, entered."""
    with Host() as relay, Host() as router:
        up, down = End(relay, "up", "10.2.0.1/24 fd00:2::1/64"), End(router, "down", "10.2.0.2/24 fd00:2::2/64")
        with veth(up, down), relay.entered():
            yield relay


def test_each_kind_of_change_is_noticed(relay: Host) -> None:
    """Addresses, routes, rules and links of both families make the version grow; nothing else does."""
    with closing(RouteChanges()) as changes:
        for command in CHANGES:
            before = changes.version
            relay.run(*f"ip {command}".split())
            changes.read()
            assert changes.version > before, command
        before = -1
        while changes.version != before:
            before = changes.version
            changes.read()
        relay.neighbour("10.2.0.77", "02:00:00:00:00:77", "up")
        changes.read()
        assert changes.version == before


def test_more_events_than_the_socket_holds_are_a_change(relay: Host) -> None:
    """A router's table that changes all the time is read away in measure, and every read that had events counts."""
    with closing(RouteChanges()) as changes:
        lines = [f"route add 10.{high}.{low}.0/24 via 10.2.0.2" for high in range(16, 32) for low in range(256)]
        relay.run("ip", "-batch", "-", text="\n".join(lines))
        changes.read()
        assert changes.version == 1
        for _ in range(len(lines) // READS_AT_ONCE + 2):
            changes.read()
        before = changes.version
        changes.read()
        assert changes.version == before


def test_without_netlink_each_look_may_be_a_change() -> None:
    """Each read reports a possible change where netlink is refused: nobody tells of changes."""
    with mock.patch.object(socket, "socket", side_effect=OSError(errno.EPERM, "refused")):
        changes = RouteChanges()
    with closing(changes):
        changes.read()
        changes.read()
        assert changes.version == 2

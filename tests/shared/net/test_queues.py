import os
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.net.netlink_format import ATTRIBUTE
from shared.net.queues import TCA_KIND, TCA_OPTIONS, TCMSG, Queue, Queues
from tests.network import End, Host, veth

FAR = "10.2.0.2"


@pytest.fixture
def relay(lab: None) -> Iterator[Host]:
    """A host that is entered, with a link `up` to another one."""
    with (
        Host() as relay,
        Host() as siem,
        veth(End(relay, "up", "10.2.0.1/24"), End(siem, "eth", f"{FAR}/24")),
        relay.entered(),
    ):
        yield relay


def shape(host: Host, queue: str) -> Queue:
    """Give the link a queue, and return what is read of it."""
    try:
        host.run(*f"tc qdisc replace dev up root {queue}".split())
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"no traffic shaping here: {error}")
    with closing(Queues()) as found:
        return next(each for each in found.all() if each.kind == queue.split()[0])


@pytest.mark.parametrize(
    ("queue", "takes_runs"),
    [
        ("tbf rate 8mbit burst 5000 limit 100000", False),
        ("tbf rate 8mbit burst 90000 limit 40000", False),
        ("tbf rate 8mbit burst 90000 limit 100000 peakrate 9mbit mtu 3000", False),
        ("tbf rate 8mbit burst 75000 limit 90000", True),
        ("tbf rate 50gbit burst 200000 limit 900000", True),
        ("tbf rate 50gbit burst 9000 limit 900000", False),
        ("bfifo limit 30000", False),
        ("bfifo limit 300000", True),
        ("pfifo limit 10", True),
    ],
)
def test_queue_is_read(relay: Host, queue: str, takes_runs: bool) -> None:
    """The kernel's answer tells whether a queue takes a run as a whole, and what it has dropped."""
    index = int(relay.link("up")["ifindex"])
    assert shape(relay, queue) == Queue(index, queue.split()[0], 0, takes_runs)
    with closing(Queues()) as known:
        assert known.take_runs_to(FAR, 0) == known.take_runs_by(index, 0) == takes_runs
        assert known.take_runs_to("127.0.0.1", 0)
        assert known.take_runs_to("2001:db8::1", 0)


def test_links_above_such_a_link_take_none_either(relay: Host) -> None:
    """A bridge or a VLAN takes no runs while any link below may not; without such a link it does."""
    try:
        relay.run(*["ip", "link", "add", "name", "above", "type", "bridge"])
    except AssertionError as error:
        pytest.skip(f"no bridge here: {error}")
    index = int(relay.link("above")["ifindex"])
    shape(relay, "pfifo")
    with closing(Queues()) as known:
        assert known.take_runs_by(index, 1)
        shape(relay, "bfifo limit 9000")
        assert known.take_runs_by(index, 1)
        assert not known.take_runs_by(index, 2)


def test_drops_are_read(relay: Host) -> None:
    """Packets that a queue has dropped are counted by it, one by one."""
    shape(relay, "tbf rate 8kbit burst 2000 limit 2000")
    relay.neighbour(FAR, "02:00:00:00:00:09", "up")
    with relay.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(20):
            sock.sendto(bytes(1000), (FAR, 9))
    with closing(Queues()) as found:
        (queue,) = [each for each in found.all() if each.kind == "tbf"]
    assert 0 < queue.dropped <= 20


def test_without_netlink_runs_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that can't be asked has said nothing against runs."""

    def refuse(*_: object) -> None:
        raise OSError(1, os.strerror(1))

    monkeypatch.setattr(socket, "socket", refuse)
    assert Queues().take_runs_to("192.0.2.1", 0)


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute as the kernel packs it."""
    return ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


@given(st.binary(max_size=80), st.sampled_from([b"tbf\0", b"bfifo\0", b"x", b"\xff"]), st.binary(max_size=20))
def test_any_answer_is_read_or_left_out(options: bytes, kind: bytes, rest: bytes) -> None:
    """Bytes of any kind in an answer are a queue, or none."""
    body = TCMSG.pack(0, 3, 0, 0, 0) + attribute(TCA_KIND, kind) + attribute(TCA_OPTIONS, options) + rest
    with pytest.MonkeyPatch.context() as patch, closing(Queues()) as known:
        for answers in ([body], [rest], [TCMSG.pack(0, 3, 0, 0, 0) + rest]):
            patch.setattr(known, "_ask", lambda *_, found=answers: found)
            assert len(known.all()) <= 1

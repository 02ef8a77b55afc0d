import socket
from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import pytest

from shared.net import running_lookups
from shared.net.addresses import begin_lookups, resolve
from shared.settings.entries import Stream
from shared.settings.own_listeners import listening_addresses
from tests.stack import wait_until

LONG = 300.0
"""Seconds that no test waits."""


class Resolver:
    """Stands for getaddrinfo(3): it answers when it is let."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.let_go = Event()
        self.error: OSError | None = None

    def __call__(self, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        """Wait, then answer, or fail."""
        self.asked.append(host)
        self.let_go.wait()
        if self.error:
            raise self.error
        four, six = (socket.AF_INET, ("192.0.2.1", port)), (socket.AF_INET6, ("2001:db8::1", port, 0, 0))
        return [(family, socket.SOCK_DGRAM, 17, "", at) for family, at in (four, six)]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    """A resolver that is silent at first."""
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    monkeypatch.setattr(running_lookups, "_running", {})
    yield made
    made.let_go.set()


def begun_long_ago() -> None:
    """Let the time be over for all names that are being looked up."""
    for each in running_lookups._running.values():
        each.began_at -= LONG
        each.ended_at -= LONG


def test_names_are_looked_up_side_by_side(resolver: Resolver) -> None:
    """Names that are begun together have one bound, and one that has none is not asked for again meanwhile."""
    begin_lookups(["one.example", "two.example", "127.0.0.1", "localhost", ""])
    wait_until(lambda: sorted(resolver.asked) == ["one.example", "two.example"], "both are asked for")
    begun_long_ago()
    for host in ("one.example", "two.example", "one.example"):
        with pytest.raises(socket.gaierror, match="no answer within 300 s"):
            resolve(host, 9, socket.SOCK_DGRAM, LONG)
    assert len(resolver.asked) == 2


def test_listeners_of_a_stream_have_one_bound(resolver: Resolver) -> None:
    """All names of listeners are asked for before any of them is waited for."""
    names = ["one.example", "two.example"]
    streams = [Stream(name="x", listen=tuple(f"udp://{name}:7000" for name in names))]
    found = list[Any]()
    reading = Thread(target=lambda: found.extend(listening_addresses(streams)))
    reading.start()
    wait_until(lambda: sorted(resolver.asked) == names, "both are asked for")
    resolver.let_go.set()
    reading.join()
    assert found == 2 * [("192.0.2.1", 7000), ("2001:db8::1", 7000)]


def test_an_answer_is_used_once(resolver: Resolver) -> None:
    """A name is asked for anew each time, but for the first time after it was begun ahead, and soon."""
    begin_lookups(["one.example"])
    resolver.let_go.set()
    expected = [(socket.AF_INET, ("192.0.2.1", 9)), (socket.AF_INET6, ("2001:db8::1", 9, 0, 0))]
    for asked in (1, 2):
        assert resolve("one.example", 9, socket.SOCK_DGRAM) == expected
        assert len(resolver.asked) == asked
    begin_lookups(["one.example"])
    wait_until(lambda: running_lookups._running["one.example"].answered.is_set(), "it is answered")
    begun_long_ago()
    assert resolve("one.example", 9, socket.SOCK_DGRAM) == expected
    assert len(resolver.asked) == 4


def test_a_resolver_that_has_given_up_is_not_waited_for_again_soon(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that took long is that of each who asks within seconds; one that came at once is asked for anew."""
    monkeypatch.setattr(running_lookups, "SLOW_SECONDS", LONG)
    resolver.error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    begin_lookups(["slow.example"])
    wait_until(lambda: resolver.asked, "it is asked for")
    begun_long_ago()
    resolver.let_go.set()
    for host in ("slow.example", "slow.example", "quick.example", "quick.example"):
        with pytest.raises(socket.gaierror, match="Temporary failure"):
            resolve(host, 9, socket.SOCK_DGRAM, 2 * LONG)
    assert resolver.asked == ["slow.example", "quick.example", "quick.example"]
    begun_long_ago()
    with pytest.raises(socket.gaierror, match="Temporary failure"):
        resolve("slow.example", 9, socket.SOCK_DGRAM, LONG)
    assert resolver.asked[3:] == ["slow.example"]


def test_a_process_that_may_have_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name has no address for now, which is an OSError like any other."""

    def refuse(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refuse)
    begin_lookups(["one.example"])
    with pytest.raises(socket.gaierror, match="it is not looked up: can't start new thread"):
        resolve("one.example", 9, socket.SOCK_DGRAM)

import socket
from collections.abc import Iterable
from threading import Event

import pytest

from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.own_listeners import FollowedListeners, OwnListeners, udp_listeners
from tests.stack import wait_until

LOCAL = {"127.0.0.1", "127.0.0.9", "10.2.0.1", "::1", "fd00:2::1"}


def receive(listeners: Iterable[tuple[str, int]], address: str, port: int = 6667) -> bool:
    """Return whether one of these listeners gets what is sent to an address."""
    return OwnListeners(listeners).receive(address, port, LOCAL.__contains__)


@pytest.mark.parametrize(
    ("listener", "address", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.9", False),
        ("127.0.0.1", "10.2.0.1", False),
        ("10.2.0.1", "10.2.0.1", True),
        ("10.2.0.1", "10.2.0.2", False),
        ("0.0.0.0", "10.2.0.1", True),
        ("0.0.0.0", "127.0.0.9", True),
        ("0.0.0.0", "10.2.0.2", False),
        ("0.0.0.0", "fd00:2::1", False),
        ("::", "fd00:2::1", True),
        ("::", "10.2.0.1", True),
        ("::", "10.2.0.2", False),
        ("::1", "::1", True),
        ("::1", "0:0:0:0:0:0:0:1", True),
        ("::1", "127.0.0.1", False),
        ("fd00:2::1", "FD00:2:0::1", True),
    ],
)
def test_a_listener_receives_what_is_sent_to_its_address(listener: str, address: str, expected: bool) -> None:
    """Its own address, however it is written; on every address of this host when it has none, of IPv4 too on `::`."""
    assert receive([(listener, 6667)], address) == expected
    assert not receive([(listener, 6668)], address)


def test_any_of_the_listeners_may_receive() -> None:
    """It takes one of several; without listeners nothing comes back."""
    several = [("127.0.0.1", 6667), ("10.2.0.1", 514), ("::", 2055)]
    assert receive(several, "10.2.0.1", 514)
    assert receive(several, "10.2.0.1", 2055)
    assert not receive(several, "10.2.0.1", 6667)
    assert not receive([], "10.2.0.1")


def test_only_an_address_in_question_is_looked_up() -> None:
    """The check that an address is this host's, a question to the kernel, is made for the same port only."""
    asked: list[str] = []

    def is_local(address: str) -> bool:
        asked.append(address)
        return True

    listeners = OwnListeners([("0.0.0.0", 514), ("10.2.0.1", 6667)])
    assert not listeners.receive("10.2.0.2", 6667, is_local)
    assert not asked
    assert listeners.receive("10.2.0.2", 514, is_local)
    assert asked == ["10.2.0.2"]


def settings(*listen: str) -> Settings:
    """A stream with these listeners, and another one."""
    return Settings(streams=(Stream(name="a", listen=listen), Stream(name="b", listen=("udp://192.0.2.1:514",))))


def test_listeners_are_the_udp_ones_of_all_streams() -> None:
    """Every stream's UDP listeners count, those for TCP and AF_UNIX do not: nobody sends copies there."""
    found = udp_listeners(settings("udp://[::]:2055", "tcp://127.0.0.1:6667", "unixgram:///run/messages.sock"))
    assert found == [("::", 2055), ("192.0.2.1", 514)]


def test_a_host_name_stands_for_all_its_addresses() -> None:
    """`localhost` is on loopback, in each family that it has; a name that nobody knows has no listener."""
    found = udp_listeners(settings("udp://localhost:6667", "udp://nobody.invalid:6668"))
    assert ("127.0.0.1", 6667) in found
    assert {address for address, port in found if port == 6667} <= {"127.0.0.1", "::1"}
    assert not [port for _, port in found if port == 6668]


def test_names_are_looked_up_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """New settings wait for no resolver: a name that has an answer later is a listener then, each asked for once.

    One that has no answer now keeps the addresses of before.
    """
    asked: list[str] = []
    answers, may_answer = {"relay.test": "192.0.2.7"}, Event()
    may_answer.set()

    def resolver(host: str, port: int, *_: object) -> object:
        asked.append(host)
        may_answer.wait(60)
        if host not in answers:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return [(socket.AF_INET, (answers[host], port))]

    def loops(*places: tuple[str, int]) -> list[bool]:
        return [followed.receive(address, port, LOCAL.__contains__) for address, port in places]

    monkeypatch.setattr("shared.net.host_lookups.resolve", resolver)
    followed = FollowedListeners(settings("udp://relay.test:514", "udp://relay.test:515").streams)
    assert (asked, followed.settled) == (["relay.test"], True)
    assert loops(("192.0.2.7", 514), ("192.0.2.7", 515), ("192.0.2.1", 514)) == [True, True, True]
    answers.clear()
    answers["new.test"] = "192.0.2.8"
    may_answer.clear()
    streams = settings("udp://relay.test:514", "udp://new.test:516", "udp://192.0.2.9:517").streams
    followed = FollowedListeners(streams, followed)
    assert not followed.settled
    assert loops(("192.0.2.7", 514), ("192.0.2.8", 516), ("192.0.2.9", 517)) == [True, False, True]
    may_answer.set()

    def settled() -> bool:
        followed.tick()
        return followed.settled

    wait_until(settled, "both names are looked up")
    assert loops(("192.0.2.7", 514), ("192.0.2.8", 516), ("192.0.2.7", 515)) == [True, True, False]

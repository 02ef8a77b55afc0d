from hypothesis import given
from hypothesis import strategies as st

from shared.bus.publishing.subscriptions import CHECK_SECONDS, RENEW_SECONDS, Subscriptions

HELLO = "broker/"


class Played:
    """Subscriptions, what the broker says of them, and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.subscriptions = Subscriptions(HELLO, 4, lambda: self.now)

    def say(self, *said: str, lost: bool = False, seconds: float = CHECK_SECONDS) -> list[str]:
        """Let time pass, check, then let prefixes be asked for (+) and taken back (-); return what is wanted."""
        self.now += seconds
        self.subscriptions.check(disconnected=lost)
        for each in said:
            self.subscriptions.note((b"\x01" if each[0] == "+" else b"\x00") + each[1:].encode())
        return [topic for topic in ("a/", "b/", "c/") if self.subscriptions.wanted(topic)]


def test_what_is_not_asked_for_anew_after_a_reconnection_is_dropped() -> None:
    """All stays wanted while there is no broker, and for a moment after, in which subscribers find the next one."""
    played, connected = Played(), list[bool]()
    for said, lost, seconds, wanted in (
        (f"+{HELLO} +a/ +b/", False, 1.0, ["a/", "b/"]),
        ("", False, 1.0, ["a/", "b/"]),
        ("", True, 1.0, ["a/", "b/"]),
        ("", False, 60.0, ["a/", "b/"]),
        (f"+a/ +{HELLO}", False, 1.0, ["a/", "b/"]),
        ("+c/", False, RENEW_SECONDS / 2, ["a/", "b/", "c/"]),
        ("", False, RENEW_SECONDS, ["a/", "c/"]),
        ("", False, 60.0, ["a/", "c/"]),
    ):
        assert played.say(*said.split(), lost=lost, seconds=seconds) == wanted
        connected.append(played.subscriptions.connected)
    assert connected == [True, True, False, False, True, True, True, True]


def test_what_came_with_the_next_connection_stays_though_the_loss_is_heard_of_later() -> None:
    """Nothing that a connection has brought is dropped, if it was made between two checks, as another one was lost."""
    played = Played()
    played.say(f"+{HELLO}", "+a/", "+b/")
    played.say()
    played.say(f"+{HELLO}", "+a/")  # by the next broker
    assert played.say(lost=True) == ["a/", "b/"]
    assert played.subscriptions.connected
    assert played.say(seconds=RENEW_SECONDS) == ["a/"]


def test_only_so_many_are_kept_and_those_may_be_renewed() -> None:
    """Beyond the limit a prefix is not wanted; one that is there already is taken anew."""
    played = Played()
    assert played.say(f"+{HELLO}", "+a/", "+b/", "+x/", "+c/") == ["a/", "b/"]
    played.say()
    played.say(lost=True)
    played.say("+a/", "+b/", f"+{HELLO}")
    assert played.say(seconds=RENEW_SECONDS) == ["a/", "b/"]
    assert played.say("-a/", "+c/") == ["b/", "c/"]


@given(st.lists(st.tuples(st.sampled_from(["+a/", "+b/", "-a/", "-b/", ""]), st.booleans(), st.floats(0, 3))))
def test_what_the_present_broker_wants_is_wanted(events: list[tuple[str, bool, float]]) -> None:
    """No subscription of the present connection is ever dropped, whatever comes in whatever order."""
    played, present = Played(), set[str]()
    played.say(f"+{HELLO}")
    for said, lost, seconds in events:
        if lost:
            present.clear()
            played.say(lost=True, seconds=seconds)
            played.say(f"+{HELLO}", seconds=0.0)
        if said:
            (present.add if said[0] == "+" else present.discard)(said[1:])
        assert present <= {*played.say(*[said] if said else [], seconds=seconds)}

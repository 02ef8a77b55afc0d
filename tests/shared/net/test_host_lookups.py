from threading import Event

import pytest

from shared.net import host_lookups
from shared.net.host_lookups import AT_ONCE, LATE_SECONDS, RETRY_SECONDS, HostLookups
from tests.stack import wait_until


class Resolver:
    """Stands for getaddrinfo(3): names below `slow` wait until they are let go."""

    def __init__(self) -> None:
        self.let_go, self.asked = Event(), list[str]()
        self.addresses = {"siem": ["192.0.2.9", "2001:db8::9"]}
        self.now = 0.0

    def resolve(self, name: str, *_: object) -> list[tuple[int, tuple[str, int]]]:
        """Answer as `shared.net.addresses.resolve` does."""
        self.asked.append(name)
        if name.startswith("slow"):
            self.let_go.wait()
        if name not in self.addresses:
            raise OSError(-2, "Name or service not known")
        return [(0, (address, 0)) for address in self.addresses[name]]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Answers instead of the host's."""
    made = Resolver()
    monkeypatch.setattr(host_lookups, "resolve", made.resolve)
    return made


def answered(lookups: HostLookups, name: str) -> None:
    """Wait until a name is answered, or not in time."""
    wait_until(lambda: name in lookups.tick(), f"{name} is answered")


def test_name_is_looked_up_again_when_it_is_due(resolver: Resolver) -> None:
    """After the time that is set, or sooner while it has no answer; meanwhile the last addresses stay."""
    lookups = HostLookups(60.0, lambda: resolver.now)
    lookups.follow(["siem"])
    states = [lookups.settled]
    answered(lookups, "siem")
    assert [*states, lookups.settled] == [False, True]
    resolver.addresses, resolver.now = {}, 59.0
    assert not lookups.tick()
    assert resolver.asked == ["siem"]
    resolver.now = 60.0
    answered(lookups, "siem")
    assert lookups["siem"].addresses == ("192.0.2.9", "2001:db8::9")
    assert lookups["siem"].trouble == "Name or service not known"
    resolver.addresses, resolver.now = {"siem": ["192.0.2.10"]}, 60.0 + RETRY_SECONDS
    answered(lookups, "siem")
    assert [*lookups["siem"].addresses, lookups["siem"].trouble] == ["192.0.2.10", ""]


def test_silent_resolver_takes_a_few_threads_and_no_time(resolver: Resolver) -> None:
    """Lookups beyond the limit wait; a late one counts as unanswered, and is taken when it comes after all."""
    names = [f"slow{number}" for number in range(AT_ONCE + 3)]
    resolver.addresses = {name: ["192.0.2.9"] for name in names}
    lookups = HostLookups(60.0, lambda: resolver.now)
    lookups.follow(names)
    assert not lookups.tick()
    wait_until(lambda: len(resolver.asked) == AT_ONCE, "as many as may")
    resolver.now = LATE_SECONDS
    assert sorted(lookups.tick()) == sorted(names)
    assert lookups[names[0]].trouble == "no answer within 10 s"
    assert len(resolver.asked) == AT_ONCE
    resolver.let_go.set()
    wait_until(lambda: lookups.tick() is not None and all(lookups[name].addresses for name in names), "all answers")
    assert lookups.settled
    assert {lookups[name].addresses for name in names} == {("192.0.2.9",)}
    lookups.follow([])
    assert lookups[names[0]].addresses == ()

import json
from dataclasses import replace

import pytest

from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.entry import Origin
from tests.services.gateway.table import ELSEWHERE, HERE, Table, error_of


@pytest.fixture
def registry() -> Table:
    """An empty registry at time 0."""
    return Table()


def test_name_taken(registry: Table) -> None:
    """A name belongs to the connection that signed it up; from the same address it may be taken over."""
    registry.join("a")
    neighbour = Peer(3, HERE.address, 5000)
    refused = r"'a' belongs to another client; choose another name, or register with take_over \(`--take-over` of the "
    with pytest.raises(RequestError, match=refused + r"commands\)$"):
        registry.join("a", neighbour)
    with pytest.raises(RequestError, match=refused + r"commands\) from the address of its owner, without a token$"):
        registry.join("a", ELSEWHERE, take_over=True)
    registry.join("a", HERE)
    assert registry.join("a", neighbour, take_over=True).peer == neighbour


def test_entry_is_its_holders(registry: Table) -> None:
    """A client of the same holder renews, replaces and removes it, from anywhere; another at its address does not."""
    entry = registry.join("a", ELSEWHERE, ttl=5)
    again = Peer(4, "192.0.2.8", 4002, ELSEWHERE.rights)
    other = Peer(5, ELSEWHERE.address, 4003, Rights("other", frozenset({"collect"})))
    for act in (registry.renew_as, registry.release_as):
        assert error_of(act, "a", entry.client.generation, other) == "not_permitted"
    with pytest.raises(RequestError, match=r" as its owner, 'siem'$"):
        registry.join("a", other, take_over=True)
    registry.renew_as("a", entry.client.generation, again)
    assert error_of(registry.join, "a", again) == "name_taken"
    taken = registry.join("a", again, take_over=True)
    registry.release_as("a", taken.client.generation, ELSEWHERE)
    registry.join("a", ELSEWHERE)
    boss = Peer(6, "192.0.2.9", 4004, Rights("boss", frozenset({"admin"})))
    registry.release_as("a", registry.join("a", boss, take_over=True).client.generation, boss)


def test_holder_does_not_become_its_neighbour(registry: Table) -> None:
    """A token from the address of an administrator's program takes nothing of it over, nor that program of the token's.

    Not even after a restart, when the entry has lost its connection, and not where the connection showed its token
    only after it had made the entry.
    """
    red = Rights("red", frozenset({"collect"}))
    registry.join("a", HERE, hold=True)
    neighbour, later = Peer(3, HERE.address, 4001, red), replace(HERE, rights=red)
    for peer in (neighbour, later):
        for take_over in (False, True):
            assert error_of(registry.join, "a", peer, take_over=take_over) == "name_taken"
    registry.restore([replace(registry.join("a", HERE, hold=True), peer=Peer(0, HERE.address, 4000))], 1)
    assert error_of(registry.join, "a", neighbour) == "name_taken"
    registry.join("b", neighbour)
    untrusted = Peer(4, HERE.address, 4002, Rights("", frozenset({"collect"})))
    assert error_of(registry.join, "b", untrusted, take_over=True) == "name_taken"


def test_taking_over_takes_room() -> None:
    """A holder with as many entries as it may have gets no more of them from others, though it may take these over."""
    registry = Table(max_clients_per_holder=1)
    boss = Peer(3, "192.0.2.9", 4004, Rights("boss", frozenset({"admin", "collect"})))
    registry.join("a", boss)
    registry.join("b", ELSEWHERE)
    assert error_of(registry.join, "b", boss, take_over=True) == "registry_full"
    registry.join("a", boss)


def test_names_protocol_replaces_only_its_own(registry: Table) -> None:
    """On the names protocol a name replaces itself, by this host's and its holder's, never an entry made otherwise."""
    registry.join("a", HERE, Origin.NAMES)
    assert error_of(registry.join, "a", ELSEWHERE, Origin.NAMES) == "name_taken"
    registry.join("a", replace(HERE, id=3, address="127.0.0.2"), Origin.NAMES)
    assert json.loads(b"".join(registry.names.render()))["a"]["address"] == "127.0.0.2"
    registry.join("b", ELSEWHERE, Origin.NAMES)
    registry.join("b", replace(ELSEWHERE, id=4), Origin.NAMES)
    assert error_of(registry.join, "a", HERE, Origin.JSON) == "name_taken"
    registry.join("j", HERE, Origin.JSON)
    registry.join("s", HERE, Origin.SETTINGS)
    assert error_of(registry.join, "j", HERE, Origin.NAMES) == "name_taken"
    assert error_of(registry.join, "s", HERE, Origin.NAMES) == "name_taken"


def test_settings_are_not_changed_from_the_network(registry: Table) -> None:
    """A collector of the settings can't be taken over, renewed or taken away."""
    entry = registry.join("s", HERE, Origin.SETTINGS)
    generation = entry.client.generation
    assert error_of(registry.join, "s", HERE, take_over=True) == "not_permitted"
    assert error_of(registry.release_as, "s", generation, HERE) == "not_permitted"
    assert error_of(registry.renew_as, "s", generation, HERE) == "not_permitted"


def test_registry_full() -> None:
    """No more clients than allowed, but those that are in may change."""
    registry = Table(max_clients=2)
    registry.join("a")
    registry.join("b")
    assert error_of(registry.join, "c") == "registry_full"
    registry.join("a")


def test_one_holder_has_not_all_the_room() -> None:
    """A client with a token fills its own share of the registry, not the others'; one on this host has no share."""
    registry = Table(max_clients_per_holder=2)
    for number in range(5):
        registry.join(f"here{number}")
    for name in ("a", "b", "a"):
        registry.join(name, ELSEWHERE, ttl=5)
    assert error_of(registry.join, "c", ELSEWHERE) == "registry_full"
    registry.join("c", Peer(3, ELSEWHERE.address, 1, Rights("other", frozenset({"collect"}))))
    registry.release_as("b", registry.join("b", HERE, take_over=True).client.generation, HERE)
    registry.join("b", ELSEWHERE)
    assert error_of(registry.join, "d", ELSEWHERE) == "registry_full"
    registry.now = 6.0
    registry.expire()
    registry.join("d", ELSEWHERE)


def test_release_wants_the_generation(registry: Table) -> None:
    """A late `leave` or `renew` can't touch a successor of the same name."""
    old = registry.join("a").client.generation
    new = registry.join("a").client.generation
    assert (
        error_of(registry.release_as, "a", old, HERE)
        == error_of(registry.renew_as, "a", old, HERE)
        == "stale_generation"
    )
    registry.release_as("a", new, HERE)
    assert error_of(registry.release_as, "a", new, HERE) == "stale_generation"
    assert registry.present == []

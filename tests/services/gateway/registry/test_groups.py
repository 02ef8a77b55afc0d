from dataclasses import replace

from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.groups import Groups
from services.gateway.registry.registry import Registry
from shared.client import Client
from tests.services.gateway.table import HERE, Table

RED, BLUE = (Peer(number, "192.0.2.7", 4000, Rights(holder)) for number, holder in enumerate(("red", "blue"), 1))


def member(name: str, group: str, *, streams: tuple[str, ...] = ("messages",)) -> Client:
    """A collector in a group."""
    return Client(name, 0, "192.0.2.7", 9, streams=streams, group=group)


def of_bus(registry: Registry) -> dict[str, str]:
    """The group of each client as the bus has it."""
    registry.commit()
    return {client.name: client.group for change in registry.pop_changes() for client in change.joined}


def test_group_is_its_holders() -> None:
    """On the bus a name of a group means another group for each holder, for this host, and for the settings."""
    registry = Table()
    for name, peer, group in (("r1", RED, "g"), ("r2", replace(RED, id=9), "g"), ("r3", RED, "h"), ("b", BLUE, "g")):
        registry.grant(member(name, group), peer, Origin.JSON)
    registry.grant(member("here", "g"), HERE, Origin.JSON)
    registry.grant(member("none", ""), RED, Origin.JSON)
    registry.configure([member("s1", "g"), member("s2", "g")])
    groups = of_bus(registry)
    assert groups["r1"] == groups["r2"]
    assert groups["s1"] == groups["s2"]
    assert groups["none"] == ""
    assert len({groups[name] for name in ("r1", "r3", "b", "here", "s1")}) == 5
    shown = {entry.client.name: entry.client.group for entry in registry.entries()}
    assert {shown[name] for name in ("r1", "b", "here", "s1")} == {"g"}


def test_identifier_takes_the_secret() -> None:
    """The group's name on the bus can't be worked out from holder and group without the secret; with it, it can."""
    entry = Entry(member("a", "g"), Origin.JSON, RED, 0.0, 0.0, 0, False, 0.0)
    found = [Groups(secret).for_bus(entry).group for secret in (b"1", b"1", b"2")]
    assert found[0] == found[1] != found[2]

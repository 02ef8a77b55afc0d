from dataclasses import dataclass, field
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from shared.bus.bodies.nodes_message import Node, Nodes
from shared.bus.messages import RegistryChange, RegistrySnapshot, ServeRequest, Status
from shared.bus.zmq_sockets import Publisher
from shared.client import Client
from shared.fanout.registry_replica import RegistryReplica
from shared.fanout.serve_requests import ServeRequests
from shared.serving_nodes import Owners
from tests.builders import make_client, make_envelope

A, B, C = (make_client(name) for name in "abc")


def snapshot(revision: int, *clients: Client, pieces: int = 1) -> list[RegistrySnapshot]:
    """The pieces of a snapshot."""
    return [RegistrySnapshot(revision, piece, pieces, list(clients[piece::pieces])) for piece in range(pieces)]


def take(replica: RegistryReplica, *bodies: RegistrySnapshot | RegistryChange, boot: int = 1) -> list[bool]:
    """Let the replica take messages of one gateway; return its answer to each."""
    return [replica.apply_message(make_envelope(boot=boot), body) for body in bodies]


def test_empty_snapshot_is_a_registry() -> None:
    """A gateway without clients is known to have none, which is not the same as not being known."""
    replica = RegistryReplica()
    assert (replica.revision, replica.account()) == (-1, {})
    assert take(replica, *snapshot(0)) == [True]
    assert (replica.revision, replica.clients, replica.stale) == (0, {}, False)
    assert replica.account() == {"revision": 0}


def test_snapshot_comes_together_from_pieces() -> None:
    """Nothing changes before the last piece has come."""
    replica = RegistryReplica()
    assert take(replica, *snapshot(4, A, B, C, pieces=3)) == [False, False, True]
    assert replica.clients == {"a": A, "b": B, "c": C}
    assert replica.revision == 4


def test_snapshot_with_a_piece_lost_is_not_taken() -> None:
    """Pieces of a snapshot of which one was lost are let go, and the next snapshot is whole."""
    replica = RegistryReplica()
    first, _, last = snapshot(4, A, B, C, pieces=3)
    assert take(replica, first, last) == [False, False]
    assert replica.revision == -1
    assert take(replica, *snapshot(4, A, B, C, pieces=3)) == [False, False, True]


def test_pieces_of_two_revisions_are_not_mixed() -> None:
    """The rest of one snapshot does not complete another."""
    replica = RegistryReplica()
    assert take(replica, snapshot(4, A, B, pieces=2)[0], snapshot(5, A, C, pieces=2)[1]) == [False, False]
    assert replica.clients == {}


def test_collectors_are_handed_over_until_they_are_split() -> None:
    """Once other nodes come to serve, collectors are to be split anew at once; nothing else is so urgent."""
    replica = RegistryReplica(Owners("a", ("a", "b")))
    take(replica, *snapshot(1, A, B))
    for serving in (("a", "b"), ("a",)):
        told, seen = Nodes(True, [Node("a", "live"), Node("b", "silent")], serving), [replica.handing_over]
        for _ in range(2):
            replica.apply_message(make_envelope(kind="nodes"), told)
            seen.append(replica.handing_over)
            replica.split("relay")
        assert seen == [False, True, False]


def test_changes_are_applied_in_order() -> None:
    """A change removes who left, then adds who joined, so a name may do both at once."""
    replica = RegistryReplica()
    take(replica, *snapshot(1, A, B))
    changed = make_client("a", 10)
    assert take(replica, RegistryChange(1, 2, [C], ["b"]), RegistryChange(2, 3, [changed], ["a"])) == [True, True]
    assert replica.clients == {"a": changed, "c": C}
    assert replica.revision == 3


def test_repeated_change_is_nothing_new() -> None:
    """A change up to the revision we have changes nothing and makes nothing stale."""
    replica = RegistryReplica()
    take(replica, *snapshot(3, A))
    assert take(replica, RegistryChange(2, 3, [B], []), RegistryChange(0, 1, [C], [])) == [False, False]
    assert replica.clients == {"a": A}
    assert not replica.stale


def test_lost_change_makes_it_stale_until_a_snapshot_heals_it() -> None:
    """After a hole nothing is applied, not even the next change in order, until the whole registry comes."""
    replica = RegistryReplica()
    take(replica, *snapshot(1, A))
    assert take(replica, RegistryChange(2, 3, [C], [])) == [False]
    assert (replica.stale, replica.revision) == (True, 1)
    assert take(replica, RegistryChange(1, 2, [B], [])) == [False]
    assert replica.clients == {"a": A}
    assert take(replica, *snapshot(3, A, B, C)) == [True]
    assert (replica.stale, replica.revision) == (False, 3)
    assert take(replica, RegistryChange(3, 4, [], ["b"])) == [True]
    assert replica.clients == {"a": A, "c": C}


def test_a_lost_change_is_noticed_without_another_one() -> None:
    """A question of the gateway, or its status, shows that a change is missing, however long no other one comes."""
    replica = RegistryReplica()
    take(replica, *snapshot(1, A))
    requests = ServeRequests(cast(Publisher, None), replica)

    def ask(revision: int, boot: int) -> None:
        requests.add(boot, ServeRequest(1, "reply/x/", revision))

    def tell(revision: int, boot: int) -> None:
        status = Status("gateway.1", 1, 0, 1, 0, 1, {"gateway": {"revision": revision}})
        replica.note_status(make_envelope(boot=boot, sender="gateway.1", kind="status"), status)

    stale = []
    for say in (ask, tell):
        for revision, boot in ((1, 1), (2, 1), (1, 2)):
            say(revision, boot)
            stale.append(replica.stale)
            take(replica, *snapshot(1, A))
    replica.note_status(make_envelope(kind="status"), Status("ingest.1", 1, 0, 1, 0, 1, {"gateway": {"revision": 9}}))
    assert [*stale, replica.stale] == [False, True, True] * 2 + [False]


def test_change_before_any_snapshot_asks_for_one() -> None:
    """A change to a registry that is not known yet makes the replica stale."""
    replica = RegistryReplica()
    assert take(replica, RegistryChange(0, 0, [A], [])) == [False]
    assert replica.stale


def test_restarted_gateway_replaces_the_registry() -> None:
    """A gateway that begins again counts revisions from the start, and its snapshot is taken all the same."""
    replica = RegistryReplica()
    take(replica, *snapshot(50, A, B))
    assert take(replica, *snapshot(1, C), boot=2) == [True]
    assert (replica.clients, replica.revision) == ({"c": C}, 1)
    assert take(replica, RegistryChange(1, 2, [A], []), boot=2) == [True]


def test_change_of_a_restarted_gateway_is_not_mixed_in() -> None:
    """A change of a gateway whose snapshot we have not seen makes the replica stale, though its number would fit."""
    replica = RegistryReplica()
    take(replica, *snapshot(1, A))
    assert take(replica, RegistryChange(1, 2, [B], []), boot=2) == [False]
    assert replica.stale
    assert replica.clients == {"a": A}


def test_pieces_of_two_gateways_are_not_mixed() -> None:
    """A piece of a gateway that was killed is not completed by a piece of its successor."""
    replica = RegistryReplica()
    take(replica, snapshot(4, A, B, pieces=2)[0])
    assert take(replica, snapshot(4, A, C, pieces=2)[1], boot=2) == [False]
    assert replica.clients == {}


def test_snapshot_for_another_subscriber_changes_nothing() -> None:
    """A snapshot of the revision we have, sent for a late subscriber, is not taken as a change."""
    replica = RegistryReplica()
    take(replica, *snapshot(3, A))
    assert take(replica, *snapshot(3, A, pieces=2)) == [False, False]
    assert take(replica, RegistryChange(3, 4, [B], [])) == [True]


def test_snapshot_ahead_of_us_is_taken() -> None:
    """A snapshot beyond our revision is as good as the changes in between."""
    replica = RegistryReplica()
    take(replica, *snapshot(3, A))
    assert take(replica, *snapshot(5, A, B)) == [True]
    assert take(replica, RegistryChange(4, 5, [C], [])) == [False]
    assert set(replica.clients) == {"a", "b"}


@dataclass
class Played:
    """A gateway that publishes its registry, or has what it publishes lost."""

    boot: int = 1
    revision: int = 0
    clients: dict[str, Client] = field(default_factory=dict)

    def change(self, name: str, port: int) -> list[RegistrySnapshot | RegistryChange]:
        self.revision += 1
        if port == 0:
            return [
                RegistryChange(self.revision - 1, self.revision, [], [name] if self.clients.pop(name, None) else [])
            ]
        self.clients[name] = make_client(name, port)
        return [RegistryChange(self.revision - 1, self.revision, [self.clients[name]], [])]

    def snapshot(self, pieces: int) -> list[RegistrySnapshot | RegistryChange]:
        return [*snapshot(self.revision, *self.clients.values(), pieces=pieces)]


steps = st.tuples(st.sampled_from(["change", "change", "snapshot", "restart"]), st.sampled_from("abcd"))


@given(st.lists(st.tuples(steps, st.integers(0, 3), st.sampled_from([True, True, True, False]))))
def test_mirror_is_the_registry_or_knows_that_it_is_not(history: list[tuple[tuple[str, str], int, bool]]) -> None:
    """The replica holds the registry of its revision, whatever is lost, and one more snapshot brings it up to date."""
    gateway, replica = Played(), RegistryReplica()
    past = {(1, 0): dict(gateway.clients)}
    known = (0, -1)
    for (step, name), number, arrives in history:
        if step == "restart":
            gateway = Played(gateway.boot + 1)
        bodies = gateway.change(name, number) if step == "change" else gateway.snapshot(max(1, number))
        past[gateway.boot, gateway.revision] = dict(gateway.clients)
        for body in bodies[0 if arrives else 1 :]:
            if replica.apply_message(make_envelope(boot=gateway.boot), body):
                known = (gateway.boot, replica.revision)
        if known[1] >= 0:
            assert replica.revision == known[1]
            assert replica.clients == past[known]
    for body in gateway.snapshot(2):
        replica.apply_message(make_envelope(boot=gateway.boot), body)
    assert replica.clients == gateway.clients
    assert replica.revision == gateway.revision
    assert not replica.stale


def test_mirror_says_what_it_holds() -> None:
    """A revision is held from the snapshot or change that brings it, of the gateway it belongs to, unless stale."""
    replica = RegistryReplica()
    assert not replica.holds(1, 0)
    take(replica, *snapshot(3, A))
    assert [replica.holds(1, revision) for revision in (2, 3, 4)] == [True, True, False]
    assert not replica.holds(2, 1)
    take(replica, RegistryChange(4, 5, [B], []))
    assert not replica.holds(1, 3)
    take(replica, *snapshot(5, A, B))
    assert replica.holds(1, 5)

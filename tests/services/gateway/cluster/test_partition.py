"""A node that is cut off with one of three NATS servers: it promises nothing, the others go on, and all agree later."""

from contextlib import closing
from pathlib import Path

import pytest

from tests.services.gateway.cluster.nodes import Node, ServersApart, accounts_of, agree
from tests.services.gateway.talk import talk_to
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")


def test_the_minority_promises_nothing(tmp_path: Path) -> None:
    """Cut off, a node keeps its list and refuses changes; the others go on, and it has theirs once it is back."""
    with (
        ServersApart(tmp_path / "servers") as servers,
        Node(tmp_path / "a", "a", servers, only=0) as a,
        Node(tmp_path / "b", "b", servers, only=1) as b,
    ):
        a.begin()
        b.begin()
        at_a, replaced = a.register("at-a", ttl=600)["client"], a.register("replaced", ttl=600)["client"]
        at_b = b.register("at-b", ttl=600)["client"]
        agree(a, b)
        with closing(talk_to(a.gateway)) as held:
            assert held.ask("register", name="held", hold=True, ttl=600)["ok"]
            agree(a, b)
            servers.cut_off(0)
            wait_until(lambda: not accounts_of(a)["registry_connected"], "the node sees that it is cut off")
            said = ("nothing can be registered here meanwhile", "no server sends it any more")
            assert any(each in a["gateway"].text for each in said)
            wait_until(lambda: b.register("meanwhile")["ok"], "the others have a leader")
            newer = b.register("replaced", take_over=True)["client"]
            assert b.ask("renew", name="at-a", generation=at_a["generation"])["ok"], "the client has gone to b"
            assert b.ask("leave", name="at-b", generation=at_b["generation"])["ok"]
            for request in (
                {"op": "register", "name": "late"},
                {"op": "renew", "name": "replaced", "generation": replaced["generation"]},
                {"op": "leave", "name": "at-b", "generation": at_b["generation"]},
            ):
                assert a.ask(**request)["error"] == "unavailable"
            assert {*a.clients()} == {"at-a", "replaced", "at-b", "held"}, "the list that it knew last"
        servers.heal(0)
        agree(a, b)
        a.lists("at-a", "replaced", "meanwhile")
        assert a.clients()["replaced"]["generation"] == newer["generation"]
        assert a.ask("renew", name="replaced", generation=replaced["generation"])["error"] == "stale_generation"
        assert a.ask("renew", name="at-a", generation=at_a["generation"])["ok"]

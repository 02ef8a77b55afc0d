"""The registry that two nodes share: whatever one of them has answered holds at the other."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

from services.gateway.cluster.bucket_log import BucketLog
from services.gateway.cluster.keys import CLIENT, LISTED, META, SESSION, WITHHELD, stream_name, subject_of, unparse_name
from services.gateway.cluster.records import Gone, Identity, Record, Session, encode, key_of
from tests.builders import freeze_process
from tests.services.gateway.cluster.nodes import REGISTRY, Node, accounts_of, agree, in_loop
from tests.services.gateway.talk import talk_to
from tests.services.uplink.nats import NatsCluster, publish
from tests.stack import CHECKOUT, wait_until
from tests.traffic import open_receiver

pytestmark = pytest.mark.usefixtures("lab")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """One NATS server."""
    with NatsCluster(tmp_path_factory.mktemp("servers"), 1) as servers:
        yield servers


@pytest.fixture(scope="module")
def both(servers: NatsCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """Two nodes that share a registry: `b` has a forwarder too."""
    directory = tmp_path_factory.mktemp("nodes")
    with Node(directory / "a", "a", servers) as a, Node(directory / "b", "b", servers) as b:
        a.begin()
        b.begin()
        b.start("ingest")
        b.start("forwarder")
        yield a, b


@pytest.fixture
def nodes(both: tuple[Node, Node]) -> Iterator[tuple[Node, Node]]:
    """The two nodes, with an empty list before and after."""
    yield both
    a, _ = both
    for name, client in a.clients().items():
        assert a.ask("leave", name=name, generation=client["generation"])["ok"]
    agree(*both)


def test_an_entry_is_everywhere(nodes: tuple[Node, Node]) -> None:
    """An entry that one node has answered is at the other with generation and revision, and copies flow from there."""
    a, b = nodes
    receiver, _ = open_receiver("127.0.0.1", 0)
    port = receiver.getsockname()[1]
    with closing(receiver), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
        answer = a.register("siem.1 münchen", streams=["messages"], port=port)
        assert answer["ok"], answer
        agree(a, b)
        assert b.clients()["siem.1 münchen"]["generation"] == answer["client"]["generation"]
        wait_until(lambda: b.clients()["siem.1 münchen"]["health"] == "ok", lambda: str(b.clients()))
        exporter.sendto(b"by the other node", ("127.0.0.1", 6667))
        assert receiver.recv(100) == b"by the other node"


def test_ownership_holds_across_nodes(nodes: tuple[Node, Node]) -> None:
    """A name that one node has given is taken at the other; a generation that one has replaced is stale at both."""
    a, b = nodes
    first = a.register("siem", hold=False)["client"]
    refused = b.register("siem")
    assert refused["error"] == "name_taken"
    second = b.register("siem", take_over=True)["client"]
    assert second["generation"] > first["generation"]
    for node in nodes:
        assert node.ask("renew", name="siem", generation=first["generation"])["error"] == "stale_generation"
        assert node.ask("leave", name="siem", generation=first["generation"])["error"] == "stale_generation"
        assert node.ask("renew", name="siem", generation=second["generation"])["ok"]


def test_a_place_is_given_once(nodes: tuple[Node, Node]) -> None:
    """Two names can't have the same datagrams sent to one place, at any node; each node's loopback is its own."""
    a, b = nodes
    place: dict[str, Any] = {"streams": ["messages"], "port": 9600}
    assert a.register("one", address="192.0.2.1", **place)["ok"]
    assert b.register("two", address="192.0.2.1", **place)["error"] == "address_taken"
    assert a.register("three", address="127.0.0.1", **place)["ok"]
    assert b.register("four", address="127.0.0.1", **place)["ok"]
    assert b.register("five", address="127.0.0.1", **place)["error"] == "address_taken"


def test_a_lease_moves_with_the_client(nodes: tuple[Node, Node]) -> None:
    """A renewal at another node moves the lease there; without any the entry expires, once, at both."""
    a, b = nodes
    client = a.register("moving", ttl=3)["client"]
    assert client["expires_in"] > 2
    for node in (b, a, b, b):
        renewed = node.ask("renew", name="moving", generation=client["generation"])
        assert renewed["expires_in"] > 2.5, renewed
    before = a.ask("list")["revision"]
    a.lists()
    agree(a, b)
    assert a.ask("list")["revision"] == before + 1


def test_what_a_connection_holds_ends_with_it(nodes: tuple[Node, Node]) -> None:
    """An entry that a connection to one node holds is not free for others at any, and leaves all with it."""
    a, b = nodes
    with closing(talk_to(a.gateway)) as held:
        assert held.ask("register", name="held", hold=True)["ok"]
        b.lists("held")
        assert b.register("held")["error"] == "name_taken"
    b.lists()
    a.lists()


def test_a_connection_learns_that_another_node_has_ended_its_entry(
    servers: NatsCluster, nodes: tuple[Node, Node]
) -> None:
    """A take-over at another node is told as at the same one; where one lets what a connection holds expire, it is cut.

    That is what nodes do which have not heard of the connection's own for a while.
    """
    a, b = nodes
    with closing(talk_to(a.gateway)) as held:
        first = held.ask("register", name="held", hold=True)["client"]
        assert b.register("held", take_over=True)["ok"]
        told = held.read()
        assert (told["event"], told["name"], told["generation"]) == ("taken_over", "held", first["generation"])
        assert "'held' was taken over from 127.0.0.1 port" in told["message"]
        generation = held.ask("register", name="held", hold=True, take_over=True)["client"]["generation"]
        gone = Gone(by=Identity("gone", 1, 1), revision=1, name="held", generation=generation, expired=True)
        in_loop(servers, lambda client: client.request(subject_of(REGISTRY, key_of(gone)), encode(gone), 5))
        assert held.connection.recv(100) == b""
    a.lists()
    agree(a, b)


def test_watchers_go_on_at_another_node(nodes: tuple[Node, Node]) -> None:
    """Events of all nodes come to a watcher of any, each with the next revision, and it may go on at another node."""
    a, b = nodes
    with closing(talk_to(b.gateway)) as watcher:
        answer = watcher.ask("watch")
        revision, epoch = answer["revision"], answer["epoch"]
        first = a.register("first")["client"]
        b.register("second")
        a.ask("leave", name="first", generation=first["generation"])
        events = [each for each in watcher.follow(revision + 3) if each["event"] != "health"]
        named = [(each["event"], each.get("name") or each["client"]["name"]) for each in events]
        assert named == [("joined", "first"), ("joined", "second"), ("left", "first")]
        assert [each["revision"] for each in events] == [revision + 1, revision + 2, revision + 3]
    with closing(talk_to(a.gateway)) as watcher:
        assert "clients" not in watcher.ask("watch", revision=revision + 1, epoch=epoch)
        assert [watcher.read()["event"], watcher.read()["event"]] == ["joined", "left"]


def test_withholding_is_of_the_name_at_all_nodes(nodes: tuple[Node, Node]) -> None:
    """An order that one node was given holds at the other, for an entry that signs up later too, until its end."""
    a, b = nodes
    assert a.register("siem", streams=["messages"], port=9601)["ok"]
    assert b.ask("withhold", name="siem", reason="noise")["client"]["withheld"]["reason"] == "noise"
    agree(a, b)
    assert a.register("siem", streams=["messages"], port=9602, take_over=True)["receives"] is False
    agree(a, b)
    assert a.ask("release", name="siem")["client"]["withheld"] is None
    agree(a, b)


def test_the_names_protocol_is_of_all_nodes(nodes: tuple[Node, Node]) -> None:
    """A name that signs up by itself gets the list of all nodes."""
    a, b = nodes
    a.register("by-json")
    b.lists("by-json")
    with socket.create_connection(("127.0.0.1", b.gateway)) as connection:
        connection.sendall(b"by-name")
        connection.settimeout(30)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert {*json.loads(answer)} == {"by-json", "by-name"}
    a.lists("by-json", "by-name")


def test_records_of_others_are_set_aside(servers: NatsCluster, nodes: tuple[Node, Node]) -> None:
    """Records that no gateway wrote are counted, and neither change the list nor stop it, by whatever number."""
    a, b = nodes
    kept = a.register("kept", ttl=600)["client"]
    agree(a, b)
    before = [accounts_of(node)["registry_damaged"] for node in nodes]
    values = [b"", b"{}", b"\xff", b'{"kind": "gone"}', b"[" * 20_000]
    by = Identity("x", 1, 1)
    bad: list[Record] = [
        Gone(by=by, revision=(1 << 62) - 1, name="none", generation=1),
        Gone(by=by, revision=1, name="nobody", generation=1 << 62),
        Session(node="x", boot=1, count=1, live=False, revision=1 << 62, generation=1 << 62),
    ]

    async def write(client: Client) -> None:
        for number, value in enumerate(values):  # each under a key of its own: one may be replaced before it is read
            await client.request(subject_of(REGISTRY, f"list.client.{unparse_name(f'kept {number}')}"), value, 5)
        for record in bad:
            await client.request(subject_of(REGISTRY, key_of(record)), encode(record), 5)

    in_loop(servers, write)
    publish(servers.each[0], b"PUB %s\xff 1\r\nx\r\n" % subject_of(REGISTRY, "list.client.").encode())
    wait_until(
        lambda: [accounts_of(node)["registry_damaged"] for node in nodes] == [count + 9 for count in before],
        lambda: str([accounts_of(node) for node in nodes]),
    )
    for node in nodes:
        node.lists("kept")
        assert "a record of the cluster's registry can't be read" in node["gateway"].text
    assert a.ask("renew", name="kept", generation=kept["generation"])["ok"]
    assert b.register("next")["ok"]
    agree(a, b)


@pytest.mark.parametrize("content", [b"", b"x"], ids=["deleted", "garbage"])
def test_what_is_overwritten_is_written_again(
    servers: NatsCluster, nodes: tuple[Node, Node], tmp_path: Path, content: bytes
) -> None:
    """Nodes write again what somebody deletes or replaces of theirs, and a node that starts has it.

    So do entries, orders, sessions, and the list's identity.
    """
    a, b = nodes
    kept = a.register("kept", ttl=600, streams=["messages"], port=9600, address="192.0.2.1")["client"]
    assert a.ask("withhold", name="kept")["ok"]
    before, keys = a.ask("list"), ["list.client.kept", "list.withheld.kept", f"{SESSION}a", META]

    async def overwrite(client: Client) -> None:
        headers = {} if content else {"KV-Operation": "DEL"}  # as `nats kv del` does
        for key in keys:
            await client.request(subject_of(REGISTRY, key), content, 5, headers=headers)

    in_loop(servers, overwrite)

    async def restored(client: Client) -> bool:
        found = [
            await client.jetstream().get_last_msg(stream_name(REGISTRY), subject_of(REGISTRY, key)) for key in keys
        ]
        return all(each.data not in (None, content) for each in found)

    wait_until(lambda: in_loop(servers, restored), "all is written again")
    agree(a, b)
    with Node(tmp_path / "c", "c", servers) as c:
        c.begin()
        agree(a, b, c)
        after = c.ask("list")
        assert (after["epoch"], after["withheld"]) == (before["epoch"], before["withheld"])
        assert c.clients()["kept"]["generation"] == kept["generation"]
        assert c.ask("renew", name="kept", generation=kept["generation"])["ok"]
    assert a.ask("release", name="kept")["ok"]


def test_a_killed_gateway_comes_back(servers: NatsCluster, tmp_path: Path) -> None:
    """A gateway that is killed has its entries when it is back; what its connections held is free for their clients."""
    with Node(tmp_path / "c", "c", servers) as c, Node(tmp_path / "d", "d", servers) as d:
        c.begin()
        d.begin()
        held = talk_to(c.gateway)
        assert held.ask("register", name="held-at-c", hold=True)["ok"]
        lasting = c.register("lasting", ttl=600)["client"]
        d.lists("held-at-c", "lasting")
        c["gateway"].stop(signal.SIGKILL)
        held.close()
        c.start("gateway")
        c.takes_part()
        agree(c, d)
        assert d.clients()["held-at-c"]["expires_in"] is not None
        assert d.register("held-at-c", hold=False)["ok"]
        assert c.ask("renew", name="lasting", generation=lasting["generation"])["ok"]
        for name, client in d.clients().items():
            assert d.ask("leave", name=name, generation=client["generation"])["ok"]


@pytest.mark.soak
def test_a_home_that_slept_expires_nothing_renewed_since(
    servers: NatsCluster, both: tuple[Node, Node], tmp_path: Path
) -> None:
    """A gateway that stands still beyond its session and a lease, and goes on, leaves what was renewed elsewhere."""
    gone = "a node has gone: its clients' leases are measured by another one"
    with Node(tmp_path / "i", "i", servers) as i, Node(tmp_path / "j", "j", servers) as j:
        i.begin()
        j.begin()
        client = i.register("renewed", ttl=12)["client"]
        i.register("silent", ttl=12)
        agree(i, j)
        freeze_process(i["gateway"].process, "the gateway")
        # Not that of a node of an earlier test, which may have had no time to end it.
        wait_until(
            lambda: any(line["node"] == "i" for node in (*both, j) for line in node["gateway"].events(gone)),
            "some node has ended the session",
        )
        assert j.ask("renew", name="renewed", generation=client["generation"])["ok"]
        i["gateway"].process.send_signal(signal.SIGCONT)
        for _ in range(20):
            renewed = j.ask("renew", name="renewed", generation=client["generation"])
            assert renewed["ok"], renewed
            time.sleep(0.5)
        wait_until(lambda: {*i.clients()} == {*j.clients()} == {"renewed"}, lambda: f"{i.clients()} {j.clients()}")
        assert i.ask("leave", name="renewed", generation=client["generation"])["ok"]


def test_a_lost_bucket_is_made_anew(servers: NatsCluster, nodes: tuple[Node, Node]) -> None:
    """After the bucket was deleted, the nodes that run write it anew: no entry and no order is lost."""
    a, b = nodes
    generation = a.register("kept", streams=["messages"], port=9603)["client"]["generation"]
    assert b.register("other")["ok"]
    assert b.ask("withhold", name="kept")["ok"]
    agree(a, b)
    before = a.ask("list")["revision"]

    async def delete(client: Client) -> None:
        await client.request(f"$JS.API.STREAM.DELETE.{stream_name(REGISTRY)}", b"", 5)

    in_loop(servers, delete)
    for node in nodes:
        node["gateway"].wait_for("the bucket of the cluster's registry was lost")
    wait_until(lambda: a.ask("list")["revision"] > before, "it is written anew")
    wait_until(lambda: b.register("late")["ok"], "the registry can be written")
    agree(a, b)
    a.lists("kept", "other", "late")
    assert a.clients()["kept"]["generation"] == generation
    assert a.clients()["kept"]["withheld"] is not None
    assert a.ask("release", name="kept")["ok"]
    agree(a, b)


@pytest.mark.parametrize("purged", [LISTED, f"{CLIENT}>", f"{WITHHELD}>"])
def test_what_somebody_purges_is_written_anew(
    servers: NatsCluster, nodes: tuple[Node, Node], tmp_path: Path, purged: str
) -> None:
    """Entries or orders that are purged by hand are missed, though nobody changes anything, and are written again."""
    a, b = nodes
    generation = a.register("kept", streams=["messages"], port=9605, address="192.0.2.1")["client"]["generation"]
    assert b.ask("withhold", name="kept")["ok"]  # so the last record of the list is an order
    agree(a, b)
    keys = [f"{CLIENT}kept", f"{WITHHELD}kept"]

    async def purge(client: Client) -> None:
        what = json.dumps({"filter": subject_of(REGISTRY, purged)}).encode()
        answer = await client.request(f"$JS.API.STREAM.PURGE.{stream_name(REGISTRY)}", what, 5)
        assert json.loads(answer.data)["purged"]

    in_loop(servers, purge)

    async def restored(client: Client) -> bool:
        return all([await BucketLog(client, REGISTRY, "_INBOX_test").has(key) for key in keys])

    wait_until(lambda: in_loop(servers, restored), "all is written again")
    agree(a, b)
    with Node(tmp_path / "c", "c", servers) as c:
        c.begin()
        agree(a, b, c)
        assert c.clients()["kept"]["generation"] == generation
        assert c.clients()["kept"]["withheld"] is not None
    assert a.ask("release", name="kept")["ok"]


def test_a_bucket_of_a_backup_gets_what_the_nodes_have(tmp_path: Path) -> None:
    """Servers come back with an older bucket, as of a backup: what was answered since is written again, by all nodes.

    So it is where a node learns of it only once others have written more than the bucket had.
    """
    with (
        NatsCluster(tmp_path / "servers", 1) as servers,
        Node(tmp_path / "a", "a", servers) as a,
        Node(tmp_path / "b", "b", servers) as b,
    ):
        (server,) = servers.each
        a.begin()
        assert a.register("old")["ok"]
        server.stop(signal.SIGTERM)
        shutil.copytree(server.directory / "jetstream", tmp_path / "backup")
        server.start()
        a.takes_part()
        b.begin()
        generation = b.register("new", streams=["messages"], port=9604)["client"]["generation"]
        agree(a, b)
        server.stop()
        shutil.rmtree(server.directory / "jetstream")
        shutil.copytree(tmp_path / "backup", server.directory / "jetstream")
        freeze_process(b["gateway"].process, "the gateway")
        server.start()
        a["gateway"].wait_for("the bucket of the cluster's registry was lost, or is an older one")
        for number in range(40):
            wait_until(lambda: a.register(f"more {number}")["ok"], "the registry can be written")  # noqa: B023
        b["gateway"].process.send_signal(signal.SIGCONT)
        b["gateway"].wait_for("the bucket of the cluster's registry was lost, or is an older one")
        agree(a, b)
        with Node(tmp_path / "c", "c", servers) as c:
            c.begin()
            agree(a, b, c)
            assert len(c.clients()) == 42
            assert c.clients()["new"]["generation"] == generation


def test_without_the_servers_nothing_is_promised(tmp_path: Path) -> None:
    """With no server the list stays, also over a restart, and changes are refused; later all goes on as it was."""
    with NatsCluster(tmp_path / "servers", 1) as servers, Node(tmp_path / "a", "a", servers) as a:
        a.begin()
        client = a.register("kept", ttl=2)["client"]
        (server,) = servers.each
        server.stop()
        wait_until(lambda: not accounts_of(a)["registry_connected"], "the gateway sees that the server has gone")
        for request in (
            {"op": "register", "name": "late"},
            {"op": "renew", "name": "kept", "generation": client["generation"]},
            {"op": "leave", "name": "kept", "generation": client["generation"]},
        ):
            answer = a.ask(**request)
            assert answer["error"] == "unavailable"
            assert "the cluster has no quorum, or can't be reached from this node" in answer["message"]
        a.lists("kept")
        a["gateway"].stop()
        a.start("gateway")
        a.lists("kept")
        server.start()
        a.takes_part()
        a.lists()  # its lease has passed
        assert a.register("again")["ok"]


@pytest.mark.parametrize("nodes", ["", 'nodes = ["e", "f"]'])
def test_settings_of_all_nodes_make_one_entry(servers: NatsCluster, tmp_path: Path, nodes: str) -> None:
    """A collector that several nodes have in their settings is one entry; its maker can remove it by a reload.

    That holds also at a loopback address, which only one node of a cluster can reach: it is the maker's.
    """
    collector = '[[collector]]\nname = "fixed"\nstreams = ["messages"]\naddress = "127.0.0.9"\nport = 9700\n'
    with (
        Node(tmp_path / "e", "e", servers, nodes, collector) as e,
        Node(tmp_path / "f", "f", servers, nodes, collector) as f,
    ):
        e.begin()
        e.lists("fixed")
        made = e.clients()["fixed"]["generation"]
        f.begin()
        agree(e, f)
        assert f.clients()["fixed"]["generation"] == made
        assert f.register("fixed")["error"] == "name_taken"
        e.configure(e.settings.replace(collector, ""))
        e["gateway"].reload()
        f.lists()


def test_a_host_of_its_own_loads_nothing_of_it() -> None:
    """A gateway without the setting loads nothing of NATS, of asking it, or of the cluster."""
    script = "import sys, services.gateway.__main__, services.gateway.server; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "services.gateway.server" in loaded
    assert {"nats", "nkeys", "services.gateway.cluster", "shared.nats.access", "shared.nats.connection"} & {
        *loaded
    } == set()


def test_two_gateways_of_one_name_do_not_both_take_part(servers: NatsCluster, tmp_path: Path) -> None:
    """The gateway that was started last has the name; the other one says so, and promises nothing."""
    with Node(tmp_path / "g", "g", servers) as first, Node(tmp_path / "h", "g", servers) as second:
        first.begin()
        second.begin()
        first["gateway"].wait_for("another gateway is node g: set another [uplink] site")
        assert second.register("mine")["ok"]
        answer = first.register("late")
        assert answer["error"] == "unavailable"
        second["gateway"].stop()
        first["gateway"].wait_for("no other gateway has the name of this node any more")
        second.start("gateway")
        second.takes_part()
        client = second.clients()["mine"]
        assert second.ask("leave", name="mine", generation=client["generation"])["ok"]

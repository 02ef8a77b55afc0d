from dataclasses import replace

import msgspec

from services.console.history import STEP_SECONDS, STEPS, History
from services.console.views import FLOW_COLLECTORS, MAX_ROWS, Wish, flow, show
from shared.bus.bodies.nodes_message import Node, Nodes
from tests.services.console.told import HOSTILE, busy, client, observe


def test_a_page_gets_what_it_wished_for() -> None:
    """Rows come sorted and filtered as asked; what is not known is null, and losses are those of the account."""
    picture = busy()
    view = show(picture, History(), Wish(), 0.0, whole=True)
    assert msgspec.json.decode(msgspec.json.encode(view)).keys() == view.keys()
    names = [row["name"] for row in view["collectors"]["rows"]]
    assert names == ["siem", HOSTILE]
    assert [row["lost"] for row in view["collectors"]["rows"]] == [7, 10]
    by_loss = show(picture, History(), Wish(collectors="lost"), 0.0, whole=False)
    assert [row["name"] for row in by_loss["collectors"]["rows"]] == [HOSTILE, "siem"]
    filtered = show(picture, History(), Wish(text="IMG SRC"), 0.0, whole=False)
    assert (filtered["collectors"]["all"], filtered["collectors"]["found"]) == (2, 1)
    assert view["collectors"]["rows"][0]["rate"] is None
    assert {(loss["place"], loss["of"], loss["lost"]) for loss in view["losses"]} == {
        ("network", "siem", 7),
        ("way out", HOSTILE, 10),
        ("bus", "syslog", 10),
        ("journal", "syslog", 10),
    }
    assert show(picture, History(), Wish("nonsense", "nonsense"), 0.0, whole=False)["collectors"]["found"] == 2


def test_the_journal_and_whom_it_owes() -> None:
    """A row of the journal names collectors that are owed some of it, and theirs tells how much."""
    view = show(busy(), History(), Wish(), 0.0, whole=False)
    (kept,) = view["journal"]
    assert (kept["stream"], kept["limit"], kept["since"], kept["failing"]) == ("syslog", 99, 10.0**9, False)
    assert kept["owed"] == [{"collector": HOSTILE, "datagrams": 5}]
    owed = {row["name"]: row["owed"] for row in view["collectors"]["rows"]}
    assert owed == {"siem": [], HOSTILE: [{"stream": "syslog", "datagrams": 5, "since": 7.0, "level_in": None}]}


def test_the_nodes_of_a_cluster() -> None:
    """A node's page has each node's state, when it was heard, how far it is behind, and how many it serves."""
    assert show(busy(), History(), Wish(), 0.0, whole=False)["nodes"] is None
    nodes = Nodes(False, [Node("a", "live", 0), Node("b", "silent", 2500, 7), Node("c", "silent")], ("a",))
    view = show(replace(busy(), nodes=nodes, served={"a": 2}), History(), Wish(), 0.0, whole=False)["nodes"]
    assert view["majority"] is False
    assert [tuple(row.values()) for row in view["rows"]] == [
        ("a", "live", 0.0, 0, 2),
        ("b", "silent", 2.5, 7, 0),
        ("c", "silent", None, 0, 0),
    ]


def test_many_collectors_are_a_few_rows_and_nodes() -> None:
    """Of 10,000 collectors a page gets those that it asked for, and the diagram has one node for the rest."""
    clients = [client(f"c{number:05}", number) for number in range(10_000)]
    account = {"expected": 5, "offered": 5, "sent": 5}
    picture = observe(clients, {"forwarder.1": {f"collector/{each.name}": account for each in clients}}).picture(1.0)
    view = show(picture, History(), Wish(text="c0999"), 0.0, whole=True)
    assert (view["collectors"]["all"], view["collectors"]["found"]) == (10_000, 10)
    assert len(show(picture, History(), Wish(), 0.0, whole=True)["collectors"]["rows"]) == MAX_ROWS
    ends = flow(picture)["collectors"]
    assert (len(ends), ends[-1]["name"], ends[-1]["count"]) == (FLOW_COLLECTORS + 1, None, 10_000 - FLOW_COLLECTORS)


def test_the_past_is_kept_for_a_quarter_of_an_hour() -> None:
    """Each step adds a rate, unknown ones as none; older ones go, and so does what is no longer there."""
    history, picture = History(), busy()
    assert history.note(picture)
    assert not history.note(picture)
    assert history.rates("exporter", "10.0.0.3") == [30.0]
    assert history.rates("collector", "siem") == [None]
    for step in range(STEPS + 5):
        history.note(replace(picture, at=picture.at + (step + 1) * STEP_SECONDS))
    assert len(history.rates("exporter", "10.0.0.3")) == STEPS
    history.forget_exporters()
    assert history.rates("exporter", "10.0.0.3") == []
    assert len(history.losses("stream", "syslog")) == STEPS

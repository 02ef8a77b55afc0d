import doctest
import re
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from services.operator.top import terminal, views
from services.operator.top.screen import draw
from services.operator.top.state import KEYS, ScreenState
from services.operator.top.terminal import split_keys
from services.operator.top.views import VIEWS, lines, select
from shared.bus.bodies.nodes_message import Node, Nodes
from shared.client import Client
from shared.losses import Loss
from shared.monitoring.journal import KeptStream, Owed
from shared.monitoring.picture import Collector, Exporter, Picture, RecentLoss, Service, Stream, Verdict

HOSTILE = "<img>[red]\x1b[2Jé漢"


def collector(number: int, name: str = "", **changes: object) -> Collector:
    """Make a collector that gets as many copies a second as its number says."""
    client = Client(name or f"c{number}", streams=("syslog",), generation=number, address="192.0.2.1", port=9514)
    fields = {
        "health": "ok",
        "since": 40.0,
        "sender": "forwarder.1",
        "sent": 1000 * number,
        "rate": float(number),
        "byte_rate": 100.0 * number,
        "bytes": 100_000 * number,
        "expected": 1000 * number,
        "kept_back": 0,
        "by_kernel": 0,
        "templates": 0,
        "withheld": 0,
        "held": 0,
        "lost": number,
        "lost_rate": 0.0,
        "causes": {"refused": number} if number else {},
        "recent": 0,
    }
    return Collector(client, **(fields | changes))  # type: ignore[arg-type]


def picture(count: int = 3, **changes: object) -> Picture:
    """Make a picture of one stream, so many collectors and an exporter."""
    service = Service("ingest.1", 7, 0.0, 99.0, False, 1, 1, 9, 0, None, {})
    stream = Stream("syslog", 4000, 12.5, 900.0, 4000, 0, 0, 3, 0.0, {"memory": 3}, ("c1", "c2"), (), 1)
    fields = {
        "at": 100.0,
        "verdict": Verdict("warning", ("slow: c1",)),
        "balanced": True,
        "discrepancies": (),
        "streams": (stream,),
        "collectors": tuple(map(collector, range(count))),
        "exporters": (Exporter("10.1.1.1", 12.5, 900.0, 1.0, ("syslog",), ("ingest.1",), 2, {"syslog": 12.5}, 5),),
        "services": (service,),
        "losses": (RecentLoss(Loss("ingest", "ingest.1", "syslog", 3, "memory"), 2),),
        "kept": (KeptStream("syslog", "journal.1", {"kept_bytes": 5, "dropped_disk_full": 7}, 50),),
    }
    return Picture(**(fields | changes))  # type: ignore[arg-type]


def shown(frame: str) -> list[str]:
    """Return the lines of a frame without what is for the terminal."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", frame).split("\n")]


def press(*keys: str, start: ScreenState | None = None) -> ScreenState:
    """Return the state after some keys."""
    pressed = start or ScreenState()
    for key in keys:
        pressed.press(key)
    return pressed


@pytest.mark.parametrize("module", [views, terminal])
def test_examples_in_the_docstrings_hold(module: ModuleType) -> None:
    """The modules' own examples give what they say."""
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("key", ["1", "2", "3", "4", "5"])
@pytest.mark.parametrize("mode", ["", "t"])
def test_a_frame_fits(width: int, key: str, mode: str) -> None:
    """At any width no line is wider and no frame is higher; the first column and the one of the order are there."""
    hostile = picture(5, collectors=(collector(9, HOSTILE), *map(collector, range(30))))
    chosen = press(key, *mode)
    for _ in range(10):
        frame = shown(draw(chosen, hostile, width, 24))
        assert len(frame) <= 24
        assert [line for line in frame if cell_len(line) > width] == []
        names = frame[4]
        assert names.startswith(chosen.view.columns[0].name)
        assert chosen.view.columns[chosen.sorting.by].name in names
        chosen.press("s")


def test_wide_and_narrow() -> None:
    """A wide terminal has every column; a narrow one has health, rate and losses."""
    wide, narrow = (shown(draw(press("3"), picture(), width, 24)) for width in (200, 80))
    names = "collector health for per s▼ bit/s held behind level in lost/s lost lately lost by streams address source"
    assert " ".join(wide[4].split()) == names
    assert wide[5].split()[:5] == ["c2", "ok", "60", "s", "2"]
    assert {"collector", "health", "s▼", "lost/s"} <= {*narrow[4].split()}
    assert wide[:3][1:] == ["slow: c1", "1 service, 12 datagrams/s in, 3 copies/s out, 2 lost in 5 min"]
    assert wide[3].split() == ["1", "streams", "1", "2", "exporters", "1", "3", "collectors", "3", "4", "journal", "1"]


def test_nodes_of_a_cluster() -> None:
    """A node of a cluster has a view of them all; elsewhere it is not named, and empty."""
    nodes = Nodes(True, [Node("a", "live", 0), Node("b", "silent", 2500, 7), Node("c", "silent")], ("a",))
    told = picture(nodes=nodes, served={"a": 2, "c": 1})
    frame = shown(draw(press("5"), told, 100, 24))
    assert frame[3].endswith("5 nodes 3")
    assert [line.split() for line in frame[4:8]] == [
        ["node", "state", "silent", "for", "behind", "collectors▼"],
        ["a", "live", "0", "s", "0", "2"],
        ["c", "silent", "?", "0", "1"],
        ["b", "silent", "2", "s", "7", "0"],
    ]
    assert "node\tb\tstate=silent\tsilent_for=2.5\tbehind=7\tcollectors=0" in lines(told)
    assert shown(draw(press("5"), picture(), 100, 24))[3].endswith("5 nodes ?")
    assert "nodes" not in shown(draw(press("1"), picture(), 100, 24))[3]


def test_names_are_text() -> None:
    """A name that looks like markup, or has what a terminal would obey, is shown as text."""
    frame = draw(press("3"), picture(collectors=(collector(1, HOSTILE),)), 200, 24)
    assert "\x1b[2J" not in frame
    assert r"<img>[red]\x1b[2Jé漢" in shown(frame)[5]


def test_what_is_not_known_is_no_zero() -> None:
    """A value that nobody has reported is a question mark, and sorts behind all that is known, either way."""
    unknown = collector(7, rate=None, sent=None, since=None, byte_rate=None, lost_rate=None, held=None, lost=None)
    some = picture(collectors=(unknown, collector(1), collector(2)))
    for keys, order in (("3", ["c2", "c1", "c7"]), ("3r", ["c1", "c2", "c7"])):
        assert [line.split()[0] for line in shown(draw(press(*keys), some, 120, 24))[5:8]] == order
    assert shown(draw(press("3"), some, 120, 24))[7].split()[:5] == ["c7", "ok", "?", "?", "?"]
    nothing = picture(collectors=None, exporters=None, streams=())
    assert "2 exporters ?   3 collectors ?" in shown(draw(press("3"), nothing, 120, 24))[3]
    assert "? datagrams/s in, ? copies/s out" in shown(draw(press("3"), nothing, 120, 24))[2]


def test_a_thousand_rows_are_scrolled() -> None:
    """Of very many rows those on the screen are drawn; keys move over them and stop at the ends."""
    many, chosen = picture(1000), press("3")

    def first_and_last() -> tuple[str, str]:
        rows = shown(draw(chosen, many, 120, 24))[5:-1]
        assert len(rows) == 18
        return rows[0].split()[0], rows[-1].split()[0]

    assert first_and_last() == ("c999", "c982")
    for key, seen in (
        ("down", ("c998", "c981")),
        ("page down", ("c980", "c963")),
        ("end", ("c17", "c0")),
        ("j", ("c17", "c0")),
        ("k", ("c18", "c1")),
        ("home", ("c999", "c982")),
        ("up", ("c999", "c982")),
    ):
        chosen.press(key)
        assert first_and_last() == seen
    chosen.press("end")
    assert len(shown(draw(chosen, picture(2), 120, 24))) == 8  # the rows have become few
    assert "rows 1 to 18 of 1000" in shown(draw(press("3"), many, 120, 24))[3]
    assert len(shown(draw(press("3"), many, 120, 0))) == 1006  # all of them, for a scrollback


def test_filter() -> None:
    """Text behind `/` leaves the rows that have it in any cell; Enter keeps it, Esc and Backspace take it back."""
    chosen, many = press("3", "/", *"C99"), picture(1000)
    assert shown(draw(chosen, many, 120, 24))[-1] == "filter: C99_"
    assert '"C99": 11' in shown(draw(chosen, many, 120, 24))[3]
    press("\x7f", "\n", "q", start=chosen)
    assert chosen.ended
    assert '"C9": 111' in shown(draw(chosen, many, 120, 24))[3]
    press("escape", start=chosen)
    assert "rows 1 to 18 of 1000" in shown(draw(chosen, many, 120, 24))[3]
    assert press("/", "x", "escape").filter == ""


def test_keys() -> None:
    """Views follow each other, the order goes from column to column that the mode has, help and pause are seen."""
    assert [press(*["\t"] * count).view.name for count in range(6)] == [
        *("streams", "exporters", "collectors", "journal", "nodes", "streams")
    ]
    chosen = press("s", "s")
    assert chosen.view.columns[chosen.sorting.by].name == "exporters"
    assert press("S", start=press()).sorting.by == 0
    assert not press("S").sorting.descending  # text from a to z
    assert chosen.view.columns[press("t").sorting.by].name == "received"
    assert chosen.view.columns[press("t", "t").sorting.by].name == "per s"
    assert "paused" in shown(draw(press("p"), picture(), 120, 24))[0]
    helped = "\n".join(shown(draw(press("?"), picture(), 80, 24)))
    assert all(keys in helped and does in helped for keys, does in KEYS)
    assert not press("?", "x").helping
    assert press("?", "q").ended
    assert shown(draw(ScreenState(), None, 80, 24, "no broker at /x"))[0].startswith("fanwire  no broker at /x")


@given(st.lists(st.sampled_from([*"123sSr/tp?hjk\t\n\x7f", "up", "down", "page up", "end", "escape"]), max_size=30))
def test_any_keys_give_a_frame(keys: list[str]) -> None:
    """After any keys there is a frame of the terminal's size."""
    chosen = ScreenState()
    for key in keys:
        chosen.press(key)
        frame = shown(draw(chosen, picture(40), 80, 12))
        assert len(frame) <= 12
        assert max(map(cell_len, frame)) <= 80


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR nothing is coloured; what is bold or reversed stays."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|9\d)[;m]")
    assert colour.search(draw(ScreenState(), picture(), 80, 24))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(draw(ScreenState(), picture(), 80, 24))


def test_lines_for_programs() -> None:
    """Each row is a line of kind, name and NAME=VALUE between tabs; what is not known is left out."""
    owed = (Owed("a\tb", "syslog", 70, 1.0, 9.0),)
    some = picture(collectors=(collector(2, "a\tb", rate=None, owed=owed),))
    assert lines(some) == [
        "fanwire\twarning\tslow: c1",
        "stream\tsyslog\tper_s=12.5\treceived=4000\tbit/s=7200\texporters=1\tcollectors=2\tlost/s=0\tlost=3\t"
        "lost_by=memory 3",
        "exporter\t10.1.1.1\tper_s=12.5\tbit/s=7200\tshare=1\tgaps=5\tcollectors=2\tstreams=syslog\tworkers=ingest.1",
        "collector\ta\\tb\thealth=ok\tfor=60\tsent=2000\tbit/s=1600\theld=0\tbehind=70\tlevel_in=9\t"
        "lost/s=0\tlost=2\tlost_lately=0\tlost_by=refused 2\tstreams=syslog\taddress=192.0.2.1 port 9514\tsource=relay",
        "journal\tsyslog\tbytes=5\tof_limit=0.1\towed=70\tnot_kept=disk_full 7\tservice=journal.1",
    ]


def test_pasted_text_is_many_keys() -> None:
    """Keys that come together are told apart, sequences of a terminal among them; unknown ones are ignored."""
    assert split_keys("\x1bOA\x1b[1;5Cé") == ["up", "\x1b[1;5C", "é"]
    assert press(*split_keys("\x1b[1;5C")) == ScreenState()


def test_text_is_sorted_as_text() -> None:
    """Rows are in the order of a column of text too."""
    rows = VIEWS[2].rows(picture(12)) or []
    assert [row[0] for row in select(rows, "", 0, descending=False)][:3] == ["c0", "c1", "c10"]

import os
import re
import sys
from types import SimpleNamespace

import pytest

from services.operator.cli.progress import Progress
from services.operator.cli.text_tables import print_table

COLUMNS = ("service", "collector", "expected", "filtered", "sampled out", "withheld", "cause")
ROWS = [
    ("forwarder.1", "siem", 1_000_000, 0, 0, 0, "buffer_full 7, no_neighbour 12"),
    ("forwarder.1", "[red]archive", 2_000_000, 0, 0, 0, None),
]


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    """Print the table on a terminal of this width; return its lines."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((width, 24)))
    print_table("Collectors", COLUMNS, ROWS, ("expected", "filtered"))
    lines = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out).splitlines()
    assert [line for line in lines if len(line) > width] == []
    return lines


def test_a_table_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide terminal has all columns and their totals; a narrow one no columns of zeros; else rows are paragraphs."""
    wide = [line.split() for line in printed(capsys, monkeypatch, 200)]
    assert ["total", "3000000", "0"] in wide
    assert ["forwarder.1", "[red]archive", "2000000", "0", "0", "0"] in wide
    narrow = [line.split() for line in printed(capsys, monkeypatch, 60)]
    assert ["service", "collector", "expected", "cause"] in narrow
    assert ["total", "3000000"] in narrow
    assert ["forwarder.1", "[red]archive", "2000000"] in narrow
    paragraphs = printed(capsys, monkeypatch, 40)
    assert paragraphs[:5] == [
        "Collectors",
        "",
        "  service      forwarder.1",
        "  collector    siem",
        "  expected     1000000",
    ]


def test_a_file_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere than on a terminal a row is a line, however long."""
    print_table("Long", ("name", "why"), [("a", "word " * 40)])
    assert any("word " * 39 in line for line in capsys.readouterr().out.splitlines())


def test_progress_is_for_terminals_and_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count is shown after a second, at most ten times a second, and is gone at the end; else nothing is written."""
    clock, said = [0.0], list[str]()
    terminal = SimpleNamespace(isatty=lambda: True, write=said.append, flush=lambda: None)
    monkeypatch.setattr("services.operator.cli.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("names looked up") as progress:
        for at in (0.5, 1.0, 1.05, 1.5):
            clock[0] = at
            progress.show(int(at * 100))
    assert said == ["\r\x1b[K100 names looked up", "\r\x1b[K150 names looked up", "\r\x1b[K"]
    said.clear()
    terminal.isatty = lambda: False
    with Progress("names looked up") as progress:
        clock[0] = 9.0
        progress.show(1)
    assert said == []

"""The READMEs keep their word: each thing is defined once, all code in them is run, and sentences stay short."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import msgspec
import pytest

from services.console.metrics import exporter_metrics, stack_metrics
from services.gateway import counters as gateway_counters
from services.gateway.protocol.requests import OPERATIONS, ErrorWord, Operation
from services.gateway.registry.condition import Word
from services.gateway.render import EntryView
from services.operator.__main__ import COMMANDS
from services.operator.client.lease import PASSING
from services.operator.commands.running.ready import OPTIONAL, SERVICES
from services.transmitter import raw_frames
from shared.bus.bodies.nodes_message import Node, Nodes
from shared.ledger import accounts, counters
from shared.log import EVENTS
from shared.settings.entries import Collector, Token
from shared.settings.file import render
from shared.settings.model import DEFAULT_STREAM, Settings
from shared.settings.opt_in import OPT_IN
from shared.settings.values import SCOPES
from tests.documents import FRONT, SHOWN, blocks, defined, exists, pages, prose, sentences, tables, text, words
from tests.services.console.told import busy
from tests.stack import CHECKOUT

FRONT_LINES, ARCHITECTURE_LINES, COLUMNS = 200, 130, 120
SENTENCE_WORDS = 30
BLOCKS_SHOWN = 1
"""Transcripts, and what takes a machine of its own: grows only by something that no test can run."""


def test_front_page_is_short() -> None:
    """The front page has at most 200 lines."""
    assert len(text(FRONT).splitlines()) <= FRONT_LINES


@pytest.mark.parametrize("page", pages())
def test_lines_are_wrapped(page: str) -> None:
    """No line of a README has over 120 columns, but for code and rows of tables."""
    assert [line for line in prose(page).splitlines() if len(line) > COLUMNS and not line.startswith("|")] == []


def test_architecture_is_short_and_names_what_there_is() -> None:
    """ARCHITECTURE.md has at most 130 lines, no long sentence, and no path or module that the tree does not have."""
    page = "ARCHITECTURE.md"
    assert len(text(page).splitlines()) <= ARCHITECTURE_LINES
    assert [sentence for sentence in sentences(page) if words(sentence) > SENTENCE_WORDS] == []
    paths = re.findall(r"`((?:services|shared|deploy|tests)/[\w./]+)`", text(page))
    assert [path for path in paths if not _is_there(path)] == []
    for (first, *_), *rows in tables(page):
        for folder, _, *cells in rows if first == "folder" else ():
            modules = [f"{folder.strip('`')}/{name}" for cell in cells for name in re.findall(r"`([\w/]+)`", cell)]
            assert [module for module in modules if not _is_there(module)] == []


@pytest.mark.parametrize("page", pages())
def test_sentences_are_short(page: str) -> None:
    """No sentence of any README, nor any cell of its tables, has over 30 words."""
    assert [sentence for sentence in sentences(page) if words(sentence) > SENTENCE_WORDS] == []


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link is to a file of the repository, and to a heading in it."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert [link for link in links if "://" not in link and not exists(page, link)] == []


def test_all_code_is_run() -> None:
    """A test asks for every block of code of every README, by page and name, but for those that are only shown."""
    run = {
        found for path in (CHECKOUT / "tests").rglob("test_*.py")
        for found in re.findall(r'block\(\s*"([^"]+)",\s*"([^"]+)"\s*\)', path.read_text())
    }  # fmt: skip
    there = Counter((page, each.name) for page in pages() for each in blocks(page))
    shown = {page: count for (page, name), count in there.items() if name == SHOWN}
    assert {key for key in there if key[1] != SHOWN} == run
    assert sum(shown.values()) == BLOCKS_SHOWN, shown


@pytest.mark.parametrize("page", pages())
def test_no_code_is_hidden(page: str) -> None:
    """No README has code by indentation alone, which no name could be given to."""
    fences = re.findall(r"^ *```", text(page), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page))
    assert re.findall(r"(?:^|\n)\n {4,}[^\s*\-\d].*", prose(page)) == []


def test_settings_are_defined_once() -> None:
    """The tables of settings name every setting with its default, once, and no other."""
    table = defined("setting")
    for entry, kind in (("[[collector]]", Collector), ("[[token]]", Token)):
        assert _in_backticks(table.pop(entry)[1]) == set(kind.__struct_encode_fields__), entry
    shown = {name: cells[0] for name, cells in table.items()}
    declared: dict[str, str] = {}
    numbered = msgspec.structs.replace(DEFAULT_STREAM, protocol="netflow")  # what is not set is not rendered
    for line in render(Settings(streams=(numbered,))).splitlines():
        if line.startswith("["):
            section = line
        elif line:
            key, _, value = line.partition(" = ")
            declared[f"{section} {key}"] = value
    streams = {name for name in declared if name.startswith("[[stream]]")}
    assert shown.keys() == declared.keys()
    for name in declared.keys() - streams:
        assert shown[name] == f"`{declared[name]}`", name
    assert msgspec.json.decode(shown["[[stream]] receive_buffer"].strip("`")) == Settings().streams[0].receive_buffer


def test_commands_are_defined_once() -> None:
    """The table of commands names every command and every service that `fanwire` knows, once, and no other."""
    named = {re.split(r" ", word.removeprefix("fanwire "))[0] for word in defined("command")}
    assert named == {*COMMANDS, *SERVICES, *OPTIONAL, *OPT_IN, "python"}


def test_requests_are_defined_once() -> None:
    """The table of requests has every op with all of its fields and no other, and of an entry only what it has."""
    kinds = {str(kind.__struct_config__.tag): kind for kind in get_args(Operation)}
    requests = defined("op")
    assert tuple(requests) == OPERATIONS
    for op, (asked, _) in requests.items():
        fields = set(kinds[op].__struct_encode_fields__) - {"id"}
        assert _in_backticks(asked) - {"leave"} == fields, op
    assert _in_backticks(requests["register"][1]) <= {"client", *EntryView.__struct_encode_fields__}


def test_words_are_defined_once() -> None:
    """Every error word, word of health and scope is defined once; what is said to be retried, `collect` retries."""
    errors = defined("error")
    assert tuple(errors) == get_args(ErrorWord)
    assert {word for word, (_, then) in errors.items() if then == "retry"} == PASSING
    assert defined("health").keys() == _words(Word)
    assert tuple(defined("scope")) == SCOPES


def test_counters_are_defined_once() -> None:
    """The glossary has every counter that there is a name for, once, with its meaning and its cure, and no other."""
    prefixes = {counters.DROPPED, accounts.ENDED, gateway_counters.ACCOUNT, gateway_counters.REFUSED}
    named = {
        value
        for module in (counters, gateway_counters)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    named |= {raw_frames.SENT, raw_frames.FAILED, raw_frames.REFUSED}
    glossary = defined("counter")
    unnamed = {word for word in glossary if word.startswith(("from_", "to_", "refused_from_"))}  # ZeroMQ's own
    assert glossary.keys() - unnamed - {"bus_repeated", "refused_ERROR"} == named - prefixes
    assert [word for word, cells in glossary.items() if len(cells) != 2 or not all(cells)] == []


def test_events_are_defined_once() -> None:
    """The table of events has every event whose name stays, once, and no other."""
    assert tuple(defined("event")) == EVENTS


def test_metrics_are_defined_once() -> None:
    """The table of metrics has every metric of the console, once, and no other."""
    picture = busy()
    picture = replace(picture, balanced=True, nodes=Nodes(True, [Node("a", "live")]))
    families = [*stack_metrics(picture, 0.0, "1"), *exporter_metrics(picture, 2)]
    suffixes = {"counter": "_total", "info": "_info"}
    assert defined("metric").keys() == {f"{each.name}{suffixes.get(each.type, '')}" for each in families}


def _is_there(path: str) -> bool:
    return (CHECKOUT / path).exists() or (CHECKOUT / f"{path}.py").exists()


def _in_backticks(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def _words(kind: Any) -> set[str]:
    """Return the words that a Literal, or a union of them, allows."""
    return {kind} if isinstance(kind, str) else {word for part in get_args(kind) for word in _words(part)}

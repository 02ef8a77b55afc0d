"""README keeps its word: its tour works when pasted, its tables have what there is and nothing else."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from services.gateway.protocol.requests import OPERATIONS, ErrorWord, Operation
from services.gateway.registry.condition import Word
from services.gateway.render import View
from services.operator.client.lease import PASSING
from shared.settings.file import load, render
from shared.settings.model import DEFAULT_STREAM, Settings
from tests.openly import OpenStack
from tests.stack import CHECKOUT, Stack
from tests.system.test_fan_out import need

README = (CHECKOUT / "README.md").read_text()


def blocks(heading: str, *languages: str) -> list[str]:
    """The blocks in these languages under a heading of README, up to the next one of the second level."""
    section = README.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def table(heading: str) -> dict[str, list[str]]:
    """The table whose first column has this heading: the cells of each row by the word in its first one."""
    rows = re.search(rf"^\| {heading} \|.*\n((?:\|.*\n)*)", README, re.MULTILINE)
    assert rows, heading
    return {word: rest.split("|") for word, rest in re.findall(r"^\| `(\w+)` \|(.*)\|$", rows[1], re.MULTILINE)}


def test_the_tour_works_when_pasted(open_stack: OpenStack) -> None:
    """Every line of the five-minute tour, pasted in order into one shell, does what the text says."""
    need("nc")
    need("logger")
    if not (Path(sys.prefix) / "bin" / "fanwire").exists():
        pytest.skip("fanwire is not installed in this environment")
    open_stack.start_all()
    open_stack.start("transmitter")
    (open_stack.directory / ".venv").symlink_to(sys.prefix)
    tour = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    script = open_stack.directory / "tour.sh"
    patience = "sleep() { command sleep $((3 * $1)); }"  # other tests keep the machine busy, nobody the reader's
    script.write_text(f"set -eum\n{patience}\n{tour}")
    result = subprocess.run(
        ["bash", str(script)],
        env=open_stack.environment,
        cwd=open_stack.directory,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert re.search(r"Got message from \('127\.0\.0\.1', \d+\): b'Hello you there!\\n'", said)
    assert "Got your message!" in said
    assert "the disk is full" in said
    assert re.search(r"Got message from .*first", said)
    assert re.search(r"Got message from .*second", said)
    assert re.search(r"Got message from \('127\.0\.0\.1', \d+\): .*third", said)
    assert "siem" in said
    assert "balanced" in said


def test_who_may_works_when_pasted(stack: Stack) -> None:
    """The certificate and token that README has one make let a client in by TLS, with either program."""
    need("openssl")
    make, lines, use = blocks("## Who may", "bash", "toml")
    if not (Path(sys.prefix) / "bin" / "fanwire").exists():
        pytest.skip("fanwire is not installed in this environment")

    def paste(commands: str) -> str:
        result = subprocess.run(
            ["bash", "-euc", commands],
            env=stack.environment,
            cwd=stack.directory,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    paste(make)
    stack.configure(lines)
    stack.start("broker")
    stack.start("gateway")
    said = paste(use)
    assert "copies of messages go to 127.0.0.1 port 9514" in said
    assert '{"ok":true,"holder":"siem","scopes":["collect","list"],"streams":["*"]}\n' in said
    assert '"clients":{"siem":' in said


def test_example_of_settings_is_read(tmp_path: Path) -> None:
    """The settings that README shows are read as what they say."""
    (example,) = blocks("## Settings", "toml")
    path = tmp_path / "site.toml"
    path.write_text(example)
    settings = load(path, {})
    assert [stream.name for stream in settings.streams] == ["syslog", "netflow"]
    assert [(each.name, each.address, each.port) for each in settings.collectors] == [("siem", "192.0.2.20", 514)]


def test_settings_are_those_in_the_table() -> None:
    """README's table names every setting with its default, and no other."""
    shown = dict(re.findall(r"^\| `(\[+\w+\]+ \w+)` \| (.*?) \|", README, re.MULTILINE))
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


def test_requests_are_those_in_the_table() -> None:
    """README's table has every op with all of its fields and no other, and of an entry only what it has."""
    kinds = {str(kind.__struct_config__.tag): kind for kind in get_args(Operation)}
    requests = table("op")
    assert tuple(requests) == OPERATIONS
    for op, (asked, _) in requests.items():
        fields = set(kinds[op].__struct_encode_fields__) - {"id"}
        assert _in_backticks(asked) - {"leave"} == fields, op
    assert _in_backticks(requests["register"][1]) <= {"client", *View.__struct_encode_fields__}


def test_words_are_those_in_the_tables() -> None:
    """README's tables have every error word and every word of health; what they say to retry, `collect` retries."""
    errors = table("`error`")
    assert tuple(errors) == get_args(ErrorWord)
    assert {word for word, (_, then) in errors.items() if then.strip() == "retry"} == PASSING
    assert table("`health`").keys() == _words(Word)


def _in_backticks(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def _words(kind: Any) -> set[str]:
    """What a Literal, or a union of them, allows."""
    return {kind} if isinstance(kind, str) else {word for part in get_args(kind) for word in _words(part)}

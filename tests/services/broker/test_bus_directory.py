import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders import BusEnds, accounts_when
from tests.services.operator.played import run
from tests.stack import Stack, ask_json, wait_until

NEEDS_TMPFILES = pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="needs systemd-tmpfiles")
SIEM = {"op": "register", "name": "siem", "streams": ["messages"], "port": 9514, "ttl": 3600}


def clean(directory: Path, configuration: Path) -> None:
    """Let systemd-tmpfiles remove from a directory all that it may, however new."""
    configuration.write_text(f"d {directory} - - - 0\n")
    subprocess.run(["systemd-tmpfiles", "--clean", configuration], check=True)


@NEEDS_TMPFILES
def test_tmpfiles_lets_the_bus_alone(stack: Stack, tmp_path: Path) -> None:
    """systemd-tmpfiles removes what lies beside the bus directory, and nothing in it while services run."""
    cleaned = tmp_path / "cleaned"
    cleaned.mkdir()
    stack.bus = cleaned / "bus"
    stack.configure("")
    stack.start_all()
    ask_json(SIEM)
    stale = cleaned / "stale" / "file"
    stale.parent.mkdir()
    stale.touch()
    held = {path.name for path in stack.bus.iterdir()}
    assert {"lock", "publish", "subscribe", "registry.sqlite"} <= held
    clean(cleaned, tmp_path / "clean.conf")
    assert not stale.exists()
    assert held <= {path.name for path in stack.bus.iterdir()}
    stack["broker"].stop(signal.SIGKILL)  # the gateway holds it alone
    clean(cleaned, tmp_path / "clean.conf")
    assert (stack.bus / "registry.sqlite").exists()


def remove_lock(bus: Path) -> None:
    """Remove the lock alone."""
    (bus / "lock").unlink()


def remove_sockets(bus: Path) -> None:
    """Remove the sockets that services connect to."""
    (bus / "publish").unlink()
    (bus / "subscribe").unlink()


def remove_files(bus: Path) -> None:
    """Remove all that is in it."""
    for path in bus.iterdir():
        path.unlink()


@pytest.mark.parametrize("remove", [remove_lock, remove_sockets, remove_files, shutil.rmtree])
def test_removed_files_are_made_anew(stack: Stack, remove: Callable[[Path], None]) -> None:
    """Services go on, latecomers find them, and a restart finds the list, whatever is removed of the bus directory."""
    stack.configure("[gateway]\nserve_seconds = 10\n")
    stack.start_all()
    ask_json(SIEM)
    revision = ask_json({"op": "list"})["revision"]
    files = [stack.bus / name for name in ("lock", "publish", "subscribe", "registry.sqlite")]
    remove(stack.bus)
    wait_until(lambda: all(path.exists() for path in files), "they are made anew")
    second = stack.start("broker", ready=False)
    assert second.process.wait(60) == 73
    assert "another broker runs on" in second.text
    assert stack.running[0].events("another program has removed files of the bus: they were made anew")
    stack.start("ingest.2")
    code, text = run(stack, "ledger", "--json")
    assert (code, json.loads(text)["balanced"]) == (0, True)
    assert ask_json(SIEM | {"name": "late", "port": 9515})["client"]["health"] == "ok"
    stack["gateway"].stop(signal.SIGKILL)
    stack.start("gateway")
    listed = ask_json({"op": "list"})
    assert listed["clients"].keys() == {"siem", "late"}
    assert listed["revision"] > revision


def test_a_second_broker_does_not_take_the_bus(stack: Stack) -> None:
    """One that starts right after the lock was removed is refused, since the first one answers."""
    first = stack.start("broker")
    first.process.send_signal(signal.SIGSTOP)  # before it can notice
    (stack.bus / "lock").unlink()
    second = stack.start("broker", ready=False)
    assert second.process.wait(60) == 73
    assert "another broker runs on" in second.text
    first.process.send_signal(signal.SIGCONT)
    with BusEnds(stack.bus) as ends:
        accounts_when(ends, "broker.1", lambda found: found["broker"]["files_restored"] == 1)


def test_a_broker_whose_bus_was_taken_ends(stack: Stack) -> None:
    """The first broker ends, says why, and leaves the bus to another that came at once when all was removed."""
    first = stack.start("broker")
    stack.start("gateway")
    first.process.send_signal(signal.SIGSTOP)
    remove_files(stack.bus)
    second = stack.start("broker")
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(60) == 73
    assert "another broker runs on" in first.text
    assert second.process.poll() is None
    with BusEnds(stack.bus) as ends:
        accounts_when(ends, "gateway.1", lambda found: found["gateway"]["files_restored"] == 1)

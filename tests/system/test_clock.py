"""The time of day may jump: nothing that is granted, limited or waited for goes by it."""

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.stack import CHECKOUT, PATIENT, Stack, ask_json, sign_up, wait_until
from tests.traffic import open_receiver

YEAR = 365 * 86_400.0
JUMPING = """
import os, struct, time
PATH, real, real_ns = os.environ["SHIFT"], time.time, time.time_ns

def shift():
    with open(PATH, "rb") as file:
        return struct.unpack("d", file.read())[0]

time.time = lambda: real() + shift()
time.time_ns = lambda: real_ns() + int(shift() * 1e9)
"""
"""A sitecustomize module: by it a process has another time of day than this machine, which must keep its own."""


class JumpingStack(Stack):
    """Processes whose time of day is what `jump` says."""

    def __init__(self, directory: Path, settings: str = "") -> None:
        super().__init__(directory, settings)
        (directory / "site").mkdir()
        (directory / "site" / "sitecustomize.py").write_text(JUMPING)
        self.jump(0.0)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of any stack, with the module."""
        before = super().environment
        path = f"{self.directory / 'site'}:{before['PYTHONPATH']}"
        return before | {"PYTHONPATH": path, "SHIFT": str(self.directory / "shift")}

    def jump(self, seconds: float) -> None:
        """Set the time of day this far ahead of ours from now on."""
        (self.directory / "next").write_bytes(struct.pack("d", seconds))
        (self.directory / "next").rename(self.directory / "shift")


@pytest.fixture
def jumping(lab: None, tmp_path: Path) -> Iterator[JumpingStack]:
    """Closed at the end of the test."""
    with JumpingStack(tmp_path, PATIENT) as running:
        yield running


def test_leases_and_copies_do_not_go_by_the_time_of_day(jumping: JumpingStack) -> None:
    """Years ahead and back nobody's lease ends or lasts longer, copies go on, nothing waits, and all adds up."""
    jumping.start_all()
    receiver, _ = open_receiver("127.0.0.1", 9100)
    with closing(receiver), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        receiver.settimeout(60)
        collector = {"streams": ["messages"], "port": 9100}
        kept = sign_up(collector | {"name": "kept", "ttl": 60})
        renewal = {"op": "renew", "name": "kept", "generation": kept["generation"]}
        for seconds in (YEAR, -YEAR):
            jumping.jump(seconds)
            for number in range(5):
                sender.sendto(b"%d" % number, ("127.0.0.1", 6667))
                assert receiver.recv(100) == b"%d" % number
            time.sleep(0.6)  # more than a tick of the gateway: what would expire does
            left = ask_json({"op": "list"})["clients"]["kept"]["expires_in"]
            assert 0 < left < ask_json(renewal)["expires_in"] <= 60
        sign_up(collector | {"name": "short", "port": 9101, "ttl": 1})
        jumping.jump(-YEAR)
        wait_until(lambda: "short" not in ask_json({"op": "list"})["clients"], "its second is over")
        jumping["gateway"].stop()
        jumping.start("gateway")
        after = ask_json({"op": "list"})["clients"]
        assert list(after) == ["kept"]
        new = sign_up(collector | {"name": "new", "port": 9102})
        assert after["kept"]["generation"] == kept["generation"] < new["generation"]
    ledger = jumping.operator("ledger")
    assert ledger.process.wait(60) == 0, ledger.text


def test_leases_run_while_the_host_sleeps() -> None:
    """The clock of leases counts time asleep (CLOCK_BOOTTIME): shown where that is far ahead of the other."""
    script = "import time; from services.gateway.start import _boot_time; print(_boot_time() - time.monotonic())"
    apart = ["unshare", "--user", "--map-root-user", "--time", "--fork", "--boottime", "1000000"]
    done = subprocess.run(
        [*apart, sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if done.returncode and "unshare:" in done.stderr:
        pytest.skip(f"needs a time namespace: {done.stderr}")
    assert float(done.stdout) == pytest.approx(1_000_000, abs=1)

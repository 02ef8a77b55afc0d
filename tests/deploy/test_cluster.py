import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.ha.cluster.layout import Place
from deploy.ha.cluster.traffic import TRAIN, Counted, Sent
from tests.deploy.failover import need
from tests.stack import CHECKOUT, wait_until


class Cluster:
    """`make cluster` without make."""

    def __init__(self, directory: Path) -> None:
        self.place = Place(directory / f"fanwire-cluster-{os.getuid()}")
        self._environment = os.environ | {"XDG_RUNTIME_DIR": str(directory)}
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.ha.cluster"], cwd=CHECKOUT, env=self._environment, stdout=log, stderr=log
            )

    def on(self, *command: str, may_fail: bool = False) -> str:
        """Run a command at a node; return its output."""
        done = subprocess.run(
            [CHECKOUT / "deploy/ha/on", *command], env=self._environment, capture_output=True, text=True, check=False
        )
        assert may_fail or done.returncode == 0, done.stderr
        return done.stdout

    def printed(self, text: str) -> bool:
        """Return whether it has printed this; fail if it has ended."""
        assert self.process.poll() is None, self.log.read_text()
        return text in self.log.read_text()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start it; wait until it says what to try."""
    need("nats-server")
    need("unshare")
    need("nsenter")
    with tempfile.TemporaryDirectory(prefix="fanwire-") as name:
        found = Cluster(Path(name))
        try:
            wait_until(lambda: found.printed("Ctrl-C ends everything"), found.log.read_text, 90)
            yield found
        finally:
            found.process.terminate()
            found.process.wait(30)


@pytest.mark.soak
def test_a_node_dies_and_the_cluster_goes_on(lab: None) -> None:
    """`make cluster` starts three nodes; one may be killed and started again; an interrupt leaves nothing behind."""
    with cluster() as running:
        sent, counted = Sent(running.place.directory / "sent"), Counted(running.place.directory / "came")
        (holder,) = (node for node in "ab" if " 10.99.0.10/" in running.on(node, "ip", "-4", "address"))
        assert "siem" in running.on("c", "fanwire", "clients")
        running.on(holder, "kill", "-9", "-1", may_fail=True)  # kill(1) of procps ends with 1 then
        first = sent.count
        wait_until(lambda: sent.count > first + 5000, "exporters go on")
        wait_until(lambda: not len(counted.lost(first + 5000, first + 5000 - TRAIN)), "the other node takes in")
        running.on(holder, "kill", "-USR1", "1")
        wait_until(lambda: "all ready" in running.on(holder, "fanwire", "ready"), "the node is back")
        pid = running.place.pid("cluster").read_text()
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 0, running.log.read_text()
        assert not running.place.directory.exists()
        assert not Path(f"/proc/{pid}").exists()
        assert re.findall(r"Traceback|Error", running.log.read_text()) == []

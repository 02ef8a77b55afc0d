"""The Debian package in a Debian with systemd, in a container and a network of its own: from nothing to nothing.

`make test-deb` fetches what this takes and runs it: a test has no way out.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy import counted_load
from tests.deploy.test_units import need
from tests.stack import CHECKOUT, wait_until

pytestmark = pytest.mark.soak
DIST = CHECKOUT / "dist"
RATE, SECONDS = 20_000, 60.0
RECEIVE_BUFFER = "[Socket]\nReceiveBuffer=32M\n"
"""As the package's sysctl allows on a host of one's own; a container may not set it."""


@dataclass(frozen=True)
class Machine:
    """A Debian that has booted; `leader` is its first process."""

    root: Path
    leader: int

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in it."""
        inside = ["nsenter", f"--target={self.leader}", "--all", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        return subprocess.Popen(
            [*inside, "DEBIAN_FRONTEND=noninteractive", *command], text=True, stdout=subprocess.PIPE
        )

    def run(self, *command: str) -> str:
        """Run a command in it, and return what it has printed."""
        running = self.start(*command)
        said, _ = running.communicate()
        assert running.returncode == 0, (command, said)
        return said


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package of this checkout, and the same as the next version."""
    need("dpkg-deb")
    work = tmp_path_factory.mktemp("packages")
    built = next(DIST.glob("fanwire_*.deb"), None)
    if built is None:
        pytest.skip("make deb makes the package for this")
    subprocess.run(["dpkg-deb", "-R", built, work / "next"], check=True)
    control = work / "next" / "DEBIAN" / "control"
    control.write_text(re.sub(r"^Version: .*$", "Version: 99", control.read_text(), flags=re.MULTILINE))
    later = work / "fanwire_99.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", work / "next", later], check=True)
    return built, later


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A Debian that has booted, with loopback alone."""
    if os.geteuid():
        pytest.skip("only root can boot a container")
    need("systemd-nspawn")
    if not (DIST / "debian.tar").exists():
        pytest.skip("make test-deb makes the Debian for this")
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["tar", "-xf", DIST / "debian.tar", "-C", root], check=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    options = ["--private-network", "--register=no", "--keep-unit", f"--bind={tmp_path}:/shared", "--boot"]
    with (
        (tmp_path / "console").open("wb") as console,
        subprocess.Popen(
            ["systemd-nspawn", "--quiet", f"--directory={root}", *options], stdin=subprocess.DEVNULL, stdout=console
        ) as container,
    ):
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
        try:
            wait_until(lambda: "multi-user.target" in (tmp_path / "console").read_text(errors="replace"), "it boots")
            booted = Machine(root, int(children.read_text().split()[0]))
            assert booted.run("ip", "route") == ""
            yield booted
        finally:
            container.send_signal(signal.SIGTERM)  # systemd-nspawn has the container shut down


def test_package_installs_upgrades_and_goes(machine: Machine, packages: tuple[Path, Path], tmp_path: Path) -> None:
    """It starts at once, rates at most 2.0; an upgrade under 20,000 datagrams/s loses none that the kernel has queued.

    A purge leaves no file. An upgrade gives the new version's processes to all services.
    """
    for path in (*packages, Path(counted_load.__file__)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, later = (f"/shared/{path.name}" for path in packages)
    machine.run("dpkg", "--install", first)
    services = machine.run("systemctl", "list-units", "--plain", "--no-legend", "--state=active", "fanwire-*.service")
    names = [line.split()[0] for line in services.splitlines()]
    assert len(names) == 6, services
    for name in names:
        machine.run("systemd-analyze", "security", "--no-pager", "--threshold=20", name)
    drop_in = machine.root / "etc/systemd/system/fanwire-ingest@.socket.d/site.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(RECEIVE_BUFFER)
    machine.run("systemctl", "stop", "fanwire.target", "fanwire-*")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "fanwire.target")
    before = machine.run("systemctl", "show", "--property=MainPID", *names)

    load = machine.start("python3", "/shared/counted_load.py", str(RATE), str(SECONDS))
    time.sleep(3)
    machine.run("dpkg", "--install", later)
    assert load.poll() is None, "the upgrade took longer than the load"
    said, _ = load.communicate()
    told = json.loads(said)
    print(told)
    assert told["came"] + told["dropped"] == told["sent"]
    assert told["twice"] == 0
    after = machine.run("systemctl", "show", "--property=MainPID", *names)
    assert not {*before.split()} & {*after.split()}, (before, after)

    drop_in.unlink()
    drop_in.parent.rmdir()
    machine.run("systemctl", "enable", "fanwire-ingest@2.service", "fanwire-journal.service")
    machine.run("dpkg", "--purge", "fanwire")
    places = ("/etc", "/run", "/usr", "/var")
    assert machine.run("find", *places, "-name", "*fanwire*", "-not", "-path", "/var/log/*") == ""
    assert not (machine.root / "opt" / "fanwire").exists()

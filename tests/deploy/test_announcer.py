"""The announcer of deploy/ha under its unit's sandbox, user and group, beside BIRD as Debian's unit starts it."""

import ctypes.util
import grp
import re
import shutil
import sys

import pytest

from tests.deploy import confined
from tests.deploy.failover import HA, need, need_root
from tests.deploy.test_units import ANNOUNCER, lines
from tests.network import Host
from tests.openly import OpenStack, program_for_all
from tests.stack import wait_until


def bird_group() -> str:
    """Return the group that the unit has; skip the test where BIRD has not made it."""
    (name,) = lines(ANNOUNCER, "SupplementaryGroups")
    try:
        grp.getgrnam(name)
    except KeyError:
        pytest.skip(f"there is no group {name}")
    return name


def test_it_announces_confined(lab: None, open_stack: OpenStack) -> None:
    """With the system calls, families and groups of its unit it enables the announcement, disables it, and ends so."""
    bird, birdc = need_root("bird"), need("birdc")
    need("curl")
    need("setpriv")
    need("systemd-analyze")
    if ctypes.util.find_library("seccomp") is None:
        pytest.skip("libseccomp is not here")
    group, (interpreter, _) = bird_group(), program_for_all()
    control = open_stack.directory / "control"
    control.mkdir()
    open_stack.directory.chmod(0o755)
    control.chmod(0o775)
    shutil.chown(control, group, group)  # as /run/bird
    (open_stack.directory / "bird.conf").write_text((HA / "bird.conf").read_text())
    (open_stack.directory / "site").mkdir()
    ready = open_stack.directory / "site" / "readyz"
    ready.touch()
    with Host() as relay, relay.entered():
        relay.assert_no_default_route()
        daemon = ["-f", "-u", group, "-g", group, "-c", "bird.conf", "-s", "control/bird.ctl", "-P", "control/bird.pid"]
        open_stack.spawn("bird", [bird, *daemon])
        wait_until((control / "bird.ctl").exists, "BIRD listens")
        console = ["-m", "http.server", "--bind", "127.0.0.1", "8080", "--directory", "site"]
        open_stack.spawn("console", [sys.executable, *console]).wait_for("Serving")
        who = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            f"--groups={group}",
            "--bounding-set=-all",
            "--no-new-privs",
        ]
        sandbox = [interpreter, "-I", confined.__file__, str(ANNOUNCER)]
        script = ["env", f"BIRDC={birdc} -s {control}/bird.ctl", str(HA / "fanwire-announce")]
        announcer = open_stack.spawn("announcer", [*who, *sandbox, *script])

        def announced() -> bool:
            shown = relay.run(birdc, "-s", str(control / "bird.ctl"), "show", "protocols", "ready")
            return bool(re.search(r"^ready .* up ", shown, re.MULTILINE))

        wait_until(announced, lambda: f"it is announced: {announcer.text}")
        ready.unlink()
        wait_until(lambda: not announced(), "it is withdrawn")
        ready.touch()
        wait_until(announced, "it is announced again")
        assert announcer.stop() == 0
        assert not announced()
        assert announcer.text.startswith("enable: copies flow\n")

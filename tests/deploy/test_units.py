"""The unit files: what systemd itself says of them, and that they say what the rest of the project says."""

import os
import re
import shutil
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from services.transmitter.opener import SEND_BUFFER, SOCKETS
from shared.net.addresses import resolve
from shared.net.sockets import KINDS
from shared.process.lifecycle import BAD_SETTINGS, NOT_PERMITTED, USAGE
from shared.settings.entries import Stream
from shared.settings.model import DEFAULT_STREAM, Settings
from shared.settings.opt_in import OPT_IN
from shared.settings.tables import Forwarder
from tests.documents import block, tables
from tests.stack import CHECKOUT

UNITS = CHECKOUT / "deploy" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
ANNOUNCER = CHECKOUT / "deploy" / "ha" / "fanwire-announce.service"
"""The unit of a script of deploy/ha: no service of fanwire, and as closed in."""
COMMON = "# From here on the same in every unit of fanwire"
INSTALLED = "/opt/fanwire/bin/python"
MAX_EXPOSURE = 2.0


def need(program: str) -> str:
    """The path of a program, or the test is skipped."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not here")
    return path


def service_of(unit: Path) -> str:
    """The service that a unit starts."""
    return unit.stem.removeprefix("fanwire-").removesuffix("@")


def lines(unit: Path, key: str) -> list[str]:
    """Return the lines that a unit gives a setting."""
    return re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)


def verify(directory: Path, drop_in: str = "", unit: str = "") -> None:
    """Assert that `systemd-analyze verify` has nothing to say of the units, with a drop-in for one of them."""
    need("systemd-analyze")
    for path in (*UNITS.iterdir(), ANNOUNCER):
        # Not installed here: an interpreter that is takes its place, and systemd checks that it can be run.
        text = path.read_text().replace(INSTALLED, sys.executable)
        (directory / path.name).write_text(text.replace("/usr/local/bin", str(ANNOUNCER.parent)))
    if unit:
        (directory / f"{unit}.d").mkdir()
        (directory / f"{unit}.d" / "override.conf").write_text(drop_in)
    command = ["systemd-analyze", "verify", *(str(path) for path in directory.iterdir() if path.is_file())]
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{directory}:"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_units_are_clean(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say of any unit, once the program is where they look for it."""
    verify(tmp_path)


SHOWN_DROP_INS = {
    "fanwire-gateway.service": block("deploy/README.md", "credentials"),
    "fanwire-broker.service": block("deploy/README.md", "broker-network"),
    "fanwire-ingest@.socket": block("README.md", "site-sockets"),
}


@pytest.mark.parametrize("unit", SHOWN_DROP_INS)
def test_drop_ins_shown_are_clean(tmp_path: Path, unit: str) -> None:
    """`systemd-analyze verify` has nothing to say of a unit with the drop-in that a README shows for it."""
    lines = "\n".join(line.strip() for line in SHOWN_DROP_INS[unit].splitlines())
    verify(tmp_path, lines, unit)
    assert lines.count("[") == 1  # a section of its own, so that it can be pasted


def test_drop_in_with_a_mistake_is_found(tmp_path: Path) -> None:
    """The check above reads drop-ins: an unknown setting in one fails it."""
    with pytest.raises(AssertionError, match="Unknown key"):
        verify(tmp_path, "[Service]\nLoadCredentials=key.pem\n", "fanwire-gateway.service")


@pytest.mark.parametrize("unit", [*SERVICES, ANNOUNCER], ids=service_of)
def test_exposure_is_low(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`systemd-analyze security` rates each service at most 2.0, on its scale from 0 to 10."""
    need("systemd-analyze")
    limit = f"--threshold={int(MAX_EXPOSURE * 10)}"
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", limit, str(unit)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    (rated,) = re.findall(r"Overall exposure level for .*: (\d+\.\d)", said.stdout)
    with capsys.disabled():
        print(f"\n{unit.name}: exposure {rated} of 10")
    assert said.returncode == 0, said.stdout
    assert float(rated) <= MAX_EXPOSURE


def test_every_service_has_a_unit() -> None:
    """Every program that runs as a process of its own, and is no command that people type, has one unit."""
    found = {path.parent.name for path in (CHECKOUT / "services").glob("*/__main__.py")} - {"operator"}
    units = [service_of(unit) for unit in SERVICES]
    assert sorted(units) == sorted(found)
    also = " ".join(lines(UNITS / "fanwire.target", "Also")).split()
    assert sorted(also) == sorted(unit.name.replace("@", "@1") for unit in SERVICES if service_of(unit) not in OPT_IN)


@pytest.mark.parametrize("unit", SERVICES, ids=service_of)
def test_the_installed_program_runs(unit: Path) -> None:
    """Each unit starts the installed program in isolated mode: no checkout, directory or variable gets code in."""
    (command,) = lines(unit, "ExecStart")
    assert command.removesuffix(" --require-privilege") == f"{INSTALLED} -I -m fanwire {service_of(unit)}"
    assert not lines(unit, "WorkingDirectory")
    assert "PYTHON" not in unit.read_text()


def test_what_is_common_is_the_same() -> None:
    """Each unit ends in the same settings, so what is said of one holds for all."""
    assert len({unit.read_text().partition(COMMON)[2] for unit in SERVICES}) == 1


def test_the_announcer_is_closed_in_as_the_services_are() -> None:
    """It has the sandbox of every service, a user of its own, and the group that BIRD's socket is open to."""
    text = ANNOUNCER.read_text()
    common = SERVICES[0].read_text().partition(COMMON)[2].partition("[Install]")[0]
    sandbox = common[common.index("NoNewPrivileges=") :].split()
    assert len(sandbox) > 20
    assert [line for line in sandbox if line not in text.split()] == []
    (console,) = (unit for unit in SERVICES if service_of(unit) == "console")
    for key in ("CapabilityBoundingSet", "PrivateUsers", "RestrictAddressFamilies", "Restart", "StartLimitIntervalSec"):
        assert lines(ANNOUNCER, key) == lines(console, key)
    assert lines(ANNOUNCER, "DynamicUser") == ["yes"]
    assert lines(ANNOUNCER, "SupplementaryGroups") == ["bird"]


def test_killed_is_started_again_without_a_limit() -> None:
    """Each service is back a moment after it was killed, however often; not where only an operator can mend it."""
    for unit in SERVICES:
        assert lines(unit, "Restart") == ["always"]
        assert lines(unit, "RestartSec") == ["100ms"]
        assert lines(unit, "StartLimitIntervalSec") == ["0"]
        assert lines(unit, "WatchdogSec") == ["30s"]
        ends = set(" ".join(lines(unit, "RestartPreventExitStatus")).split())
        assert ends <= {str(USAGE), str(NOT_PERMITTED), str(BAD_SETTINGS)}
        assert "sleep" not in unit.read_text()


def test_ingest_goes_first_when_memory_is_short() -> None:
    """Each service has a limit of its own; of all, what queued datagrams survive goes first, the registry last."""
    first = {service_of(unit): int(lines(unit, "OOMScoreAdjust")[0]) for unit in SERVICES}
    assert first["ingest"] > 0 > max(first["transmitter"], first["forwarder"]) >= first["broker"] > first["gateway"]
    assert all(re.fullmatch(r"\d+[MG]", "".join(lines(unit, "MemoryMax"))) for unit in SERVICES)


def test_no_unit_holds_a_secret() -> None:
    """No unit sets a key, token or password: any user may ask systemd for what it sets."""
    for unit in SERVICES:
        names = {line.partition("=")[0] for line in lines(unit, "Environment")}
        assert names <= {"FANWIRE_CONFIG", "OPENBLAS_NUM_THREADS", "HONCHO_PROCESS_NAME", "BOOT_ID"}
        assert not lines(unit, "EnvironmentFile") + lines(unit, "PassEnvironment")
    assert "LoadCredential=" in (CHECKOUT / "deploy" / "README.md").read_text()


@pytest.mark.parametrize("unit", SERVICES, ids=service_of)
def test_reload_is_a_hangup(unit: Path) -> None:
    """`systemctl reload` of each unit sends SIGHUP to its process."""
    assert lines(unit, "ExecReload") == ["kill -HUP $MAINPID"]


def test_reload_by_pattern_reaches_units_that_can_reload() -> None:
    """Each unit that the pattern of deploy/README.md names can reload: for one that can't, systemctl fails."""
    (pattern,) = re.findall(r"`systemctl reload '(\S+)'`", (CHECKOUT / "deploy" / "README.md").read_text())
    named = [path for path in (*SERVICES, ANNOUNCER) if fnmatch(path.name, pattern)]
    assert len(named) == len(SERVICES) + 1
    assert [path.name for path in named if not lines(path, "ExecReload")] == []


def test_production_says_what_the_kill_of_each_service_costs() -> None:
    """The table of kills has a row for each service that a unit starts."""
    (killed,) = (table for table in tables("deploy/README.md") if table[0][0] == "killed")
    assert sorted(row[0] for row in killed[1:] if row[0].isalpha()) == sorted(service_of(unit) for unit in SERVICES)


CAPABILITIES = {"transmitter": "CAP_NET_RAW", "offload": "CAP_NET_ADMIN"}


def test_two_services_have_one_capability_each() -> None:
    """The capability is in the unit, ambient and bounded; the other units have an empty bounding set."""
    for unit in SERVICES:
        capability = CAPABILITIES.get(service_of(unit), "")
        assert lines(unit, "CapabilityBoundingSet") == [capability]
        assert lines(unit, "AmbientCapabilities") == ([capability] if capability else [])
        assert lines(unit, "ExecStart")[0].endswith(" --require-privilege") == bool(capability)
        settings = "\n".join(line for line in unit.read_text().splitlines() if not line.startswith("#"))
        assert settings.count("CAP_") == 2 * bool(capability)


def test_sockets_are_those_of_the_built_in_stream() -> None:
    """The socket unit holds every address on which the built-in stream listens, and no other."""
    unit = UNITS / "fanwire-ingest@.socket"
    listed = {(kind, at) for kind in ("Datagram", "Stream") for at in lines(unit, f"Listen{kind}")}
    expected = set()
    for endpoint in DEFAULT_STREAM.endpoints:
        kind = KINDS[endpoint.scheme]
        assert endpoint.host == "localhost"
        for host in ("127.0.0.1", "::1"):
            ((family, at),) = resolve(host, endpoint.port, kind)
            text = f"[{at[0]}]:{at[1]}" if family == socket.AF_INET6 else f"{at[0]}:{at[1]}"
            expected.add(("Datagram" if kind == socket.SOCK_DGRAM else "Stream", text))
    assert listed == expected
    assert lines(unit, "ReusePort") == ["yes"]


@pytest.mark.parametrize("unit", SERVICES, ids=service_of)
def test_ceiling_leaves_room_for_the_kernel(unit: Path) -> None:
    """A process is at its own ceiling well before systemd's, which also counts what the kernel holds for it."""
    (most,) = lines(unit, "MemoryMax")
    most_bytes = int(most[:-1]) << {"M": 20, "G": 30}[most[-1]]
    held_by_kernel = {"ingest": 4 * Stream(name="x", listen=("udp://localhost:1",)).receive_buffer}
    held_by_kernel["transmitter"] = 3 * SOCKETS * 2 * SEND_BUFFER
    ceiling = getattr(Settings(), service_of(unit)).memory
    assert ceiling + held_by_kernel.get(service_of(unit), most_bytes // 8) <= most_bytes


def test_kernel_grants_what_the_services_ask_for() -> None:
    """The sysctl file allows the buffers that the settings ask for by default."""
    text = (CHECKOUT / "deploy" / "sysctl" / "60-fanwire.conf").read_text()
    granted = {name: int(value) for name, value in re.findall(r"^net\.core\.(\w+) = (\d+)$", text, re.MULTILINE)}
    assert granted["rmem_max"] == Stream(name="x", listen=("udp://localhost:1",)).receive_buffer
    assert granted["wmem_max"] == SEND_BUFFER >= Forwarder().send_buffer
    assert granted["netdev_max_backlog"] > 1000


def test_enabling_the_target_enables_everything(tmp_path: Path) -> None:
    """`systemctl enable fanwire.target` has services started with it, but those by choice; a worker is an instance."""
    need("systemctl")
    units = tmp_path / "etc" / "systemd" / "system"
    shutil.copytree(UNITS, units)
    enable = ["systemctl", f"--root={tmp_path}", "enable", "fanwire.target", "fanwire-ingest@2.service"]
    subprocess.run(enable, capture_output=True, check=True)
    wanted = {path.name for path in (units / "fanwire.target.wants").iterdir()}
    brought = {unit.name.replace("@", "@1") for unit in SERVICES if service_of(unit) not in OPT_IN}
    assert wanted == brought | {"fanwire-ingest@2.service"}
    assert (units / "multi-user.target.wants" / "fanwire.target").is_symlink()

"""The files for containers: they agree with units, settings and the other files that they name."""

import re
from typing import Any

import pytest
import yaml

from services.operator.commands.running.ready import OPTIONAL, SERVICES
from shared.settings.file import load
from tests.deploy.test_units import UNITS, lines
from tests.documents import block
from tests.stack import CHECKOUT

CONTAINER = CHECKOUT / "deploy" / "container"
BUILD = (CONTAINER / "Containerfile").read_text()
USER = "65532:65532"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services of compose.yaml that are fanwire's."""
    found = yaml.safe_load((CONTAINER / "compose.yaml").read_text())["services"]
    return {name: each for name, each in found.items() if "profiles" not in each}


def test_every_service_has_a_container(services: dict[str, Any]) -> None:
    """Each service of fanwire is a container that runs it, is asked whether it is ready, and has its unit's memory."""
    assert set(services) == {*SERVICES, *OPTIONAL}
    for name, each in services.items():
        assert each["command"][0] == name
        assert each["healthcheck"]["test"][:4] == ["CMD", "fanwire", "ready", name]
        (unit,) = UNITS.glob(f"fanwire-{name}*.service")
        assert [each["mem_limit"].upper()] == lines(unit, "MemoryMax")


def test_the_journal_has_a_volume_of_its_own(services: dict[str, Any]) -> None:
    """It is as confined as the gateway, has its unit's memory and no network, and is asked whether it is ready."""
    file = yaml.safe_load((CONTAINER / "compose.yaml").read_text())
    journal, gateway = file["services"]["journal"], services["gateway"]
    assert journal["profiles"] == ["journal"]
    assert journal["network_mode"] == "none"
    same = ("cap_drop", "security_opt", "user", "read_only", "environment", "restart")
    assert {key: journal[key] for key in same} == {key: gateway[key] for key in same}
    (unit,) = UNITS.glob("fanwire-journal.service")
    assert [journal["mem_limit"].upper()] == lines(unit, "MemoryMax")
    assert journal["healthcheck"]["test"][:4] == ["CMD", "fanwire", "ready", "journal"]
    assert {*journal["volumes"]} - {*gateway["volumes"]} == {"journal:/var/lib/fanwire"}
    assert "journal" in file["volumes"]


def test_only_the_transmitter_has_a_capability(services: dict[str, Any]) -> None:
    """NET_RAW is the transmitter's alone; nothing runs as root, and nothing else may gain a privilege."""
    for name, each in services.items():
        transmitting = name == "transmitter"
        assert each["cap_drop"] == ["ALL"]
        assert each.get("cap_add", []) == ["NET_RAW"] * transmitting
        assert each["security_opt"] == ["no-new-privileges:true"] * (not transmitting)
        assert (each["user"], each["read_only"]) == (USER, True)
    entry = services["transmitter"]["entrypoint"]
    assert f"setcap cap_net_raw+ep {entry[0]}" in BUILD
    assert "--require-privilege" in services["transmitter"]["command"]


def test_containers_share_the_bus_alone(services: dict[str, Any]) -> None:
    """All have the bus and the settings, read-only; the registry is the gateway's alone, where it looks for it."""
    for name, each in services.items():
        assert {"bus:/run/fanwire", "./fanwire.toml:/etc/fanwire/fanwire.toml:ro"} <= set(each["volumes"])
        assert [volume for volume in each["volumes"] if volume.startswith("registry:")] == [
            f"registry:{state}" for state in each.get("environment", {}).values()
        ], name
        assert each["network_mode"] == ("none" if name == "broker" else "host")
    assert "RUNTIME_DIRECTORY=/run/fanwire" in BUILD
    assert f"\nUSER {USER}\n" in BUILD


def test_settings_and_files_are_there() -> None:
    """The settings can be used, with no port that its user can't bind; every file that is mounted or copied exists."""
    settings = load(CONTAINER / "fanwire.toml")
    assert all(at.port >= 1024 for stream in settings.streams for at in stream.endpoints)
    text = (CONTAINER / "compose.yaml").read_text()
    assert [path for path in re.findall(r"- (\.[\w./]+):", text) if not (CONTAINER / path).exists()] == []
    kept = re.findall(r"^!(.*)$", (CONTAINER / "Containerfile.dockerignore").read_text(), re.MULTILINE)
    assert [path for path in kept if not (CHECKOUT / path).exists()] == []
    assert {"pyproject.toml", "services", "shared", "deploy/environment"} <= set(kept)
    assert "/checkout/deploy/environment " in BUILD


def test_readme_builds_and_runs_the_image() -> None:
    """The commands of the README name the Containerfile and the image of compose.yaml."""
    built = block("deploy/container/README.md", "container-build").split()
    assert (CHECKOUT / built[built.index("-f") + 1]).exists()
    image = built[built.index("-t") + 1]
    assert block("deploy/container/README.md", "container-run").split()[-1] == image
    assert f"FANWIRE_IMAGE:-{image}" in (CONTAINER / "compose.yaml").read_text()

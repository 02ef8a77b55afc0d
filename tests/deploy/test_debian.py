"""The Debian package: its parts agree with the rest of the project. test_package.py builds and installs it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from services.operator.__main__ import COMMANDS
from services.operator.commands.running.ready import OPTIONAL, SERVICES
from shared.settings.opt_in import OPT_IN
from tests.deploy.test_units import UNITS, lines, service_of
from tests.documents import block
from tests.stack import CHECKOUT

PACKAGE = CHECKOUT / "deploy" / "debian"
SCRIPTS = ("preinst", "postinst", "prerm", "postrm", "build")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_shell(name: str) -> None:
    """A shell finds no fault in the scripts, which stop at the first command that fails."""
    subprocess.run(["sh", "-n", PACKAGE / name], check=True)
    assert re.search(r"^set -eu?$", (PACKAGE / name).read_text(), re.MULTILINE)


def test_build_takes_files_that_there_are() -> None:
    """Each file of the checkout that the build puts into the package is there; the README's command is the build."""
    paths = re.findall(r'\$checkout"?/(deploy/[\w./-]+?)(?:"| |/\*|$)', (PACKAGE / "build").read_text(), re.MULTILINE)
    assert len(paths) >= 4
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []
    assert block("deploy/debian/README.md", "deb-build").split()[0] == str((PACKAGE / "build").relative_to(CHECKOUT))


def test_build_takes_all_that_the_page_on_several_relays_tells_to_install() -> None:
    """Each file that the page tells of is in the package, for those that have no checkout."""
    (built,) = re.findall(r'for file in (.+); do\n  put "\$checkout/deploy/ha/', (PACKAGE / "build").read_text())
    page = (CHECKOUT / "deploy" / "ha" / "README.md").read_text()
    told = {path.name for path in (CHECKOUT / "deploy" / "ha").iterdir() if path.is_file() and f"`{path.name}`" in page}
    assert {*built.split()} == told | {name.rpartition("/")[2] for name in re.findall(r"deploy/ha/fan\S+", page)}


def test_upgrade_restarts_every_service_and_no_socket() -> None:
    """The steps of an upgrade name each service's unit, and of ingest never the socket, which holds what is queued."""
    text = (PACKAGE / "postinst").read_text()
    named = set(re.findall(r"fanwire-(\w+)(?:@\*\.service|\*)", text))
    assert named == {service_of(unit) for unit in UNITS.glob("*.service")}
    assert text.count("fanwire-ingest") == text.count("fanwire-ingest@*.service")


def test_upgrade_has_the_order_that_two_releases_on_one_bus_need() -> None:
    """The steps are those of deploy/README.md: what reads what others send comes before them, the broker last."""
    steps = re.findall(r"'((?:fanwire-\S+ ?){2,})'", (PACKAGE / "postinst").read_text())
    told = (CHECKOUT / "deploy" / "README.md").read_text().partition("## Upgrade and the way back")[2]
    written = re.findall(r"^\d\. (.+)", told, re.MULTILINE)
    names = r"fanwire-(\w+)"
    assert [re.findall(names, step) for step in steps] == [re.findall(names, step) for step in written]
    assert len(steps) == 3


def test_purge_forgets_which_units_were_enabled() -> None:
    """Links of all units that can be enabled are where a purge removes them, those of a second worker too."""
    (removed,) = re.findall(r"rm -rf (.+)", (PACKAGE / "postrm").read_text())
    wanted_by = {target for unit in UNITS.glob("*.service") for target in lines(unit, "WantedBy")}
    assert {f"/etc/systemd/system/{target}.wants" for target in wanted_by} <= {*removed.split()}


def test_every_command_and_service_has_a_man_page(tmp_path: Path) -> None:
    """The pages come from the parsers: each tells the command's own options, and man formats it without a warning."""
    from deploy.debian import man_pages

    man_pages.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "fanwire.1", *(f"fanwire-{name}.1" for name in COMMANDS),
        *(f"fanwire-{name}.8" for name in (*SERVICES, *OPT_IN, *OPTIONAL)),
    }  # fmt: skip
    told = (tmp_path / "fanwire-transmitter.8").read_text().replace("\\", "")
    assert "--require-privilege" in told
    assert "--inherited" not in told
    assert "fanwire-collect - sign up" in (tmp_path / "fanwire-collect.1").read_text().replace("\\", "")
    if man := shutil.which("man"):
        for path in tmp_path.iterdir():
            done = subprocess.run([man, "--warnings", "-l", path], capture_output=True, text=True, check=True)
            assert done.stderr == "", path

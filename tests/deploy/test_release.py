"""The description and the files that a package index gets."""

import email
import tomllib
import zipfile

from tests.once import wheel
from tests.stack import CHECKOUT


def test_the_wheel_tells_an_index_what_it_needs() -> None:
    """The metadata have the front page, the licence, and of the extras, `all` with everything that services use.

    The version stands in pyproject.toml alone.
    """
    with zipfile.ZipFile(wheel()) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(name))
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert told["Version"] == project["version"]
    assert told["License-Expression"] == project["license"]
    assert told["Description-Content-Type"] == "text/markdown"
    payload = told.get_payload(decode=True)
    assert isinstance(payload, bytes)
    assert payload.decode().strip() == (CHECKOUT / "README.md").read_text().strip()
    needs = {extra: {line for line in told.get_all("Requires-Dist", ()) if line.endswith(f"'{extra}'")}
             for extra in ("all", "console", "uplink")}  # fmt: skip
    parts = needs["console"] | needs["uplink"]
    assert {line.partition(";")[0] for line in needs["all"]} == {line.partition(";")[0] for line in parts}
    extras = project["optional-dependencies"]
    assert len(needs["all"]) == len(extras["console"]) + len(extras["uplink"])

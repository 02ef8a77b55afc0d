"""The place of the settings file. Standard library alone: the transmitter's opener looks there with privilege."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

VARIABLE: Final = "FANWIRE_CONFIG"
SYSTEM: Final = Path("/etc/fanwire/fanwire.toml")
IS_CHECKOUT: Final = Path(__file__).parents[2].joinpath("pyproject.toml").exists()
"""A checkout reads no file that is not named: its tests and `make run` do the same on every host."""


def settings_file(
    named: Path | None, environment: Mapping[str, str] = os.environ, *, look: bool = not IS_CHECKOUT
) -> Path | None:
    """Return the file that is named, by `--config` or the variable, else the first that is found; None: there is none.

    An empty variable says that no file is to be read. `look`: also where no file is named.
    """
    if named is not None or VARIABLE in environment:
        return named or (Path(text) if (text := environment[VARIABLE]) else None)
    home = environment.get("XDG_CONFIG_HOME") or os.path.expandvars("$HOME/.config")
    places = (SYSTEM, Path(home, "fanwire", SYSTEM.name)) if look else ()
    return next((place for place in places if os.path.lexists(place)), None)

"""The version of fanwire that is installed."""

import sys
from functools import cache
from pathlib import Path
from typing import Final

NOT_INSTALLED: Final = "not installed"


@cache
def release() -> str:
    """Return the version at the first call, or `NOT_INSTALLED` in a checkout that was never installed.

    It is read off the name of the folder that pip makes: importlib.metadata takes 30 ms to load, in every process.
    """
    found = (each for folder in sys.path for each in Path(folder).glob("fanwire-*.dist-info"))
    return next((each.name.split("-")[1].removesuffix(".dist") for each in found), NOT_INSTALLED)

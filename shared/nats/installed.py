"""A check whether the packages of the extra `uplink` are there; it imports none of them."""

from importlib.util import find_spec
from typing import Final

from shared.process.lifecycle import UNAVAILABLE, OperatorError
from shared.settings.uplink import Uplink

NEEDED: Final = ("nats", "nkeys")


def check_installed(uplink: Uplink) -> None:
    """Raise OperatorError where these settings need a package that is missing."""
    if uplink.servers and (missing := [name for name in NEEDED if find_spec(name) is None]):
        told = f"[uplink] servers: needs {' and '.join(missing)}: pip install 'fanwire[uplink]'"
        raise OperatorError(UNAVAILABLE, told)

"""Services that run only where the settings ask for them."""

import pytest

from shared.bus.curve_keys import ROLES, write_keys
from shared.settings.opt_in import OPT_IN
from tests.stack import Stack


@pytest.mark.parametrize("service", OPT_IN)
def test_nobody_has_to_make_it_a_key(stack: Stack, service: str) -> None:
    """A service that is not asked for stays up where an earlier release has made the keys, and ends in order."""
    keys = stack.directory / "keys"
    keys.mkdir()
    list(write_keys(keys, [role for role in ROLES if role not in OPT_IN]))
    stack.configure(f'keys = "{keys}"\n')
    running = stack.start(service)
    assert running.stop() == 0
    assert [line["level"] for line in running.log if line["level"] != "info"] == []

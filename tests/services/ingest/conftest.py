from collections.abc import Iterator

import pytest

from services.broker.proxy import Proxy
from tests.builders import BusEnds, kill_all
from tests.stack import Stack


@pytest.fixture
def bus(stack: Stack) -> Iterator[BusEnds]:
    """A broker, in this process, and the test's own ends of its bus."""
    with Proxy(stack.bus, 256):
        with BusEnds(stack.bus) as ends:
            yield ends
        kill_all(stack)

from types import SimpleNamespace
from typing import Any, cast

from services.ingest.flows.exporters import ExporterTracker
from services.ingest.flows.template_cache import Ready
from services.ingest.template_feed import MAX_DATAGRAMS, TemplateFeed
from shared.bus.bodies.template_messages import Renewals
from shared.bus.zmq_sockets import Publisher


def test_renewals_that_the_bus_refuses_are_owed() -> None:
    """The queue of the bus is full: they go before the next datagrams, in their order, unless nobody wants them."""
    came, room, wanted = list[bytes](), [0], [True]

    def publish(_topic: str, body: Any) -> bool:
        assert isinstance(body, Renewals)
        room[0] -= 1
        if room[0] >= 0:
            came.extend(each.payload for each in body.datagrams)
        return room[0] >= 0

    reader = SimpleNamespace(renewals=list[Ready](), renewing=True)
    feed = TemplateFeed("flows", cast(Publisher, SimpleNamespace(publish=publish, wanted=lambda _: wanted[0])))
    numbers = iter(range(10 * MAX_DATAGRAMS))

    def observe(fresh: int, takes: int) -> int:
        reader.renewals += [Ready(bytes(16), 9, b"%016d" % next(numbers), 0, 0, 0) for _ in range(fresh)]
        room[0] = takes
        feed.observe(cast(ExporterTracker, SimpleNamespace(templates=reader)))
        return len(came)

    assert observe(3, 0) == 0
    assert observe(MAX_DATAGRAMS, 1) == MAX_DATAGRAMS
    assert observe(0, 1) == MAX_DATAGRAMS + 3
    assert observe(3 * MAX_DATAGRAMS, 2) == 3 * MAX_DATAGRAMS + 3
    assert observe(0, 1) == 4 * MAX_DATAGRAMS + 3
    assert came == [b"%016d" % number for number in range(len(came))]
    observe(3, 0)
    wanted[0] = False
    assert (observe(0, 0), reader.renewing) == (4 * MAX_DATAGRAMS + 3, False)
    wanted[0] = True
    assert (observe(0, 1), reader.renewing) == (4 * MAX_DATAGRAMS + 3, True)

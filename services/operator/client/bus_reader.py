"""The bus for the length of a command; without a broker the command ends in one line."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import zmq

from shared.bus.endpoint import BusLink, open_link
from shared.bus.zmq_sockets import Subscriber, broker_is_up, new_context
from shared.process.lifecycle import UNAVAILABLE, OperatorError
from shared.settings.model import Settings

if TYPE_CHECKING:
    from shared.bus.loans.borrower import Borrower


@contextmanager
def connected(settings: Settings) -> Iterator[tuple[zmq.Context[zmq.Socket[bytes]], BusLink]]:
    """Yield a context for sockets of the bus, and the link to connect them by. OperatorError (69) without a broker."""
    link = open_link(settings.bus, "operator")
    if not broker_is_up(settings.bus.path, link):
        where = settings.bus.connect or settings.bus.path
        cure = "start it with `fanwire run`, or name the settings of the one that runs by --config or FANWIRE_CONFIG"
        raise OperatorError(UNAVAILABLE, f"no broker at {where}; {cure}{settings.bus.name_hint}")
    context = new_context()
    try:
        yield context, link
    finally:
        context.term()


@contextmanager
def subscribed(settings: Settings, prefix: str, borrower: "type[Borrower] | None" = None) -> Iterator[Subscriber]:
    """Subscribe to the topics that begin with `prefix`. OperatorError (69) when there is no broker.

    Who takes datagrams hands in what borrows payloads that are lent.
    """
    bus = settings.bus
    with (
        connected(settings) as (context, link),
        closing(Subscriber(context, bus.path, bus.high_water_mark, link, borrower)) as subscriber,
    ):
        subscriber.subscribe(prefix)
        yield subscriber

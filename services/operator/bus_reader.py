"""The bus for the length of a command; without a broker it ends in one line."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import zmq

from shared.bus import Subscriber, broker_is_up, new_context
from shared.lifecycle import UNAVAILABLE, OperatorError
from shared.settings import Settings


@contextmanager
def connected(settings: Settings) -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """A context to make sockets of the bus in. OperatorError (69) when there is no broker."""
    if not broker_is_up(settings.bus.path):
        raise OperatorError(
            UNAVAILABLE,
            f"no broker at {settings.bus.path}; is fanwire running? start it with `make run` or `honcho start`",
        )
    context = new_context()
    try:
        yield context
    finally:
        context.term()


@contextmanager
def subscribed(settings: Settings, prefix: str) -> Iterator[Subscriber]:
    """Subscribe to the topics that begin with `prefix`. OperatorError (69) when there is no broker."""
    bus = settings.bus
    with connected(settings) as context, closing(Subscriber(context, bus.path, bus.high_water_mark)) as subscriber:
        subscriber.subscribe(prefix)
        yield subscriber

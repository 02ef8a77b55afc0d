"""A subscription to the bus for the length of a command; without a broker it ends in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from shared.bus import Subscriber, broker_is_up, new_context
from shared.lifecycle import UNAVAILABLE, OperatorError
from shared.settings import Settings


@contextmanager
def subscribed(settings: Settings, prefix: str) -> Iterator[Subscriber]:
    """Subscribe to the topics that begin with `prefix`. OperatorError (69) when there is no broker."""
    if not broker_is_up(settings.bus.path):
        raise OperatorError(
            UNAVAILABLE,
            f"no broker at {settings.bus.path}; is fanwire running? start it with `make run` or `honcho start`",
        )
    context = new_context()
    subscriber = Subscriber(context, settings.bus.path, settings.bus.high_water_mark)
    try:
        subscriber.subscribe(prefix)
        yield subscriber
    finally:
        subscriber.close()
        context.term()

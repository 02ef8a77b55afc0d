"""Parts of the gateway that end alone, where a fault of ours comes to light in them."""

import contextlib
from collections.abc import Iterator

from shared.log import get_logger

log = get_logger()


@contextlib.contextmanager
def surviving(event: str, **told: object) -> Iterator[None]:
    """Log a fault of ours as this event, and go on: one entry, or one peer, must not end the service for others."""
    try:
        yield
    except Exception as error:
        log.error(event, **told, reason=repr(error), exc_info=error)

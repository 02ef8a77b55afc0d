"""Parts of the loop that end alone, where a fault of ours comes to light in them."""

import contextlib
from collections.abc import Iterator

from shared.log import get_logger

log = get_logger()


@contextlib.contextmanager
def surviving(what: str) -> Iterator[None]:
    """Log a fault in what is done for all entries in turn, and go on: one entry must not end the service for others."""
    try:
        yield
    except Exception as error:
        log.error(
            "what is due each second has failed, and is tried again", what=what, reason=repr(error), exc_info=error
        )

"""The log: structlog, lines for people or one JSON object a line.

Everything that logs gets its logger here. structlog would load rich to draw tracebacks: a sixth of every start, and
3 MB. Here they are text already, and rich is not loaded.
"""

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

_HIDDEN = "rich" not in sys.modules
if _HIDDEN:
    sys.modules["rich"] = None  # type: ignore[assignment]  # as if it were not installed
import structlog  # noqa: E402

if _HIDDEN:
    del sys.modules["rich"]  # the operator's tables are drawn by it


COLLECTOR_HEALTH: Final = "collector health changed"
WORKER_CAME: Final = "worker came"
WORKER_GONE: Final = "worker gone"
HOST_MOVED: Final = "host name has another address"
HOST_UNANSWERED: Final = "host name has no answer"
HOST_ANSWERED: Final = "host name has an answer again"
HOST_REFUSED: Final = "host name leads to an address that is refused"
LOSS_BEGAN: Final = "loss began"
LOSS_ENDED: Final = "loss ended"
DISCREPANCY: Final = "accounts do not add up"
REMOVED_BY_ADMIN: Final = "client removed by an admin"
PROBED_BY_ADMIN: Final = "probe sent by an admin"
WITHHELD_BY_ADMIN: Final = "copies withheld by an admin"
RELEASED_BY_ADMIN: Final = "copies released by an admin"
EVENTS: Final = (
    *(COLLECTOR_HEALTH, WORKER_CAME, WORKER_GONE),
    *(HOST_MOVED, HOST_UNANSWERED, HOST_ANSWERED, HOST_REFUSED),
    *(LOSS_BEGAN, LOSS_ENDED, DISCREPANCY),
    *(REMOVED_BY_ADMIN, PROBED_BY_ADMIN, WITHHELD_BY_ADMIN, RELEASED_BY_ADMIN),
)
"""Events that programs may look for in the log: their names stay, and services/operator/README.md lists them."""


def get_logger() -> Any:
    """Return a logger; what it logs goes where `configure` says."""
    return structlog.get_logger()


def configure(admit: Callable[[str], int], form: str, *, timed: bool) -> None:
    """Log to stderr. `admit` is asked of each warning and error how many it stands for; 0 drops it.

    `form` is that of the lines, as `[log] format` has it; `timed`: another program puts the time before those for
    people.
    """
    terminal = sys.stderr.isatty()
    text = form == "text" or (form == "auto" and terminal)
    stamp: list[structlog.typing.Processor] = []
    if not (text and timed):
        stamp = [structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text)]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=terminal) if text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            partial(_restrain, admit),
            structlog.processors.add_log_level,
            *stamp,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Hand()], force=True)


def _restrain(
    admit: Callable[[str], int], _logger: object, level: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Drop a line that was just logged, and later add how often; `event`, `cause` and `of` tell what is the same.

    Lines that only the operator provokes are always logged: all that are below a warning, and an `answer`.
    """
    if event.pop("answer", False) or level in ("debug", "info"):
        return event
    count = admit(f"{event['event']} {event.get('cause', '')} {event.get('of', '')}".rstrip())
    if not count:
        raise structlog.DropEvent
    return {**event, **suppressed(count)}


def suppressed(count: int) -> dict[str, int]:
    """Return the field of a line that stands for `count` of its kind: how many were left out, if any were."""
    return {"suppressed": count - 1} if count > 1 else {}


class _Hand(logging.Handler):
    """Puts what libraries log, such as asyncio, on our log."""

    def emit(self, record: logging.LogRecord) -> None:
        get_logger().log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info or None)

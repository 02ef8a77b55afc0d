"""The applier: the one process with CAP_NET_ADMIN. It takes plans from its planner, and makes rules of what is allowed.

It reads the socket pair, its settings, and the kernel's answers. It ends when the planner does, or sends what no
planner sends, and the table ends with it.
"""

import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from services.offload.applying.nftables.connection import Nftables
from services.offload.applying.policy import Policy, RefusedError, sources_of
from services.offload.applying.rules import Marks
from services.offload.applying.table import Table
from services.offload.channel import Answer, ClosedError, Request, UnfitError, name_error, receive, send
from services.offload.kernel_plan import KernelPlan
from services.offload.kernel_routes import KernelRoutes
from shared.log import get_logger
from shared.process.lifecycle import configure_logging, service_parser
from shared.process.privileges import CAP_NET_ADMIN, relinquish
from shared.settings.explain import SettingsError
from shared.settings.file import load
from shared.settings.model import Settings

OK: Final = 0
UNFIT: Final = 76
"""sysexits.h: EX_PROTOCOL."""

log = get_logger()


class Applier:
    """Answers the planner's requests."""

    def __init__(self, channel: socket.socket, planner: int, settings: Settings, config: Path | None) -> None:
        self._channel = channel
        self._planner = planner
        self._settings = settings
        self._config = config
        self._connection = Nftables()
        offload = settings.offload
        self._table = Table(self._connection, Marks(offload.mark_mask, offload.mark_shift), sources_of(settings))
        self._routes = KernelRoutes()
        self._policy = Policy(settings, self._routes.own_among, self._routes.frames_to)

    def serve(self) -> int:
        """Answer requests until the planner ends; return the exit code."""
        try:
            while True:
                request = receive(self._channel, Request, self._planner)
                send(self._channel, self._answer(request))
        except ClosedError:
            return OK
        except UnfitError as error:
            log.error("the applier ends: what came is from no planner", reason=str(error))
            return UNFIT

    def close(self) -> None:
        """Close the connections to the kernel: the rules are gone."""
        self._connection.close()
        self._routes.close()

    def _answer(self, request: Request) -> Answer:
        try:
            match request.kind:
                case "apply":
                    return self._apply(request)
                case "count":
                    found = self._table.counters().items()
                    counters = tuple((int(name[1:]), packets, size) for name, (packets, size) in found)
                    return Answer(request.number, counters=counters)
                case "reload":
                    self._reload()
        except RefusedError as error:
            log.error("plan refused", reason=str(error))
            return Answer(request.number, f"refused: {error}")
        except OSError as error:
            return Answer(request.number, name_error(error))
        return Answer(request.number)

    def _apply(self, request: Request) -> Answer:
        plan = request.plan or KernelPlan((), (), ())
        self._policy.check(plan)
        self._table.replace(plan)
        return Answer(request.number)

    def _reload(self) -> None:
        """Read the streams again, whose ports are allowed; what else has changed needs a restart."""
        try:
            fresh = load(self._config)
        except SettingsError as error:
            raise RefusedError(str(error)) from None
        self._settings = msgspec.structs.replace(self._settings, streams=fresh.streams)
        self._policy = Policy(self._settings, self._routes.own_among, self._routes.frames_to)


def main(arguments: Sequence[str]) -> int:
    """Serve the planner at the other end of a socket pair, which is this process's parent; return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the planner's end is this one's
    relinquish(None, keep=1 << CAP_NET_ADMIN)
    parser = service_parser("offload", "Makes rules of the planner's plans.")
    parser.add_argument("--applier", type=int, required=True)
    parser.add_argument("--require-privilege", action="store_true")
    options = parser.parse_args(arguments)
    try:
        settings = load(options.config)
    except SettingsError:
        return OK  # the planner says it
    configure_logging(settings.log.format)
    with socket.socket(fileno=options.applier) as channel:
        return Applier(channel, os.getppid(), settings, options.config).serve()

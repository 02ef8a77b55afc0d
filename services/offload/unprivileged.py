"""Runs the planner once the opener has given up every privilege: this is the process that reads the bus."""

import argparse
import errno
import socket
from collections.abc import Sequence

from services.offload.opener import NOT_WANTED
from services.offload.planning.applier_link import ApplierLink
from services.offload.service import OffloadService
from shared.bus.endpoint import open_link
from shared.log import get_logger
from shared.process.lifecycle import Lifecycle, run, service_parser, stay_up, worker_name
from shared.process.privileges import SETS, own_status
from shared.settings.model import Settings

log = get_logger()


def main(arguments: Sequence[str]) -> int:
    """Run the planner, with the applier's channel if there is one; return its exit code."""
    parser = service_parser("offload", "Lets the kernel make the copies that it can make.")
    parser.add_argument(
        "--require-privilege",
        action="store_true",
        help="exit with 77 rather than start without an applier, with 69 rather than go on without it",
    )
    parser.add_argument("--inherited", required=True, help=argparse.SUPPRESS)
    return run(_serve, parser.parse_args(arguments), _check)


def _check(settings: Settings) -> None:
    if settings.offload.interfaces:
        open_link(settings.bus, "offload")


def _serve(arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    link = adopt(arguments.inherited)
    if held := [name for name in SETS if int(own_status()[name], 16)]:
        raise PermissionError(errno.EPERM, f"it still holds capabilities: {', '.join(held)}", "offload refuses to run")
    name = worker_name("offload")
    if not settings.offload.interfaces:
        stay_up(name, lifecycle)
        return
    if link.reason:
        log.warning(link.reason)
    with OffloadService(name, settings, link, applier_required=arguments.require_privilege) as service:
        service.run(lifecycle)


def adopt(text: str) -> ApplierLink:
    """Take over the opener's end of the socket pair, by the value of `--inherited`; or the reason why there is none.

    >>> adopt("none:no CAP_NET_ADMIN").reason
    'no CAP_NET_ADMIN'
    """
    if text.startswith(NOT_WANTED):
        return ApplierLink(None, text.removeprefix(NOT_WANTED))
    try:
        descriptor, process = map(int, text.split(":"))
        channel = socket.socket(fileno=descriptor)
        if (channel.family, channel.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            channel.close()
            raise ValueError(text)
    except (ValueError, OverflowError, OSError):
        reason = "--inherited is for the opener only, and does not name its socket; leave it out"
        raise PermissionError(errno.EPERM, reason, "offload refuses to run") from None
    channel.set_inheritable(False)
    return ApplierLink(channel, "", process)

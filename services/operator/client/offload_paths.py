"""The ways of collectors' copies, as offload tells them: by the kernel, or why not."""

import time
from typing import Final

from services.operator.client.bus_reader import subscribed
from shared.bus.bodies.offload_messages import PATHS_TOPIC, CollectorPath, OffloadPaths
from shared.bus.pieces import Assembler
from shared.process.lifecycle import OperatorError
from shared.settings.model import Settings

HEARD_SECONDS: Final = 1.5
"""Offload tells each new subscriber at once, and all of them each second."""


def heard_paths(settings: Settings) -> dict[str, CollectorPath]:
    """Return the way of each collector by name; none where the settings name no interface, or offload does not tell."""
    if not settings.offload.interfaces:
        return {}
    assembler, deadline = Assembler[OffloadPaths](), time.monotonic() + HEARD_SECONDS
    try:
        with subscribed(settings, PATHS_TOPIC) as subscriber:
            while (left := deadline - time.monotonic()) > 0:
                subscriber.socket.poll(int(left * 1000) + 1)
                while message := subscriber.receive():
                    body = message.body
                    if not isinstance(body, OffloadPaths):
                        continue
                    if pieces := assembler.add((message.envelope.boot, body.report), body):
                        return {path.name: path for piece in pieces for path in piece.paths}
    except (
        OperatorError,
        PermissionError,
    ):  # no broker, or none that this user may reach: the list is told all the same
        pass
    return {}

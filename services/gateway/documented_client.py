"""The documented client: sends a name, and gets the list of all clients."""

import json
import os
import socket
from collections.abc import Iterable
from typing import Final

from shared.net.addresses import Endpoint
from shared.process.lifecycle import FAILED, UNAVAILABLE, USAGE, OperatorError

DEFAULT: Final = Endpoint("tcp", "127.0.0.1", 5000)
TIMEOUT_SECONDS: Final = 30.0


def sign_up(name: str, endpoints: Iterable[Endpoint]) -> str:
    """Sign up under `name` at the first TCP endpoint; return the list, indented by 4."""
    if not name:
        # The gateway would wait for a first byte.
        raise OperatorError(USAGE, "the name is empty; --name takes at least one byte")
    if name.startswith("{"):
        raise OperatorError(USAGE, "the gateway would read this name as JSON; --name takes one that begins without {")
    endpoint = next((endpoint for endpoint in endpoints if endpoint.scheme == "tcp"), DEFAULT)
    try:
        with socket.create_connection((endpoint.host, endpoint.port), TIMEOUT_SECONDS) as connection:
            connection.sendall(os.fsencode(name))
            text = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError as error:
        reason = error.strerror or error
        raise OperatorError(
            UNAVAILABLE, f"{endpoint}: {reason}; start the gateway with `python -m services.gateway`"
        ) from None
    try:
        answer = dict(json.loads(text))
    except (TypeError, ValueError):
        raise OperatorError(FAILED, f"{endpoint}: the answer is not a list of clients; is this the gateway?") from None
    if answer.get("ok") is False:
        raise OperatorError(FAILED, f"{answer['error']}: {answer['message']}")
    return json.dumps(answer, indent=4)

"""`fanwire ready`: waits until every service has been heard on the bus."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from services.operator.cli.arguments import Subparsers, add_command, positive_number
from services.operator.client.bus_reader import subscribed
from shared.bus.endpoint import open_link
from shared.bus.messages import Status
from shared.bus.zmq_sockets import broker_is_up
from shared.net.addresses import Endpoint
from shared.process.lifecycle import OK, UNAVAILABLE, OperatorError
from shared.settings.explain import did_you_mean
from shared.settings.model import Settings
from shared.settings.opt_in import OPT_IN, asked_for

SERVICES: Final = ("broker", "gateway", "ingest", "forwarder", "transmitter")
OPTIONAL: Final = ("console",)
"""Services that copies flow without; waited for where they are named."""
LOOK_SECONDS: Final = 0.05
HINT_PORT: Final = 9514
ANY_ADDRESS: Final = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses to send to where a listener takes every address of a host."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "ready", run, "wait until services are ready")
    parser.add_argument(
        "services",
        nargs="*",
        type=_service,
        metavar="SERVICE",
        help=f"default: {' '.join(SERVICES)}, and those that the settings ask for",
    )
    parser.add_argument("--timeout", type=positive_number, default=30.0, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--hint", action="store_true", help="print what to try next")


def _service(text: str) -> str:
    """Check that there is such a service: the type of an argument, as `choices` would ask for one."""
    known = (*SERVICES, *OPT_IN, *OPTIONAL)
    if text not in known:
        raise argparse.ArgumentTypeError(
            f"no service {text!r}{did_you_mean(text, known)}; the services are: {', '.join(known)}"
        )
    return text


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Wait for the services; OperatorError (69) names those that were not heard in time."""
    wanted = arguments.services or (*SERVICES, *asked_for(settings))
    if missing := set(wanted) - _heard(settings, set(wanted), time.monotonic() + arguments.timeout):
        names = " ".join(name for name in wanted if name in missing)
        raise OperatorError(UNAVAILABLE, f"not ready after {arguments.timeout:g} s, see their logs: {names}")
    print(f"all ready: {' '.join(wanted)}")
    if arguments.hint:
        named = arguments.config or os.environ.get("FANWIRE_CONFIG")
        print(*(f"    {line}" for line in hints(settings, named)), sep="\n")
    return OK


def _heard(settings: Settings, wanted: set[str], deadline: float) -> set[str]:
    """Return the services that report, as soon as all wanted ones do."""
    heard: set[str] = set()
    link = open_link(settings.bus, "operator")
    while not broker_is_up(settings.bus.path, link):
        if time.monotonic() >= deadline:
            return heard
        time.sleep(LOOK_SECONDS)
    with subscribed(settings, "status/") as subscriber:
        while not wanted <= heard and (left := deadline - time.monotonic()) > 0:
            subscriber.socket.poll(int(left * 1000) + 1)
            while message := subscriber.receive():
                if isinstance(message.body, Status):
                    heard.add(message.body.service.partition(".")[0])
    return heard


def hints(settings: Settings, named: Path | str | None = None) -> Iterator[str]:
    """Yield lines that can be pasted into another terminal, and the address of the live page.

    `named` is the file of the settings: without it a command there would look for another bus.
    """
    yield from _page(settings)
    config = f" --config {shlex.quote(str(named))}" if named else ""
    yield f"{_program()} watch{config}  # in another terminal, as the lines below"
    listeners = [(stream, at) for stream in settings.streams for at in stream.endpoints if at.scheme == "udp"]
    for stream, listener in listeners[:1]:
        yield f"echo 'Hello you there!' | nc -u -w1 {_for_nc(listener)}"
        request = f'{{"op":"register","name":"siem","streams":["{stream.name}"],"port":{HINT_PORT}}}'
        if near := settings.gateway.near:
            yield f"printf '{request}\\n' | nc -N {_for_nc(near)}"


def _page(settings: Settings) -> Iterator[str]:
    """Yield the address of the live page, for a browser on this host."""
    for endpoint in settings.console.endpoints[:1]:
        if endpoint.path:
            yield f"the live page is at {endpoint.path}"
        else:
            reached = replace(endpoint, host=ANY_ADDRESS.get(endpoint.host, endpoint.host))
            yield f"{reached}/  # the live page, in a browser"


def _program() -> str:
    """Return the command that starts fanwire from here: a checkout's own environment is not on PATH."""
    installed = Path(sys.prefix) / "bin" / "fanwire"
    return os.path.relpath(installed) if Path(sys.prefix).name == ".venv" else "fanwire"


def _for_nc(endpoint: Endpoint) -> str:
    if endpoint.path:
        return f"-U {endpoint.path}"
    return f"{ANY_ADDRESS.get(endpoint.host, endpoint.host)} {endpoint.port}"

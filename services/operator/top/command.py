"""`fanwire top`: the loop. On a terminal it draws frames and heeds keys; elsewhere it prints lines."""

import argparse
import os
import shutil
import sys
import time
from typing import Final

import zmq

from services.operator.cli.arguments import Subparsers, add_command, positive
from services.operator.client.picture_reader import RATES_SECONDS, Watched, watched
from services.operator.top.state import ScreenState
from services.operator.top.terminal import Terminal
from services.operator.top.views import VIEWS, lines
from shared.monitoring.picture import Picture
from shared.process.lifecycle import OK, UNAVAILABLE, Lifecycle, OperatorError, next_tick
from shared.settings.model import Settings

REFRESH_SECONDS: Final = 1.0
"""Services report each second."""
AFTER_SECONDS: Final = 0.2
"""Time that the reports of a second may take to come."""
DUMB: Final = ("", "dumb")
NAMES: Final = [view.name for view in VIEWS]


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "top", run, "show streams, exporters and collectors, live; ? shows the keys")
    parser.add_argument("view", nargs="?", choices=NAMES, default=NAMES[0], help="default: %(default)s")
    parser.add_argument("-n", dest="count", type=positive, metavar="N", help="end after N refreshes, one a second")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Show until `q` or Ctrl-C, or so many times."""
    lifecycle = Lifecycle()
    state = ScreenState(view_number=NAMES.index(arguments.view))
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM", "") not in DUMB
    if is_terminal and arguments.count is None:
        with Terminal() as terminal:
            _watch(settings, lifecycle, state, terminal)
    else:
        with watched(settings) as bus:
            _print(bus, lifecycle, state, arguments.count or sys.maxsize, as_frames=is_terminal)
    return OK


def _print(bus: Watched, lifecycle: Lifecycle, state: ScreenState, count: int, *, as_frames: bool) -> None:
    """Print whole pictures, the first as soon as rates are known."""
    due_at = time.monotonic() + RATES_SECONDS
    poller = _poller(bus, lifecycle)
    while count and not lifecycle.draining:
        poller.poll(_milliseconds(due_at))
        bus.read()
        if (now := time.monotonic()) >= due_at:
            due_at, count = _next(now), count - 1
            picture = bus.picture()
            print(_draw(state, picture, 0) if as_frames else "\n".join(lines(picture)), flush=True)


def _watch(settings: Settings, lifecycle: Lifecycle, state: ScreenState, terminal: Terminal) -> None:
    """Show the bus on the terminal, whether it is there or not."""
    while not (lifecycle.draining or state.ended):
        try:
            with watched(settings) as bus:
                _show(bus, lifecycle, state, terminal)
        except OperatorError as error:
            if error.exit_code != UNAVAILABLE:
                raise
            _show(None, lifecycle, state, terminal, str(error).partition(";")[0])


def _show(
    bus: Watched | None, lifecycle: Lifecycle, state: ScreenState, terminal: Terminal, said: str = "waiting"
) -> None:
    """Draw each second, and at once what a key changes; without a bus return after a second, to try again."""
    poller = _poller(bus, lifecycle)
    if terminal.input is not None:
        poller.register(terminal.input, zmq.POLLIN)
    picture: Picture | None = None
    due_at, give_up_at = 0.0, time.monotonic() + (float("inf") if bus else REFRESH_SECONDS)
    while not (lifecycle.draining or state.ended) and time.monotonic() < give_up_at:
        if (now := time.monotonic()) >= due_at:
            due_at = _next(now)
            if bus and not state.paused:
                picture = bus.picture()
            terminal.show(_draw(state, picture, said=said))
        ready = dict(poller.poll(_milliseconds(due_at)))
        lifecycle.heed()
        if bus:
            bus.read()
        if terminal.input in ready:
            for key in terminal.read_keys():
                state.press(key)
        if ready.keys() - {bus and bus.socket}:  # a key, or another size
            terminal.show(_draw(state, picture, said=said))


def _draw(state: ScreenState, picture: Picture | None, height: int | None = None, said: str = "") -> str:
    from services.operator.top.screen import draw  # loads rich

    size = shutil.get_terminal_size()
    return draw(state, picture, size.columns, size.lines if height is None else height, said)


def _poller(bus: Watched | None, lifecycle: Lifecycle) -> zmq.Poller:
    poller = zmq.Poller()
    poller.register(lifecycle.fileno(), zmq.POLLIN)
    if bus:
        poller.register(bus.socket, zmq.POLLIN)
    return poller


def _next(now: float) -> float:
    """Return the time of the next refresh: a moment after the services' next report."""
    return next_tick(now + REFRESH_SECONDS / 2, REFRESH_SECONDS) + AFTER_SECONDS


def _milliseconds(until: float) -> int:
    return int(1000 * max(0.0, until - time.monotonic())) + 1

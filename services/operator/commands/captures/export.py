"""`fanwire export`: writes a part of a stream's past, out of the journal, as a capture."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.cli.numbers import counted
from services.operator.cli.output import NO_ROOM, STANDARD_OUTPUT, open_capture, say
from services.operator.cli.progress import Progress
from services.operator.client.journal_past import Wanted, add_past_arguments, find_past, shown, tell_losses
from shared.capture.pcapng import Destination
from shared.capture.writer import CaptureWriter
from shared.process.lifecycle import FAILED, OK, Lifecycle, OperatorError
from shared.settings.model import Settings


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "export", run, "write a part of a stream's past as a capture, for Wireshark")
    add_past_arguments(parser)
    parser.add_argument(
        "--write",
        type=Path,
        default=STANDARD_OUTPUT,
        metavar="FILE.pcapng",
        help="default: standard output",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Write all of it, or what was written until Ctrl-C; return 1 where the journal is damaged."""
    lifecycle = Lifecycle()
    wanted = find_past(arguments, settings)
    with ExitStack() as closing:
        file = open_capture(arguments.write, closing)
        progress = closing.enter_context(Progress("datagrams written"))
        try:
            written, first_ns, last_ns = _write(lifecycle, wanted, file.fileno(), arguments.stream, progress)
        except OSError as error:
            if arguments.write == STANDARD_OUTPUT or error.errno not in NO_ROOM:
                raise
            raise OperatorError(FAILED, f"{arguments.write}: {error.strerror}; the capture ends here") from None
    if written:
        say(f"{counted(written, 'datagram')} of {arguments.stream}, from {shown(first_ns)} to {shown(last_ns)}")
    else:
        exporters = f" from {arguments.source}" if arguments.source else ""
        say(f"warning: there is no datagram of {arguments.stream}{exporters} in this time")
    return FAILED if tell_losses(wanted) else OK


def _write(
    lifecycle: Lifecycle, wanted: Wanted, descriptor: int, stream: str, progress: Progress
) -> tuple[int, int, int]:
    """Write the datagrams; return their number, and the earliest and the latest time of one."""
    writer = CaptureWriter(descriptor, stream, Destination())
    written = first_ns = last_ns = 0
    for batch, rows, destination in wanted.batches():
        writer.write(batch, rows, destination)
        first_ns, last_ns = min(first_ns or batch.received_ns, batch.received_ns), max(last_ns, batch.received_ns)
        written += len(rows)
        progress.show(written)
        if lifecycle.draining:
            break
    return written, first_ns, last_ns

"""`fanwire frame`: a raw Ethernet frame, byte for byte, through the transmitter."""

import argparse
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from services.operator.checksum_offload import switched_off
from services.operator.cli.arguments import Subparsers, add_command, interface_name, or_usage, whole
from services.operator.client.raw_frames import transmit
from shared.bus.frame_requests import make_frame, parse_hex, parse_mac
from shared.bus.messages import MAX_FRAME, MAX_FRAMES
from shared.process.lifecycle import USAGE, OperatorError
from shared.settings.model import Settings
from shared.settings.values import parse_ethertype


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "frame", run, "send a raw Ethernet frame through the transmitter")
    mac, octets, ethertype = (partial(or_usage, parse) for parse in (parse_mac, parse_hex, parse_ethertype))
    parser.add_argument("interface", type=interface_name, metavar="IFACE")
    parser.add_argument("--destination", type=mac, required=True, metavar="MAC")
    parser.add_argument("--source", type=mac, required=True, metavar="MAC")
    parser.add_argument("--ethertype", type=ethertype, required=True, metavar="N", help="such as 0x0801")
    payload = parser.add_mutually_exclusive_group(required=True)
    payload.add_argument("--payload", type=_payload, metavar="TEXT|@FILE", help="as UTF-8, or the content of FILE")
    payload.add_argument("--payload-hex", dest="payload", type=octets, metavar="HEX")
    parser.add_argument("--checksum", type=octets, default=b"", metavar="HEX", help="goes behind the payload")
    parser.add_argument("--count", type=whole(1, MAX_FRAMES), default=1, metavar="N", help="send it N times")
    parser.add_argument("--per-second", type=_pace, default=0.0, metavar="N", help="at this pace; default: at once")
    parser.add_argument("--own-fcs", action="store_true", help="the checksum is the frame check sequence")
    parser.add_argument(
        "--no-checksum-offload", action="store_true", help="keep the driver from filling in checksums meanwhile"
    )


def _payload(text: str) -> bytes:
    if not text.startswith("@"):
        return os.fsencode(text)  # the bytes as given
    try:
        with Path(text[1:]).open("rb") as file:
            return file.read(MAX_FRAME + 1)  # more makes no frame
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[1:]}: {error.strerror}") from None


def _pace(text: str) -> float:
    pace = or_usage(float, text)
    if not 0 <= pace <= 1_000_000:  # NaN is out of range too
        raise argparse.ArgumentTypeError(f"expected frames a second up to 1000000, or 0: at once, not {text!r}")
    return pace


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Send the frame, and print how many have left."""
    parts = (arguments.destination, arguments.source, arguments.ethertype, arguments.payload, arguments.checksum)
    try:
        frame = make_frame(*parts, own_fcs=arguments.own_fcs)
    except ValueError as error:
        raise OperatorError(USAGE, str(error)) from None
    offload = switched_off(arguments.interface) if arguments.no_checksum_offload else nullcontext(lambda: False)
    with offload as stopped:
        return transmit(
            settings,
            arguments.interface,
            frame,
            count=arguments.count,
            per_second=arguments.per_second,
            own_fcs=arguments.own_fcs,
            stopped=stopped,
        )

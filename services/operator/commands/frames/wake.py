"""`fanwire wake`: wakes a computer by a magic frame (Wake-on-LAN), through the transmitter."""

import argparse
import fcntl
import socket
import struct
from functools import partial
from typing import Final

from services.operator.cli.arguments import Subparsers, add_command, interface_name, or_usage
from services.operator.client.raw_frames import transmit
from shared.bus.frame_requests import make_frame, parse_mac
from shared.process.lifecycle import FAILED, OperatorError
from shared.settings.model import Settings

ETHERTYPE: Final = 0x0842
BROADCAST: Final = b"\xff" * 6
SIOCGIFHWADDR: Final = 0x8927  # linux/sockios.h
ARPHRD_ETHER: Final = 1
IFREQ: Final = struct.Struct("16sH6s16x")
"""struct ifreq (netdevice(7)): a name, then a kind of hardware address and the address."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "wake", run, "wake a computer by Wake-on-LAN, through the transmitter")
    mac = partial(or_usage, parse_mac)
    parser.add_argument("mac", type=mac, metavar="MAC")
    parser.add_argument(
        "--interface", type=interface_name, required=True, metavar="IFACE", help="the interface the frame leaves by"
    )
    parser.add_argument(
        "--password", type=mac, default=b"", metavar="MAC", help="SecureOn: six bytes, written like a MAC"
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Send the magic frame."""
    payload = magic(arguments.mac, arguments.password)
    frame = make_frame(BROADCAST, own_mac(arguments.interface), ETHERTYPE, payload)
    return transmit(settings, arguments.interface, frame)


def magic(mac: bytes, password: bytes) -> bytes:
    """Return the bytes that the sleeping computer waits for: six times ff, sixteen times its address, any password."""
    return BROADCAST + mac * 16 + password


def own_mac(interface: str) -> bytes:
    """Return the interface's own address. OperatorError when there is no such interface, or it is not Ethernet.

    By ioctl: /sys/class/net shows the network namespace in which it was mounted, which need not be this one.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            answer = fcntl.ioctl(control, SIOCGIFHWADDR, IFREQ.pack(interface.encode(), 0, b""))
    except OSError as error:
        raise OperatorError(
            FAILED, f"interface {interface}: {error.strerror}; `ip link` lists the interfaces"
        ) from None
    _, kind, mac = IFREQ.unpack(answer)
    if kind != ARPHRD_ETHER:
        raise OperatorError(FAILED, f"interface {interface} is not Ethernet; name one that is")
    return bytes(mac)

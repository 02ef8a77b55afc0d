"""A network interface's transmit checksum offload: off while a command runs, and on again whatever ends it."""

import errno
import fcntl
import signal
import socket
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from shared.process.lifecycle import FAILED, NOT_PERMITTED, OperatorError

SIOCETHTOOL: Final = 0x8946  # linux/sockios.h
ETHTOOL_GTXCSUM: Final = 0x16  # linux/ethtool.h
ETHTOOL_STXCSUM: Final = 0x17
IFREQ: Final = struct.Struct("16sP16x")
"""struct ifreq (netdevice(7)): a name, and the address of a struct ethtool_value, which is command and data."""
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def switched_off(interface: str) -> Iterator[Callable[[], bool]]:
    """Switch the offload off; yield whether a signal has come, which takes effect once the offload is on again.

    OperatorError when it can't be switched; it is left alone when it was off before.
    """
    with _signals_held() as stopped:
        if not checksum_offload(interface):
            yield stopped
            return
        switch_checksum_offload(interface, on=False)
        try:
            yield stopped
        finally:
            switch_checksum_offload(interface, on=True)


@contextmanager
def _signals_held() -> Iterator[Callable[[], bool]]:
    """Yield whether a signal that would end this process has come; it takes effect afterwards."""
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in ENDING
        if signal.getsignal(number) != signal.SIG_IGN  # as under nohup(1)
    }
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def checksum_offload(interface: str) -> bool:
    """Return whether the interface's driver, or its hardware, fills in checksums."""
    return bool(_ethtool(interface, ETHTOOL_GTXCSUM))


def switch_checksum_offload(interface: str, *, on: bool) -> None:
    """Switch the driver's filling in of checksums on or off."""
    _ethtool(interface, ETHTOOL_STXCSUM, on)


def _ethtool(interface: str, command: int, data: int = 0) -> int:
    value = array("I", (command, data))
    request = IFREQ.pack(interface.encode(), value.buffer_info()[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, SIOCETHTOOL, request)
    except PermissionError:
        raise OperatorError(
            NOT_PERMITTED,
            f"switching the checksum offload of {interface} takes CAP_NET_ADMIN; "
            f"leave the option out and do it by hand: `sudo ethtool -K {interface} tx off`, and `tx on` afterwards",
        ) from None
    except OSError as error:
        reason = "there is no such interface" if error.errno == errno.ENODEV else error.strerror
        raise OperatorError(FAILED, f"checksum offload of {interface}: {reason}") from None
    return value[1]

"""Ethernet frames as people write them, and limits of a request to send them. No I/O."""

from typing import Final

from shared.bus.messages import MAX_FRAME, TransmitReply

HEADER_SIZE: Final = 14
"""Bytes of destination, source and ethertype (IEEE 802.3, 3.1.1)."""
FCS_SIZE: Final = 4
"""Bytes of the frame check sequence."""
VLAN_TAGS: Final = frozenset({0x8100, 0x88A8, 0x9100, 0x9200, 0x9300})
"""Ethertypes of VLAN tags: IEEE 802.1Q's of customer and service, and those that switches used before the second."""
UNPACED_PER_SECOND: Final = 50_000
"""An interface that takes large frames more slowly than this is slower than a gigabit."""
ANSWER_SECONDS: Final = 5.0
"""Time that the transmitter may take to answer, on top of the time that the frames take: the host may be busy."""

MAX_SENDING_SECONDS: Final = 3600.0
"""Time that the frames of one request may take at their pace: only a few requests may be under way."""


def parse_hex(text: str) -> bytes:
    """Return the bytes that hexadecimal digits stand for. ValueError when they are none.

    >>> parse_hex("0x1a2b3c4d") == parse_hex("1a:2b:3c:4d") == parse_hex("1a2b 3C4D")
    True
    """
    try:
        return bytes.fromhex(text.removeprefix("0x").replace(":", " "))
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not hexadecimal: expected two digits a byte") from None


def parse_mac(text: str) -> bytes:
    """Return the six bytes of a MAC address. ValueError when it is none.

    >>> parse_mac("01:02:03:04:05:06") == parse_mac("01-02-03-04-05-06") == parse_mac("0x010203040506")
    True
    """
    mac = parse_hex(text.replace("-", ":"))
    if len(mac) != 6:
        raise ValueError(f"{text[:40]!r} is not a MAC address such as 01:02:03:04:05:06")
    return mac


def make_frame(
    destination: bytes, source: bytes, ethertype: int, payload: bytes, checksum: bytes = b"", *, own_fcs: bool = False
) -> bytes:
    """Return the frame, with nothing between its parts, before them or behind. ValueError when it can't be one.

    With `own_fcs` the checksum is the frame check sequence itself, else whatever the protocol has at its end.
    """
    if own_fcs and len(checksum) != FCS_SIZE:
        raise ValueError(f"a checksum of {len(checksum)} bytes; expected {FCS_SIZE}, as the frame check sequence has")
    return check_frame(destination + source + ethertype.to_bytes(2) + payload + checksum, own_fcs=own_fcs)


def check_frame(frame: bytes, *, own_fcs: bool = False) -> bytes:
    """Return the frame. ValueError when it is too long, or too short for its header and its own check sequence."""
    least = HEADER_SIZE + (FCS_SIZE if own_fcs else 0)
    if not least <= len(frame) <= MAX_FRAME:
        raise ValueError(f"a frame of {len(frame)} bytes; expected from {least} to {MAX_FRAME}")
    return frame


def parse_tags(frame: bytes) -> tuple[list[int], int]:
    """Return the VLANs that a frame is tagged with, the outermost first, and the ethertype behind all tags.

    ValueError when the frame ends within them.

    >>> parse_tags(bytes(12) + bytes.fromhex("88a8 6007 8100 0008 0806"))
    ([7, 8], 2054)
    """
    vlans: list[int] = []
    at = HEADER_SIZE - 2
    while (ethertype := int.from_bytes(frame[at : at + 2])) in VLAN_TAGS:
        if len(frame) < at + 6:
            raise ValueError("the frame ends within a VLAN tag")
        vlans.append(int.from_bytes(frame[at + 2 : at + 4]) & 0xFFF)
        at += 4
    return vlans, ethertype


def sending_seconds(count: int, per_second: float) -> float:
    """Time that `count` frames take at their pace, the first leaving at once; pace 0: as fast as they go."""
    return (count - 1) / (per_second or UNPACED_PER_SECOND)


def describe_failure(reply: TransmitReply, count: int) -> str:
    """Return the transmitter's sentence, and how many of the `count` frames asked for had left by then."""
    return f"{reply.message}; {reply.sent} of {count} frames have left" if reply.sent else reply.message

"""Frames of a few rows, made one by one: below some number of rows arrays cost more than they save. No I/O.

IPv4 by AF_PACKET alone, and nothing that would have to be cut: that is what `FramePlan` is for, whose frames these are
like, byte for byte.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.transmitter.packets.addressing import Addressing, Identification
from services.transmitter.packets.headers import GSO_NONE, GSO_UDP_L4, LINK_SIZE, NEEDS_CSUM, UDP, UDP_SIZE
from services.transmitter.plan import largest_payload
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.mmsg import IOVEC, MMSGHDR
from shared.datagrams.segments import MAX_SEGMENTS, MAX_SEND

FEW_ROWS: Final = 64
ROOM: Final = 64
"""Bytes kept for a frame's headers, of which there are 52."""
HEADERS: Final = LINK_SIZE + 28
IP_SIZE: Final = 20
_ROW: Final = struct.Struct("<HH12x4s")
_LINK: Final = struct.Struct("=BBHHHH14s")
_PACKET: Final = struct.Struct("!BBHHHBBH4s4sHHHH")
_WORDS: Final = struct.Struct("!HH")
_PIECE: Final = struct.Struct("=QQ")
_NAME: Final = struct.Struct("=QQ")


@dataclass(slots=True)
class Frame:
    """Rows of one source that leave together, cut at `segment` if that is not 0; `pieces` are where payloads are."""

    source: bytes
    port: int
    rows: list[int]
    pieces: list[tuple[int, int]]
    size: int
    segment: int


def frames_of(batch: Gathered, rows: Indices | None, mtu: int, *, segmentation: bool) -> list[Frame] | None:
    """Return the rows of these (None: all), of IPv4 sources, that go in one frame; None when one has to be cut."""
    numbers = range(len(batch)) if rows is None else rows.tolist()
    columns, places, largest = list(_ROW.iter_unpack(batch.rows.tobytes())), _places(batch), largest_payload(4, mtu)
    frames: list[Frame] = []
    last_of: dict[tuple[int, bytes], Frame] = {}
    for number in numbers:
        length, port, source = columns[number]
        if length > largest:
            return None
        place = places[number]
        frame = last_of.get((port, source))
        if segmentation and frame is not None and _joins(frame, length):
            frame.rows.append(number)
            frame.segment = frame.segment or frame.size
            frame.size += length
            before, size = frame.pieces[-1]
            if before + size == place:
                frame.pieces[-1] = before, size + length
            else:
                frame.pieces.append((place, length))
            if length < frame.segment:
                del last_of[port, source]  # a shorter one is the last of its frame
            continue
        frame = last_of[port, source] = Frame(source, port, [number], [(place, length)], length, 0)
        frames.append(frame)
    return frames


def _joins(frame: Frame, length: int) -> bool:
    longest = frame.segment or frame.size
    return 0 < length <= longest and len(frame.rows) < MAX_SEGMENTS and frame.size + length <= MAX_SEND


def _places(batch: Gathered) -> list[int]:
    """Memory address of each payload."""
    places = []
    for each in batch.batches:
        at = np.frombuffer(each.payload, np.uint8).ctypes.data if len(each.payload) else 0
        for length in each.length_list:
            places.append(at)
            at += each.stride or length
    return places


def fold(total: int) -> int:
    """The one's complement sum of 16-bit words, in 16 bits (RFC 1071); `total` is their sum, which is not 0."""
    return (total - 1) % 0xFFFF + 1


class FewFrames:
    """A vector for sendmmsg(2), addressed to one collector after the other."""

    def __init__(self) -> None:
        self.messages = np.zeros(FEW_ROWS, MMSGHDR)
        self._headers, self._pieces = np.zeros(FEW_ROWS * ROOM, np.uint8), np.zeros(2 * FEW_ROWS, IOVEC)
        self._name = np.zeros(32, np.uint8)
        self._name_bytes, self._name_size = self._name.data, 0
        self._header_bytes, self._piece_bytes = self._headers.data, self._pieces.view(np.uint8).data
        self._headers_at, self._pieces_at = self._headers.ctypes.data, self._pieces.ctypes.data
        self.messages["name"] = self._name.ctypes.data
        self._messages = self.messages.view(np.uint8).data
        self.messages_at = self.messages.ctypes.data
        self._frames: list[Frame] = []

    def build(self, frames: list[Frame]) -> None:
        """Point the messages at headers, which `address` fills in, and at payloads."""
        self._frames = frames
        at = 0
        for number, frame in enumerate(frames):
            _NAME.pack_into(self._messages, 64 * number + 16, self._pieces_at + 16 * at, 1 + len(frame.pieces))
            _PIECE.pack_into(self._piece_bytes, 16 * at, self._headers_at + ROOM * number, HEADERS)
            at += 1
            for piece in frame.pieces:
                _PIECE.pack_into(self._piece_bytes, 16 * at, *piece)
                at += 1

    def address(self, to: Addressing, name: bytes, numbers: Identification) -> None:
        """Address all frames to a collector."""
        self._name_bytes[: len(name)] = name
        if len(name) != self._name_size:
            self.messages["namelen"] = self._name_size = len(name)
        address, port, tos, limit = to.address, to.port, to.dscp << 2, to.hop_limit
        ethernet, to_sum = to.ethernet, sum(_WORDS.unpack(address)) + UDP
        number = numbers.draw(sum([len(frame.rows) for frame in self._frames]))
        fixed, out, start = (0x45 << 8) + tos + (limit << 8) + to_sum, self._header_bytes, HEADERS - 28 - 10
        at = 0
        for frame in self._frames:
            udp_size, ident, source, segment = frame.size + UDP_SIZE, number & 0xFFFF, frame.source, frame.segment
            number += len(frame.rows)
            high, low = _WORDS.unpack(source)
            size, source_sum = udp_size + IP_SIZE, high + low
            kind = GSO_UDP_L4 if segment else GSO_NONE
            _LINK.pack_into(out, at, NEEDS_CSUM, kind, start + 28, segment, start + IP_SIZE, 6, ethernet)
            _PACKET.pack_into(
                out, at + LINK_SIZE, 0x45, tos, size, ident, 0, limit, UDP,
                fold(fixed + source_sum + size + ident) ^ 0xFFFF, source, address,
                frame.port, port, udp_size, fold(source_sum + to_sum + udp_size),
            )  # fmt: skip
            at += ROOM

    def rest(self, sent: int) -> Indices:
        """The rows that are left when the first frames have gone."""
        return np.array(sorted(row for frame in self._frames[sent:] for row in frame.rows), np.intp)

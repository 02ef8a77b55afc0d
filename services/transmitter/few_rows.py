"""Frames of a few rows, made one by one: below some number of rows arrays cost more than they save. No I/O.

It makes IPv4 by AF_PACKET alone, and nothing that would have to be cut. `FramePlan` makes all other frames, and would
make these with the same bytes.
"""

import struct
from array import array
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from services.transmitter.packets.addressing import Addressing, Identification
from services.transmitter.packets.headers import GSO_NONE, GSO_UDP_L4, LINK_SIZE, NEEDS_CSUM, UDP, UDP_SIZE, VNET_SIZE
from services.transmitter.plan import largest_payload
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.gso_runs import MAX_SEGMENTS, MAX_SEND
from shared.datagrams.mmsg import IOVEC, MMSGHDR, addresses_of

FEW_ROWS: Final = 256
"""Rows. It is the loop over rows, not over frames, that arrays would save."""
ROOM: Final = 64
"""Bytes kept for a frame's headers, of which there are 52."""
HEADERS: Final = LINK_SIZE + 28
IP_SIZE: Final = 20
_ROW: Final = struct.Struct("<H18s")
"""Length, then port and address, which tell a source from another."""
_SOURCE: Final = struct.Struct("<H12x4s")
_LINK: Final = struct.Struct("=BBHHHH14sBB")
_PACKET: Final = struct.Struct("!26sHH4sH4s4sHHHH")
"""All headers. The first 26 bytes are those of `_LINK`, which frames that are cut at one length have in common."""
_FLAGS: Final = struct.Struct("!HBB")
_COUNT: Final = 3
"""Place of the number of pieces in a `MMSGHDR`, in words of 8 bytes."""


class Frame:
    """Rows of one source that leave together, cut at `segment` if that is not 0; `pieces` are where payloads are.

    Pieces are addresses and lengths in turn.
    """

    __slots__ = ("longest", "pieces", "rows", "segment", "size", "source")

    def __init__(self, source: bytes, row: int, place: int, length: int) -> None:
        self.source, self.rows, self.pieces = source, [row], [place, length]
        self.size = self.longest = length
        self.segment = 0


def frames_of(batch: Gathered, rows: Indices | None, mtu: int, *, segmentation: bool) -> list[Frame] | None:
    """Return the rows of these (None: all), of IPv4 sources, that go in one frame; None when one has to be cut."""
    columns: Iterable[tuple[int, bytes]] = _ROW.iter_unpack(batch.packed)
    places: Iterable[int] = batch.places
    numbers: Iterable[int] = range(len(batch))
    if rows is not None:
        numbers, every, everywhere = rows.tolist(), list(columns), list(places)
        columns, places = [every[number] for number in numbers], [everywhere[number] for number in numbers]
    largest = largest_payload(4, mtu)
    frames: list[Frame] = []
    open_: dict[bytes, Frame] = {}
    for number, (length, source), place in zip(numbers, columns, places, strict=True):
        frame = open_.get(source) if segmentation else None
        if (
            frame is not None
            and 0 < length <= frame.longest
            and frame.size + length <= MAX_SEND
            and len(frame.rows) < MAX_SEGMENTS
        ):
            frame.rows.append(number)
            frame.size += length
            frame.segment = frame.longest
            pieces = frame.pieces
            if pieces[-2] + pieces[-1] == place:
                pieces[-1] += length
            else:
                pieces += place, length
            if length < frame.longest:
                del open_[source]  # a shorter one is the last of its frame
        elif length > largest:
            return None
        else:
            frame = open_[source] = Frame(source, number, place, length)
            frames.append(frame)
    return frames


class FewFrames:
    """A vector for sendmmsg(2), addressed to one collector after the other."""

    def __init__(self) -> None:
        self.messages = np.zeros(FEW_ROWS, MMSGHDR)
        self._headers, self._pieces = np.zeros(FEW_ROWS * ROOM, np.uint8), np.zeros((FEW_ROWS, 1 + MAX_SEGMENTS), IOVEC)
        self._name = np.zeros(32, np.uint8)
        self._name_bytes, self._name_size = self._name.data, 0
        self._pieces["base"][:, 0] = addresses_of(self._headers, ROOM, FEW_ROWS)
        self._pieces["len"][:, 0] = HEADERS
        self.messages["name"] = self._name.ctypes.data
        self.messages["iov"] = addresses_of(self._pieces, self._pieces.strides[0], FEW_ROWS)
        self._header_bytes = self._headers.data
        self._message_words, self._piece_words = _words_of(self.messages), _words_of(self._pieces)
        self.messages_at = self.messages.ctypes.data
        self._frames: list[Frame] = []
        self._unaddressed: list[tuple[int, int, int, int, bytes, int, int, int]] = []
        """Parts of each frame's headers that are the same for every collector."""
        self.rows = self.size = 0
        """Datagrams in all frames, and their bytes."""

    def build(self, frames: list[Frame]) -> None:
        """Point the messages at headers, which `address` fills in, and at payloads."""
        if frames is self._frames:
            return
        self._frames = frames
        messages, words, block, message = (
            self._message_words,
            self._piece_words,
            2 * (1 + MAX_SEGMENTS),
            MMSGHDR.itemsize // 8,
        )
        unaddressed = []
        rows = size = 0
        count, at = _COUNT, 2
        for frame in frames:
            pieces = frame.pieces
            used = len(pieces)
            messages[count] = 1 + used // 2
            if used == 2:
                words[at], words[at + 1] = pieces
            else:
                words[at : at + used] = array("Q", pieces)
            port, source = _SOURCE.unpack(frame.source)
            held, udp_size, source_sum = len(frame.rows), frame.size + UDP_SIZE, int.from_bytes(source)
            ip_size = udp_size + IP_SIZE
            sums = source_sum + ip_size - 1, source_sum + udp_size - 1
            unaddressed.append((held, frame.segment, ip_size, udp_size, source, port, *sums))
            rows += held
            size += frame.size
            count, at = count + message, at + block
        self._unaddressed, self.rows, self.size = unaddressed, rows, size

    def address(self, to: Addressing, name: bytes, numbers: Identification) -> None:
        """Address all frames to a collector."""
        self._name_bytes[: len(name)] = name
        if len(name) != self._name_size:
            self.messages["namelen"] = self._name_size = len(name)
        address, port, tos, limit = to.address, to.port, to.dscp << 2, to.hop_limit
        # Modulo 65535 a number is the sum of its 16-bit words, which is what a checksum is made of.
        to_sum = int.from_bytes(address) + UDP
        fixed, flags, out = (0x45 << 8) + tos + (limit << 8) + to_sum, _FLAGS.pack(0, limit, UDP), self._header_bytes
        pack_into, last, start = _PACKET.pack_into, -1, b""
        number, at = numbers.draw(self.rows), 0
        for held, segment, ip_size, udp_size, source, source_port, ip_sum, udp_sum in self._unaddressed:
            ident = number & 0xFFFF
            if segment != last:
                last, kind = segment, GSO_UDP_L4 if segment else GSO_NONE
                start = _LINK.pack(
                    NEEDS_CSUM,
                    kind,
                    HEADERS - VNET_SIZE,
                    segment,
                    HEADERS - VNET_SIZE - UDP_SIZE,
                    6,
                    to.ethernet,
                    0x45,
                    tos,
                )
            pack_into(
                out, at, start, ip_size, ident, flags, (fixed + ip_sum + ident) % 0xFFFF + 1 ^ 0xFFFF, source, address,
                source_port, port, udp_size, (to_sum + udp_sum) % 0xFFFF + 1,
            )  # fmt: skip
            number += held
            at += ROOM

    def rest(self, sent: int) -> Indices:
        """The rows that are left when the first frames have gone."""
        return np.array(sorted(row for frame in self._frames[sent:] for row in frame.rows), np.intp)


def _words_of(array: npt.NDArray[np.void]) -> memoryview:
    """Return memory as words of 8 bytes."""
    return array.view(np.uint8).reshape(-1).data.cast("Q")

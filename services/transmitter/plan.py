"""Plans rows of a batch with their own source address: the rows that share a frame, and the headers of each. No I/O.

Rows are put in order by source, without changing the order within a source. Neighbours of one source and of equal
length become one frame that the kernel or the device cuts up (`shared.datagrams.gso_runs`). Datagrams longer than the
path's MTU become fragments. Where there is no Ethernet, the same headers without their link part go out as raw IP
packets.
"""

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from services.transmitter.packets.addressing import Addressing, AddressingColumns, Identification
from services.transmitter.packets.fragments import Fragments
from services.transmitter.packets.headers import (
    FRAGMENT,
    FRAGMENT_HEADER,
    FRAGMENT_SIZE,
    GSO_NONE,
    GSO_UDP_L4,
    HEADERS4,
    HEADERS6,
    IP_SIZE,
    LINK_SIZE,
    MORE_FRAGMENTS,
    NEEDS_CSUM,
    UDP,
    UDP_SIZE,
    VNET_SIZE,
    Headers,
    Sums,
    complete,
    fold,
    sum_addresses,
    sum_payloads,
)
from services.transmitter.sources import by_source, hash_addresses, hash_sources
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import MAX_GATHERED, Gathered
from shared.datagrams.gso_runs import group, pieces
from shared.datagrams.mmsg import IOVEC, MMSGHDR, addresses_of
from shared.datagrams.sampling import mix

SMALLEST_MTU: Final = {4: 68, 6: 1280}
"""The MTU that every link has (RFC 791, 3.2; RFC 8200, 5): less is a mistake, and would cost endless fragments."""
FLOW_LABEL: Final = 0xFFFFF
NAME_SIZE: Final = 32
"""Bytes kept for a socket address, more than any address of frames or packets takes."""
S = TypeVar("S", bound=np.generic)


def largest_payload(version: int, mtu: int) -> int:
    """Return the bytes of payload that go in one packet."""
    return max(mtu, SMALLEST_MTU[version]) - IP_SIZE[version] - UDP_SIZE


class FramePlan:
    """Messages for sendmmsg(2), built for some rows of a batch and addressed to one collector after the other.

    A plan may also be built for several collectors at once, each with its own *part* of the rows: nothing is cut then.
    A *unit* leaves or is dropped as a whole: a run of rows that go as one frame, or one row and its fragments. Memory
    is reused: a plan is good until the next `build`, and as long as the batch lives.
    """

    def __init__(self) -> None:
        self._vectors = {
            (version, link): _Vector(MAX_GATHERED, version, link=link) for version in IP_SIZE for link in (True, False)
        }
        self.rows = self.frames = 0
        self.templates = False
        """True if the rows are templates, which are counted apart."""

    def build(
        self,
        batch: Gathered,
        rows: Indices | None,
        version: int,
        mtu: int,
        *,
        link: bool,
        segmentation: bool,
        parts: Sequence[int] = (0,),
    ) -> None:
        """Plan frames for these rows (None: all; at least one), whose sources must be of IP `version`.

        `link`: they go through AF_PACKET, where checksums are left to the kernel, and with `segmentation` runs too.
        `parts` are the positions, among the planned rows, at which another collector's rows begin: in several parts no
        row may be longer than `largest_payload`.
        """
        self._batch, self._version, self._link = batch, version, link
        self._mtu = max(mtu, SMALLEST_MTU[version])
        order, begins = by_source(batch.words if rows is None else batch.words[rows], parts)
        if order is not None:
            rows = order if rows is None else rows[order]
        self._rows_of_batch, self.templates = rows, batch.templates
        self.rows = len(begins)
        lengths = batch.lengths if rows is None else batch.lengths[rows]
        largest = largest_payload(version, mtu)
        starts = group(lengths, largest, begins) if link and segmentation else np.arange(len(lengths))
        self.first_units = np.append(np.searchsorted(starts, parts), len(starts))
        self.rows_before = np.append(starts, len(lengths))
        self.bytes_before_row = np.append(0, np.cumsum(lengths))
        self.bytes_before = self.bytes_before_row[self.rows_before]
        self._first_rows = starts if rows is None else rows[starts]
        self._heads = batch.rows[self._first_rows]
        self._totals = np.diff(self.bytes_before) + UDP_SIZE
        length = lengths[starts]
        large = length > largest
        self._fragments = Fragments(self._totals, large, self._mtu, version) if large.any() else None
        self._take_vector()
        self._fill(length)
        self._gather(lengths)

    @property
    def units(self) -> int:
        """The number of units; `rows_before[i]` and `bytes_before[i]` are the rows and bytes of the first i of them."""
        return len(self._totals)

    def first_frame(self, unit: int) -> int:
        """Return the number of a unit's first frame; for the unit after the last one, the number of frames."""
        return unit if self._fragments is None else int(self._fragments.first_frame[unit])

    def unit_of(self, frame: int) -> int:
        """Return the unit that a frame belongs to."""
        return frame if self._fragments is None else int(self._fragments.unit_of[frame])

    def part_of(self, unit: int) -> int:
        """Return the number of the part that a unit belongs to."""
        return int(np.searchsorted(self.first_units, unit, "right")) - 1

    def rest(self, dealt: int, part: int = 0) -> Indices:
        """Return the rows of the batch that are left of a part when the plan's first `dealt` rows are done."""
        first, last = (int(self.rows_before[unit]) for unit in self.first_units[part : part + 2])
        first = max(first, dealt)
        return np.arange(first, last) if self._rows_of_batch is None else self._rows_of_batch[first:last]

    def segmented(self, unit: int) -> bool:
        """Return whether a unit is a run that kernel or device has to cut."""
        return bool(self.rows_before[unit + 1] - self.rows_before[unit] > 1)

    def _take_vector(self) -> None:
        if self._fragments is None:
            self.frames, self._vector = self.units, self._vectors[self._version, self._link]
        else:  # longer than a batch has rows, and its headers differ in length
            self.frames = len(self._fragments.unit_of)
            self._vector = _Vector(self.frames, self._version, link=self._link)
        self._headers = self._vector.headers[: self.frames]

    def _per_frame(self, of_units: npt.NDArray[S]) -> npt.NDArray[S]:
        return of_units if self._fragments is None else of_units[self._fragments.unit_of]

    def _fill(self, length: npt.NDArray[np.int64]) -> None:
        """Fill in the fields that do not depend on the collector; `length` is that of each unit's first row."""
        headers, heads, per_frame = self._headers, self._heads, self._per_frame
        packed = np.ascontiguousarray(heads["address"][:, 12:] if self._version == 4 else heads["address"])
        headers["source"] = per_frame(packed.view(f"V{packed.shape[1]}")[:, 0])
        headers["source_port"], headers["udp_length"] = per_frame(heads["port"]), per_frame(self._totals)
        sizes = self._totals if self._fragments is None else self._fragments.sizes
        headers["length"] = sizes + (IP_SIZE[4] if self._version == 4 else 0)
        sources, totals = sum_addresses(packed), self._totals.astype(np.uint32)
        self._source_sums, self._udp_sums = sources, sources + totals + UDP
        if self._link:
            runs = np.diff(self.rows_before) > 1
            headers["flags"] = NEEDS_CSUM
            headers["gso_type"] = per_frame(np.where(runs, GSO_UDP_L4, GSO_NONE))
            headers["gso_size"] = per_frame(np.where(runs, length, 0))
            self._completed: Indices | slice | None = None
            if self._fragments is not None:
                self._completed = np.flatnonzero(self._fragments.large_units)
                headers["flags"][self._fragments.large] = 0
                headers["header_length"][self._fragments.large] = 0  # the last may be shorter than whole headers
        else:
            self._completed = slice(None)
        if self._completed is not None:
            self._sum_payloads(self._completed, totals)

    def _sum_payloads(self, units: Indices | slice, totals: Sums) -> None:
        """Let the sums of these units, which nothing completes later, cover all but the destination."""
        payloads = sum_payloads(self._batch, self._first_rows[units])
        self._udp_sums[units] += payloads + self._heads["port"][units] + totals[units]

    def _gather(self, lengths: npt.NDArray[np.int64]) -> None:
        """Point each message at its headers and at its payload."""
        pointers, starts = self._batch.pointers, self.rows_before[:-1]
        if self._rows_of_batch is not None:
            pointers = pointers[self._rows_of_batch]
        begins, counts = pieces(pointers, lengths, starts)
        sizes = np.diff(self.bytes_before_row[begins], append=self.bytes_before_row[-1])
        at, counts = pointers[begins], self._per_frame(counts)
        vector, fragments = self._vector, self._fragments
        if fragments is not None:  # the piece that is cut is one, but belongs to several frames
            first_piece = self._per_frame(np.searchsorted(begins, starts))
            frame_of = np.repeat(np.arange(self.frames), counts)
            before = np.cumsum(counts) - counts
            piece = np.arange(len(frame_of)) + (first_piece - before)[frame_of]
            at, sizes = at[piece], sizes[piece]
            large = before[fragments.large]
            at[large] += fragments.payload_offsets[fragments.large]
            sizes[large] = fragments.payload_sizes[fragments.large]
            vector.pieces["len"][: self.frames, 0] = vector.header_size + fragments.extra
        self.messages = vector.messages
        if len(at) == self.frames:
            own = vector.pieces[: self.frames, 1]
            own["base"], own["len"] = at, sizes
            return
        self.messages = vector.messages[: self.frames].copy()
        heads = np.cumsum(counts) - counts + np.arange(self.frames)
        self._iovecs = iovecs = np.empty(self.frames + len(at), IOVEC)
        payload = np.ones(len(iovecs), np.bool_)
        payload[heads] = False
        iovecs["base"][payload], iovecs["len"][payload] = at, sizes
        iovecs[heads] = vector.pieces[: self.frames, 0]
        self.messages["iov"][: self.frames] = addresses_of(iovecs, IOVEC.itemsize, len(iovecs))[heads]
        self.messages["iovlen"][: self.frames] = counts + 1

    def address(
        self, addressings: Sequence[Addressing], names: Sequence[bytes], numbers: Sequence[Identification]
    ) -> None:
        """Address each part's frames to a collector, or all of them, when there is one part, to the next collector.

        `names` are the socket addresses that messages are sent to; `numbers` tell apart the packets to a target.
        """
        to = AddressingColumns(addressings, np.diff(self.first_units))
        self._name_messages(names)
        headers = self._headers
        if to.ethernet is not None:
            headers["ethernet"] = to.ethernet
        headers["destination"] = to.address
        headers["hop_limit"], headers["port"] = to.hop_limit, to.port
        sums = fold(self._udp_sums + to.address_sum)
        if self._completed is not None:
            sums[self._completed] = complete(fold(sums[self._completed] + to.port))
        headers["udp_checksum"] = self._per_frame(sums)
        if self._version == 4:
            self._address4(to, numbers)
        else:
            self._address6(to, numbers[0])

    def _name_messages(self, names: Sequence[bytes]) -> None:
        self._names = np.frombuffer(b"".join(name.ljust(NAME_SIZE, b"\0") for name in names), np.uint8)
        messages = self.messages[: self.frames]
        messages["namelen"] = len(names[0])
        at = addresses_of(self._names, NAME_SIZE, len(names))
        messages["name"] = at if len(names) == 1 else np.repeat(at, np.diff(self.first_units))

    def _address4(self, to: AddressingColumns, numbers: Sequence[Identification]) -> None:
        headers = self._headers
        idents = self._take_numbers(numbers) & 0xFFFF
        sums = self._source_sums
        headers["traffic_class"] = to.dscp << 2
        if self._fragments is not None:
            large = self._fragments.large_units
            hashes = hash_addresses(self._batch.words[self._first_rows[large]])
            idents[large] = numbers[0].draw_for_fragments(hashes)
            words = self._fragments.words(MORE_FRAGMENTS, 8)
            headers["fragment"] = words
            idents, sums = idents[self._fragments.unit_of], sums[self._fragments.unit_of] + words
        headers["identification"] = idents
        fixed = (0x45 << 8) + (to.dscp << 2) + (to.hop_limit << 8) + UDP + to.address_sum
        headers["checksum"] = fold(sums + headers["length"] + idents + fixed) ^ 0xFFFF

    def _take_numbers(self, numbers: Sequence[Identification]) -> Sums:
        """Return the first number of each unit, which takes one for each of its rows."""
        before = self.rows_before[self.first_units]
        starts = [each.draw(count) for each, count in zip(numbers, np.diff(before).tolist(), strict=True)]
        shifts = np.array(starts, np.int64) - before[:-1]
        first: Sums = self.rows_before[:-1] + (
            shifts if len(starts) == 1 else np.repeat(shifts, np.diff(self.first_units))
        )
        return first.astype(np.uint32)

    def _address6(self, to: AddressingColumns, numbers: Identification) -> None:
        headers = self._headers
        # One label a flow (RFC 6437): the same source to the same collector's port has the same, and it is never 0.
        hashes = hash_sources(self._batch.words[self._first_rows]) ^ to.port.astype(np.uint64)
        labels = (mix(hashes) & np.uint64(FLOW_LABEL)).astype(np.uint32) | 1
        headers["flow"] = self._per_frame(labels | (6 << 28 | to.dscp << 22))
        headers["protocol"] = UDP
        if self._fragments is not None:
            self._insert_fragment_headers(self._fragments, numbers)

    def _insert_fragment_headers(self, fragments: Fragments, numbers: Identification) -> None:
        headers, which = self._headers, np.flatnonzero(fragments.large)
        rows = headers.view(np.uint8).reshape(self.frames, -1)
        after_ip = LINK_SIZE + IP_SIZE[6]
        headers["source_port"], headers["udp_length"] = (
            self._per_frame(self._heads["port"]),
            self._per_frame(self._totals),
        )
        rows[which, after_ip + FRAGMENT_SIZE :] = rows[which, after_ip : after_ip + UDP_SIZE]
        extension = np.zeros(len(which), FRAGMENT_HEADER)
        extension["next"], extension["offset"] = UDP, fragments.words(1, 1)[which]
        extension["identification"] = (numbers.draw(self.units) + fragments.unit_of[which]) & 0xFFFFFFFF
        rows[which, after_ip : after_ip + FRAGMENT_SIZE] = extension.view(np.uint8).reshape(len(which), -1)
        headers["length"][which] = fragments.sizes[which] + FRAGMENT_SIZE
        headers["protocol"][which] = FRAGMENT


class _Vector:
    """Room for frames of one kind: headers, and messages of two pieces each, headers and payload."""

    def __init__(self, size: int, version: int, *, link: bool) -> None:
        dtype, before_udp = HEADERS4 if version == 4 else HEADERS6, LINK_SIZE + IP_SIZE[version]
        skip = 0 if link else LINK_SIZE
        self.headers: Headers = np.zeros(size, dtype)
        start = before_udp - VNET_SIZE
        fixed = {"header_length": start + UDP_SIZE, "csum_start": start, "csum_offset": 6, "protocol": UDP}
        for field, value in ({**fixed, "version": 0x45} if version == 4 else fixed).items():
            self.headers[field] = value
        self.header_size = before_udp + UDP_SIZE - skip
        self.pieces = np.zeros((size, 2), IOVEC)
        self.pieces["base"][:, 0] = addresses_of(self.headers, dtype.itemsize, size) + np.uint64(skip)
        self.pieces["len"][:, 0] = self.header_size
        self.messages = np.zeros(size, MMSGHDR)
        self.messages["iov"], self.messages["iovlen"] = addresses_of(self.pieces, 2 * IOVEC.itemsize, size), 2

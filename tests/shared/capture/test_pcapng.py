import io
import os
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.capture.pcapng import Destination
from shared.capture.reader import CapturedDatagram, CaptureError, CaptureReader
from shared.capture.writer import CaptureWriter
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.datagrams.limits import MAX_DATAGRAM
from shared.net.addresses import pack_address, unpack_address

AT = Destination(2055, pack_address("192.0.2.250"), pack_address("2001:db8::250"))
EXPORTERS = tuple(map(pack_address, ("10.1.1.1", "255.255.255.255", "2001:db8::1", "ff02::1")))
NOW = 1_795_000_000_123_456_789
Datagram = tuple[bytes, int, bytes]

datagrams = st.lists(
    st.tuples(st.sampled_from(EXPORTERS), st.integers(0, 65_535), st.binary(max_size=70)), min_size=1, max_size=12
)


def batch_of(some: list[Datagram], at_ns: int = NOW, stride: int = 0) -> DatagramBatch:
    """Make a batch, its payloads end to end or at multiples of a stride."""
    rows = make_rows(
        [len(payload) for *_, payload in some], [source for source, *_ in some], [port for _, port, _ in some]
    )
    return DatagramBatch("flows", at_ns, rows, b"".join(payload.ljust(stride, b"?") for *_, payload in some), stride)


def write(path: Path, *batches: DatagramBatch, at: Destination = AT) -> bytes:
    """Write a capture of batches; return its bytes."""
    with path.open("wb", buffering=0) as file:
        writer = CaptureWriter(file.fileno(), "flows", at)
        for batch in batches:
            writer.write(batch)
    return path.read_bytes()


def read(data: bytes) -> tuple[list[CapturedDatagram], CaptureReader]:
    """Read a capture to its end."""
    reader = CaptureReader(io.BytesIO(data))
    return list(reader), reader


def expected(batch: DatagramBatch, at: Destination = AT) -> list[CapturedDatagram]:
    """Say what a reader has to find of a batch."""
    return [
        CapturedDatagram(
            batch.received_ns, pack_address(source), port, at.six if ":" in source else at.four, at.port, payload
        )
        for source, port, payload in batch.datagrams()
    ]


@given(some=datagrams, more=datagrams, stride=st.sampled_from([0, 70, 128]), at=st.sampled_from([AT, Destination()]))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, some: list[Datagram], more: list[Datagram], stride: int, at: Destination
) -> None:
    """Every datagram comes back with its time, source, destination and bytes, in its order."""
    first, second = batch_of(some, 1 << 63, stride), batch_of(more)
    found, reader = read(write(tmp_path_factory.getbasetemp() / "written.pcapng", first, second, at=at))
    assert found == expected(first, at) + expected(second, at)
    assert (reader.damaged, reader.skipped) == (False, {})


@given(some=datagrams, data=st.data())
def test_rows_are_chosen(tmp_path_factory: pytest.TempPathFactory, some: list[Datagram], data: st.DataObject) -> None:
    """Only the rows that are asked for are written, wherever their payloads stand."""
    batch = batch_of(some)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(some) - 1))))
    path = tmp_path_factory.getbasetemp() / "chosen.pcapng"
    with path.open("wb", buffering=0) as file:
        writer = CaptureWriter(file.fileno(), "flows", AT)
        writer.write(batch, np.array(chosen, np.intp))
    every = expected(batch)
    assert read(path.read_bytes())[0] == [every[at] for at in chosen]


@given(some=datagrams, data=st.data())
def test_a_torn_tail_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, some: list[Datagram], data: st.DataObject
) -> None:
    """A file that ends anywhere gives all whole datagrams before its end, and says that it is damaged."""
    whole = write(tmp_path_factory.getbasetemp() / "torn.pcapng", batch_of(some))
    end = data.draw(st.integers(4, len(whole)))
    found, reader = read(whole[:end])
    assert found == expected(batch_of(some))[: len(found)]
    assert len(found) == len(some) or end < len(whole)
    rest, after = read(whole + whole[:end])
    assert rest == expected(batch_of(some)) + found  # a second section may follow the first
    assert after.damaged == reader.damaged


def test_a_large_batch_and_a_pipe() -> None:
    """A batch of more pieces than one writev(2) takes goes through a pipe that takes part of it at a time."""
    some = [(EXPORTERS[number % 3], number, bytes([number % 256]) * (number % 1500)) for number in range(1024)]
    some[7] = (EXPORTERS[0], 1, os.urandom(MAX_DATAGRAM))
    into, out = os.pipe()
    came: list[bytes] = []
    with open(into, "rb") as pipe:  # noqa: PTH123
        reading = threading.Thread(target=lambda: came.append(pipe.read()))
        reading.start()
        writer = CaptureWriter(out, "flows", AT)
        writer.write(batch_of(some))
        os.close(out)
        reading.join()
    assert read(came[0])[0] == expected(batch_of(some))


def test_a_full_disk_is_an_error() -> None:
    """An error of the kernel is an OSError with its number, for blocks and for datagrams."""
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        CaptureWriter(file.fileno(), "flows", AT)


CHECKED = ("-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE")
FIELDS = ("ip.src", "ipv6.src", "udp.srcport", "udp.dstport", "ip.checksum.status", "udp.checksum.status")


@pytest.mark.parametrize("program", ["tcpdump", "tshark", "capinfos"])
def test_programs_open_it(tmp_path: Path, program: str) -> None:
    """The known programs open a capture and show exporters, destinations and lengths; they find no wrong checksum."""
    if not shutil.which(program):
        pytest.skip(f"there is no {program}")
    path = tmp_path / "shown.pcapng"
    write(path, batch_of([(EXPORTERS[0], 514, b"odd"), (EXPORTERS[2], 2055, b"even"), (EXPORTERS[0], 0, b"")]))
    arguments = {
        "tcpdump": ["-nvvr", str(path)],
        "capinfos": ["-c", "-M", str(path)],
        "tshark": ["-r", str(path), *CHECKED, "-T", "fields", *(word for field in FIELDS for word in ("-e", field))],
    }
    shown = subprocess.run([program, *arguments[program]], capture_output=True, text=True, check=True).stdout
    if program == "tcpdump":
        assert "10.1.1.1.514 > 192.0.2.250.2055: [no cksum] " in shown
        assert "2001:db8::1.2055 > 2001:db8::250.2055: [udp sum ok] " in shown
        assert "bad cksum" not in shown
    elif program == "tshark":
        good = "1"
        assert [line.split("\t")[:5] for line in shown.splitlines()] == [
            ["10.1.1.1", "", "514", "2055", good],
            ["", "2001:db8::1", "2055", "2055", ""],
            ["10.1.1.1", "", "0", "2055", good],
        ]
        assert shown.splitlines()[1].endswith(good)
    else:
        assert "Number of packets:   3" in shown


ETHERNET = bytes(12)
FOUR = bytes.fromhex("45000020000000004011000 00a010101c0000205".replace(" ", ""))
DATAGRAM4 = FOUR + struct.pack("!4H", 7, 9, 12, 0) + b"four"
DATAGRAM6 = (
    struct.pack("!IHBB", 0x60000000, 20, 0, 1) + EXPORTERS[2] * 2 + bytes([17, 0, 1, 4, 0, 0, 0, 0])
    + struct.pack("!4H", 7, 9, 11, 0) + b"six" + b"."
)  # fmt: skip
PACKETS: list[tuple[int, bytes, bytes | str]] = [
    (1, ETHERNET + b"\x08\x00" + DATAGRAM4 + b"padding", b"four"),
    (1, ETHERNET + b"\x81\x00\x00\x07\x81\x00\x00\x08\x86\xdd" + DATAGRAM6, b"six"),
    (1, ETHERNET + b"\x08\x06" + bytes(28), "no IP"),
    (1, ETHERNET[:9], "no IP"),
    (101, DATAGRAM4, b"four"),
    (228, DATAGRAM4, b"four"),
    (0, bytes(4) + DATAGRAM4, b"four"),
    (113, bytes(16) + DATAGRAM6, b"six"),
    (276, bytes(20) + DATAGRAM4, b"four"),
    (147, DATAGRAM4, "link type 147"),
    (101, DATAGRAM4[:-1], "cut at its capture"),
    (101, DATAGRAM4[:24], "cut at its capture"),
    (101, FOUR[:6] + b"\x20\x00" + FOUR[8:] + DATAGRAM4[20:], "a fragment"),
    (101, FOUR[:9] + b"\x06" + FOUR[10:] + DATAGRAM4[20:], "no UDP"),
    (101, DATAGRAM6[:6] + bytes([44]) + DATAGRAM6[7:], "a fragment"),
    (101, DATAGRAM4[:24] + b"\0\7" + DATAGRAM4[26:], "no UDP"),
    (101, b"", "no IP"),
]


def classic(order: str, magic: int, link: int, packet: bytes) -> bytes:
    """Make a classic file of one packet."""
    head = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    return head + struct.pack(f"{order}4I", 5, 6, len(packet), len(packet)) + packet


def blocks(order: str, link: int, packet: bytes, kind: int, *options: tuple[int, bytes]) -> bytes:
    """Make a pcapng file of one packet in a block of this kind, and a block of a kind that nobody knows."""

    def block(kind: int, body: bytes) -> bytes:
        body += bytes(-len(body) % 4)
        length = struct.pack(f"{order}I", len(body) + 12)
        return struct.pack(f"{order}I", kind) + length + body + length

    told = b"".join(
        struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4) for code, value in options
    )
    heads = {
        6: struct.pack(f"{order}5I", 0, 0, 5_000_006, len(packet), len(packet)),
        2: struct.pack(f"{order}HH4I", 0, 3, 0, 5_000_006, len(packet), len(packet)),
        3: struct.pack(f"{order}I", len(packet)),
    }
    return (
        block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1))
        + block(1, struct.pack(f"{order}HHI", link, 0, 0) + told)
        + block(0xBAD, b"what is this?")
        + block(kind, heads[kind] + packet)
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("link", "packet", "payload"), PACKETS)
def test_captures_of_others_are_read(order: str, link: int, packet: bytes, payload: bytes | str) -> None:
    """UDP payloads are found behind every usual link header, in either format and byte order; the rest is counted."""
    files = [
        (classic(order, 0xA1B2C3D4, link, packet), 5_000_006_000),
        (classic(order, 0xA1B23C4D, link, packet), 5_000_000_006),
        (blocks(order, link, packet, 6), 5_000_006_000),
        (blocks(order, link, packet, 2), 5_000_006_000),
        (blocks(order, link, packet, 3), 0),
    ]
    for data, at_ns in files:
        found, reader = read(data)
        if isinstance(payload, str):
            assert (found, reader.skipped) == ([], {payload: 1})
        else:
            assert [(each.captured_ns, each.source_port, each.port, each.payload) for each in found] == [
                (at_ns, 7, 9, payload)
            ]
            assert unpack_address(found[0].source) == ("2001:db8::1" if payload == b"six" else "10.1.1.1")
        assert not reader.damaged


@pytest.mark.parametrize(
    ("option", "at_ns"),
    [((9, b"\x03"), 5_000_006_000_000), ((9, b"\x94"), 4_768_377_304), ((14, struct.pack("<q", 7)), 12_000_006_000)],
)
def test_units_of_time(option: tuple[int, bytes], at_ns: int) -> None:
    """An interface's times may be in powers of ten or of two, and count from a second of its own."""
    assert [each.captured_ns for each in read(blocks("<", 101, DATAGRAM4, 6, option))[0]] == [at_ns]


@given(st.binary(max_size=400))
def test_garbage_is_refused_or_ends(data: bytes) -> None:
    """Bytes of any kind are no capture, or reading ends."""
    for start in (b"", write_nothing(), classic("<", 0xA1B2C3D4, 101, DATAGRAM4)):
        try:
            found, reader = read(start + data)
        except CaptureError:
            assert not start
        else:
            assert len(found) <= 1 + len(data) // 28 or reader.damaged


def write_nothing() -> bytes:
    """Return a section with an interface and no packet."""
    return blocks("<", 101, b"", 6)[:-44]


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_changed_bytes_do_no_harm(at: int, change: bytes) -> None:
    """A file with some bytes changed gives datagrams, or is damaged, or no capture: nothing else happens."""
    for file in (
        blocks("<", 1, PACKETS[1][1], 6),
        blocks(">", 101, DATAGRAM6, 3),
        classic(">", 0xA1B23C4D, 1, PACKETS[0][1]),
    ):
        changed = file[:at] + change + file[at + len(change) :]
        try:
            read(changed)
        except CaptureError:
            assert at < 4

"""Segments in the hands of other programs: sealed, still open, and torn."""

import shutil
import subprocess
from pathlib import Path

import pytest

from shared.journal.records import Identity
from shared.journal.segment_reader import SegmentReader
from shared.journal.segments import Segment
from shared.net.addresses import unpack_address
from tests.shared.journal.filled import AT, NOW, Datagram, as_written, batch_of, identities, write_segment

CHECKED = ("-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE")
FIELDS = ("frame.time_epoch", "ip.src", "ipv6.src", "udp.srcport", "ip.dst", "udp.dstport", "udp.payload")
STATUS = ("ip.checksum.status", "udp.checksum.status")
GOOD, ABSENT = "1", "3"


def run(program: str, *arguments: str | Path, code: int = 0) -> str:
    """Run a program of Wireshark's; return its standard output. Skip where it is not here."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"there is no {program}")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


def datagrams(start: int, count: int) -> list[Datagram]:
    """Return datagrams of both families and of all lengths modulo 4."""
    sources = ("192.0.2.1", "2001:db8::1", "198.51.100.250")
    return [(sources[at % 3], 1024 + at, bytes([at % 251]) * (1 + at % 9)) for at in range(start, start + count)]


@pytest.fixture
def segments(tmp_path: Path) -> dict[str, tuple[Path, list[Datagram], Segment]]:
    """A segment in each state: its file, and the datagrams in it."""
    found = {}
    for number, state in enumerate(("sealed", "open", "torn")):
        rows = [datagrams(100 * number + 10 * at, 10) for at in range(5)]
        some = zip(identities(rows=[10] * 5), [batch_of(each, NOW + number) for each in rows], strict=True)
        segment = write_segment(tmp_path / state / "flows", some, number + 1, sealed=state == "sealed")
        path = tmp_path / state / "flows" / segment.name
        whole = [each for some in rows for each in some]
        if state == "torn":
            path.write_bytes(path.read_bytes()[:-5])
            whole.pop()
        found[state] = path, whole, segment
    return found


def expected(rows: list[Datagram], at_ns: int) -> list[list[str]]:
    """Return what tshark has to print of datagrams that came then."""
    seconds = f"{at_ns // 10**9}.{at_ns % 10**9:09}"
    four, status = unpack_address(AT.four), {4: [GOOD, ABSENT], 6: ["", GOOD]}
    return [
        [
            *(seconds, "" if ":" in source else source, source if ":" in source else ""),
            *(str(port), "" if ":" in source else four, str(AT.port), payload.hex()),
            *status[6 if ":" in source else 4],
        ]
        for source, port, payload in rows
    ]


@pytest.mark.parametrize("state", ["sealed", "open", "torn"])
def test_tshark_sees_every_datagram(segments: dict[str, tuple[Path, list[Datagram], Segment]], state: str) -> None:
    """Times, addresses, ports and bytes are those that came; checksums are right, or absent (UDP over IPv4)."""
    path, rows, segment = segments[state]
    fields = [part for name in (*FIELDS, *STATUS) for part in ("-e", name)]
    # udp.payload is there only where no dissector takes the datagram: none has these ports.
    printed = run("tshark", "-r", path, "-n", *CHECKED, "-T", "fields", *fields, code=2 if state == "torn" else 0)
    assert [line.split("\t") for line in printed.splitlines()] == expected(rows, segment.began_ns)


@pytest.mark.parametrize("state", ["sealed", "open", "torn"])
def test_capinfos_counts_them(segments: dict[str, tuple[Path, list[Datagram], Segment]], state: str) -> None:
    """Capinfos reads it to its end, or to where it is torn, and says so."""
    path, rows, _ = segments[state]
    said = run("capinfos", "-c", "-M", path, code=1 if state == "torn" else 0)
    assert f"Number of packets:   {len(rows)}" in said


def test_identities_survive_mergecap_and_editcap(
    tmp_path: Path, segments: dict[str, tuple[Path, list[Datagram], Segment]]
) -> None:
    """Merged and edited by others, a capture still has the batches with their identities, and they can be read back."""
    merged, edited, mended, whole = (tmp_path / f"{name}.pcapng" for name in ("merged", "edited", "mended", "whole"))
    run("mergecap", "-w", merged, segments["sealed"][0], segments["open"][0])
    run("editcap", merged, edited)
    run("editcap", segments["torn"][0], mended)  # says that it was cut short
    run("mergecap", "-w", whole, merged, mended)
    two, all_three = ("sealed", "open"), ("sealed", "open", "torn")
    for path, some in ((merged, two), (edited, two), (mended, ("torn",)), (whole, all_three)):
        for _, rows, segment in (segments[state] for state in some):
            with SegmentReader(path, segment) as reader:
                found = [as_written(head.identity, reader.read(head)[0]) for head in reader.heads()]
            assert found == [
                (Identity("ingest.1", 9, at, 10 * at), segment.began_ns, rows[10 * at : 10 * at + 10])
                for at in range(len(rows) // 10)
            ]

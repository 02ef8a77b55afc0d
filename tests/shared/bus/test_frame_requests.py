import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bus.frame_requests import check_frame, describe_failure, make_frame, parse_hex, parse_mac, sending_seconds
from shared.bus.messages import MAX_FRAME, TransmitReply

macs = st.binary(min_size=6, max_size=6)


@given(st.binary(), st.sampled_from(["", "0x"]), st.sampled_from(["", " ", ":", "\n"]), st.booleans())
def test_hexadecimal_as_people_write_it(data: bytes, before: str, between: str, upper: bool) -> None:
    """With 0x or without, in one piece, with colons, blanks or line ends, in either case: the same bytes."""
    digits = between.join(f"{byte:02x}" for byte in data)
    assert parse_hex(before + (digits.upper() if upper else digits)) == data


@given(macs, st.sampled_from(["", ":", "-"]))
def test_mac_as_people_write_it(mac: bytes, between: str) -> None:
    """With colons, with dashes, or in one piece."""
    assert parse_mac(mac.hex(between) if between else mac.hex()) == mac


@pytest.mark.parametrize("text", ["0", "0x0", "1:2", "0g", "0x0x00", "-1", "\u0664\u0664", "00\0"])
def test_what_is_no_hexadecimal(text: str) -> None:
    """Anything but two digits a byte is refused."""
    with pytest.raises(ValueError, match="not hexadecimal"):
        parse_hex(text)


@given(st.text())
def test_a_mac_has_six_bytes_or_is_refused(text: str) -> None:
    """A text is a MAC address or ValueError, with a sentence that stays short."""
    try:
        outcome: bytes | str = parse_mac(text)
    except ValueError as error:
        outcome = str(error)
    assert len(outcome) == 6 if isinstance(outcome, bytes) else len(outcome) < 300


@pytest.mark.parametrize("text", ["", "01:02:03:04:05", "01:02:03:04:05:06:07", "0102.0304.0506", "localhost"])
def test_what_is_no_mac(text: str) -> None:
    """Five bytes, seven, or another notation are refused."""
    with pytest.raises(ValueError, match=r"not a MAC|not hexadecimal"):
        parse_mac(text)


@given(macs, macs, st.integers(0, 0xFFFF), st.binary(), st.binary(max_size=8))
def test_a_frame_is_its_parts(destination: bytes, source: bytes, number: int, payload: bytes, checksum: bytes) -> None:
    """Destination, source, ethertype in network order, payload and checksum, and nothing else."""
    frame = make_frame(destination, source, number, payload, checksum)
    assert (frame[:6], frame[6:12], int.from_bytes(frame[12:14]), frame[14:]) == (
        *(destination, source, number),
        payload + checksum,
    )


@pytest.mark.parametrize(
    ("size", "own_fcs", "fits"),
    [
        *((13, False, False), (14, False, True), (17, True, False), (18, True, True)),
        *((MAX_FRAME, True, True), (MAX_FRAME + 1, False, False)),
    ],
)
def test_sizes_of_a_frame(size: int, own_fcs: bool, fits: bool) -> None:
    """A frame has a header, a check sequence if it brings its own, and is no longer than any interface takes."""
    if fits:
        assert len(check_frame(bytes(size), own_fcs=own_fcs)) == size
    else:
        with pytest.raises(ValueError, match=f"a frame of {size} bytes"):
            check_frame(bytes(size), own_fcs=own_fcs)


def test_own_check_sequence_has_four_bytes() -> None:
    """A checksum that is to be the frame check sequence has its length; any other has any."""
    assert make_frame(bytes(6), bytes(6), 0, b"", bytes(4), own_fcs=True) == bytes(18)
    with pytest.raises(ValueError, match="expected 4"):
        make_frame(bytes(6), bytes(6), 0, b"", bytes(5), own_fcs=True)


def test_time_that_frames_take() -> None:
    """The first goes at once, the others at their pace; without one, even very many are given time."""
    assert [sending_seconds(*each) for each in ((1, 0.001), (11, 5.0), (1, 0.0))] == [0.0, 2.0, 0.0]
    assert 1 < sending_seconds(1_000_000, 0.0) < 60


def test_refusal_says_what_was_done_by_then() -> None:
    """The transmitter's sentence stands alone, unless some frames had left."""
    assert describe_failure(TransmitReply(1, 0, "unavailable", "eth1 is down"), 5) == "eth1 is down"
    assert (
        describe_failure(TransmitReply(1, 2, "unavailable", "eth1 is down"), 5)
        == "eth1 is down; 2 of 5 frames have left"
    )

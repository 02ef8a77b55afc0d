import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.console.dissection import dissect


@given(st.binary(max_size=200) | st.sampled_from([b"\0\5", b"\0\x09", b"\0\x0a", b"\0\0\0\5"]).flatmap(
    lambda head: st.binary(max_size=100).map(lambda rest: head + rest)
))  # fmt: skip
def test_whatever_the_bytes_there_are_only_texts(payload: bytes) -> None:
    """No payload brings out anything but pairs of texts."""
    assert all(isinstance(text, str) for field in dissect(payload) for text in field)


@pytest.mark.parametrize(
    ("payload", "fields"),
    [
        (b"<165>1 2026 h a - - - x", {"looks like": "syslog, RFC 5424", "priority": "165: local4.notice"}),
        (b"<34>Oct 11 22:14:15 su: x", {"looks like": "syslog, RFC 3164", "priority": "34: auth.crit"}),
        (b"<999>x", {}),
        (
            struct.pack(">HHIIIIBBH", 5, 30, 1000, 0, 0, 77, 0, 3, 0x4064),
            {"looks like": "NetFlow v5", "records": "30", "sequence of flows": "77", "sampling": "1 in 100"},
        ),
        (
            struct.pack(">HHIIII", 9, 2, 1000, 0, 5, 6)
            + struct.pack(">HH", 0, 8)
            + b"aaaa"
            + struct.pack(">HH", 300, 4),
            {"looks like": "NetFlow v9", "source id": "6", "sets": "templates, 8 bytes; data by template 300, 4 bytes"},
        ),
        (
            struct.pack(">HHIII", 10, 16, 0, 8, 9),
            {"looks like": "IPFIX", "sequence of records": "8", "domain": "9", "sets": "none"},
        ),
        (
            struct.pack(">IIIIIII", 5, 1, 0x0A000001, 2, 3, 4000, 6),
            {"looks like": "sFlow v5", "agent": "10.0.0.1", "sub-agent": "2", "samples": "6", "uptime": "4.000 s"},
        ),
        (b"\x30\x26\x02\x01\x01\x04\x06public", {"looks like": "SNMP"}),
        (b"page.views:1|c", {"looks like": "statsd"}),
        (b"hello", {}),
    ],
)
def test_headers_are_told_in_words(payload: bytes, fields: dict[str, str]) -> None:
    """Each kind of datagram is recognised, and what its header says is told."""
    assert fields.items() <= dict(dissect(payload)).items()
    assert bool(fields) == bool(dissect(payload))

"""Templates before the past: before whose datagrams, under which numbers, and which of them."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from shared.bus.bodies.template_messages import TemplateDatagram
from shared.datagrams.batch import DatagramBatch
from shared.fanout.catch_up.past_templates import LATE_NS, PastTemplates
from shared.net.addresses import pack_address
from tests.builders import make_batch

OURS, THEIRS = "192.0.2.1", "198.51.100.1"
NOW = 1_795_000_000_000_000_000


def datagram(version: int, clock: int, number: int, domain: int, text: bytes) -> bytes:
    """A datagram of NetFlow v9, with this uptime and this time, or of IPFIX with this time."""
    head = (9, 1, clock, clock) if version == 9 else (10, 16 + len(text), clock)
    return struct.pack(">HHII" if version == 9 else ">HHI", *head) + struct.pack(">II", number, domain) + text


def kept(version: int, back: int, text: bytes, source: str = OURS, since_ns: int = 0) -> TemplateDatagram:
    """A template as a worker has it: by `back` before number 1000, of domain 5."""
    payload = datagram(version, 7, 1000 - back, 5, text)
    return TemplateDatagram(pack_address(source), 2055, payload, 77, back, since_ns)


def past(*payloads: bytes, sources: tuple[str, ...] = (OURS,)) -> DatagramBatch:
    """A batch of the past."""
    return make_batch(payloads, sources, "netflow")


def payloads(found: list[TemplateDatagram]) -> list[bytes]:
    """Return the payloads of datagrams."""
    return [each.payload for each in found]


def test_an_exporters_templates_come_once_and_its_first_datagram_continues_them() -> None:
    """Their numbers end where its first datagram of the past begins, and their clocks are that one's."""
    for version in (9, 10):
        templates = PastTemplates()
        templates.add([kept(version, 2, b"one"), kept(version, 1, b"two")], NOW)
        assert templates.pop_for(past(datagram(version, 9, 50, 6, b"another domain"))) == []
        assert templates.pop_for(past(datagram(version, 9, 50, 5, b"flow"), sources=(THEIRS,))) == []
        first = past(datagram(version, 3, 41, 5, b"flow"), datagram(version, 4, 42, 5, b"flow"))
        assert payloads(templates.pop_for(first)) == [
            datagram(version, 3, 39, 5, b"one"),
            datagram(version, 3, 40, 5, b"two"),
        ]
        assert templates.pop_for(first) == []
        assert templates.pop_rest() == []


def test_numbers_go_on_behind_the_largest() -> None:
    """A first datagram with number 0 continues a template with the largest one."""
    templates = PastTemplates()
    templates.add([kept(9, 1, b"one")], NOW)
    (found,) = templates.pop_for(past(datagram(9, 3, 0, 5, b"flow")))
    assert found.payload == datagram(9, 3, 0xFFFFFFFF, 5, b"one")
    assert found.aside == 77


def test_what_was_defined_otherwise_then_is_not_sent() -> None:
    """A template that has taken the place of another behind the collector's place comes in the past itself."""
    templates = PastTemplates()
    changed = kept(9, 1, b"changed", since_ns=NOW + LATE_NS + 1)
    templates.add([changed, kept(9, 1, b"old", THEIRS, NOW - 1)], NOW)
    both = past(datagram(9, 3, 41, 5, b"flow"), sources=(OURS,)), past(datagram(9, 3, 41, 5, b""), sources=(THEIRS,))
    assert [payloads(templates.pop_for(batch)) for batch in both] == [[], [datagram(9, 3, 40, 5, b"old")]]


def test_exporters_that_are_not_in_the_past_and_collectors_that_had_nothing_of_it() -> None:
    """In the end the rest is there as it was; what has not arrived waits again."""
    templates = PastTemplates()
    ours, theirs = kept(10, 1, b"ours"), kept(10, 1, b"theirs", THEIRS)
    templates.add([ours, theirs], NOW)
    assert len(templates.pop_for(past(datagram(10, 3, 41, 5, b"flow")))) == 1
    templates.put_back()
    assert len(templates.pop_for(past(datagram(10, 3, 41, 5, b"flow")))) == 1
    templates.add([ours], NOW)  # another worker has it too
    assert templates.pop_rest() == [theirs]


@given(st.lists(st.binary(max_size=24) | st.binary(max_size=24).map(lambda more: b"\0\x09" + more), max_size=8))
def test_any_bytes_in_the_past(some: list[bytes]) -> None:
    """Datagrams may be cut short, or be no flows: templates wait for one with a whole header of their domain."""
    templates = PastTemplates()
    templates.add([kept(9, 1, b"one"), TemplateDatagram(pack_address(OURS), 1, b"\0\x09" + bytes(14), 0)], NOW)
    found = templates.pop_for(past(*some))
    whole = any(len(each) >= 20 and each[:2] == b"\0\x09" and each[16:20] == bytes((0, 0, 0, 5)) for each in some)
    assert len(found) == whole

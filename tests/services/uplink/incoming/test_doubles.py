import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.uplink.incoming.doubles import Doubles, without
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.net.addresses import pack_address
from tests.services.ingest.flows.exported import a_set, ipfix, netflow_v5, netflow_v9, sflow


def batch(payloads: list[bytes], address: str = "192.0.2.7", port: int = 2055) -> DatagramBatch:
    """A batch of one exporter."""
    lengths, count = [len(each) for each in payloads], len(payloads)
    rows = make_rows(lengths, [pack_address(address)] * count, [port] * count)
    return DatagramBatch("flows", 0, rows, b"".join(payloads))


def found(doubles: Doubles, site: str, payloads: list[bytes], **more: object) -> list[bool]:
    """Tell which of these are doubles."""
    mask = doubles.find(site, batch(payloads, **more))  # type: ignore[arg-type]
    return [False] * len(payloads) if mask is None else mask.tolist()


@pytest.mark.parametrize(
    ("protocol", "make"),
    [
        ("netflow", netflow_v5),
        ("netflow", netflow_v9),
        ("ipfix", lambda number: ipfix(number, a_set(300, bytes(20)))),
        ("sflow", sflow),
        ("sflow", lambda number: sflow(number, agent="2001:db8::1")),
    ],
)
def test_what_another_site_has_sent_is_a_double(protocol: str, make: object) -> None:
    """The same numbers of the same exporter are doubles from another site alone, once they came from a first one."""
    doubles, some = Doubles(protocol, 1 << 20), [make(number) for number in range(200)]  # type: ignore[operator]
    assert not any(found(doubles, "a", some))
    assert not any(found(doubles, "a", some))
    assert all(found(doubles, "b", some, port=9))
    assert not any(found(doubles, "b", some, address="192.0.2.8"))
    others = [make(number) for number in range(150, 250)]  # type: ignore[operator]
    assert found(doubles, "b", others) == [True] * 50 + [False] * 50


def test_other_datagrams_are_never_doubles() -> None:
    """Datagrams that are not of the protocol pass, and what differs in time or length is another datagram."""
    doubles = Doubles("netflow", 1 << 20)
    for site in ("a", "b"):
        assert not any(found(doubles, site, [b"", b"<13>the disk is full", bytes(100)]))
    assert not any(found(doubles, "a", [netflow_v9(1, uptime=5), netflow_v9(2, rest=bytes(40))]))
    assert not any(found(doubles, "b", [netflow_v9(1, uptime=6), netflow_v9(2, rest=bytes(44))]))


def test_a_short_datagram_is_known_whatever_stands_behind_it() -> None:
    """The end of a batch is not the end of a datagram: only its own bytes count."""
    doubles, short = Doubles("netflow", 1 << 20), netflow_v9(1, rest=b"")
    assert not any(found(doubles, "a", [short, netflow_v9(7)]))
    assert found(doubles, "b", [short]) == [True]
    assert found(doubles, "c", [netflow_v9(8), short, netflow_v5(9)]) == [False, True, False]


def test_memory_is_bounded_and_what_is_forgotten_passes() -> None:
    """The table has a size; after many others a datagram is not known any more, and passes."""
    doubles = Doubles("netflow", 10_000)
    assert doubles._marks.nbytes + doubles._origins.nbytes + doubles._next.nbytes <= 10_000
    found(doubles, "a", [netflow_v9(number) for number in range(1000)])
    found(doubles, "a", [netflow_v9(number) for number in range(10**6, 10**6 + 1000)] * 10)
    assert not all(found(doubles, "b", [netflow_v9(number) for number in range(1000)]))


@given(st.lists(st.tuples(st.binary(max_size=60), st.booleans()), max_size=20), st.sampled_from([0, 64]))
def test_rows_are_taken_out(payloads: list[tuple[bytes, bool]], stride: int) -> None:
    """Rows that were not named are left, whichever way the payload lies in memory; any bytes can be looked at."""
    some = batch([payload for payload, _ in payloads])
    if stride:
        spread = b"".join(payload.ljust(stride, b"?") for payload, _ in payloads)
        some = DatagramBatch(some.stream, 0, some.rows, spread, stride)
    mask = np.array([going for _, going in payloads], np.bool_)
    assert [row[2] for row in without(some, mask).datagrams()] == [payload for payload, going in payloads if not going]
    Doubles("sflow", 1 << 12).find("a", some)

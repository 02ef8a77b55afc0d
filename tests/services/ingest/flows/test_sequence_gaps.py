import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.ingest.flows import stretches
from services.ingest.flows.exporters import MAX_PORTS, ExporterTracker
from services.ingest.flows.sequence_gaps import (
    MAX_GAP,
    MAX_HOLES,
    MAX_PARKED,
    MAX_STEPS,
    PARKED_SECONDS,
    UPTIME_SLACK_MS,
    WINDOW,
    SequenceTracker,
)
from services.ingest.flows.stretches import Hole
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.net.addresses import pack_address
from shared.settings.entries import Protocol
from tests.services.ingest.flows import exported

WRAP = 1 << 32
TEMPLATE = exported.a_set(2, exported.template(256, [4, 4, 2]))
Sent = tuple[str, bytes] | tuple[str, bytes, int]
"""Source, payload, and a port, 2055 unless told."""


def batch_of(sent: Sequence[Sent], stride: int = 0) -> DatagramBatch:
    """Datagrams as one receive call brings them."""
    rows = make_rows([len(each[1]) for each in sent], [pack_address(each[0]) for each in sent], 2055)
    rows["port"] = [each[2] if len(each) == 3 else 2055 for each in sent]
    payload = b"".join(each[1].ljust(stride, b"\xff") for each in sent)
    return DatagramBatch("flows", 0, rows, payload, stride)


def observed(protocol: Protocol, sent: Sequence[Sent], cuts: Sequence[int] = (), stride: int = 0) -> Counter[str]:
    """Return the counts when these come in batches that begin at `cuts`, and nothing follows.

    By address they are the same in sum.
    """
    account: Counter[str] = Counter()
    exporters = ExporterTracker(protocol, account)
    edges = [0, *sorted({cut % (len(sent) + 1) for cut in cuts}), len(sent)]
    for start, stop in pairwise(edges):
        if start < stop:
            exporters.observe(batch_of(sent[start:stop], stride))
    exporters.settle(at_once=True)
    if not account["exporter_evictions"]:
        units = ("exporter_missed", "exporter_missed_flows", "exporter_missed_records")
        assert exporters.missed().total() == sum(account[unit] for unit in units)
    return +account


def from_one(*payloads: bytes) -> list[Sent]:
    """Datagrams of one source."""
    return [("192.0.2.1", payload) for payload in payloads]


KINDS = ("v5", "v9", "ipfix", "sflow4", "sflow6")
PROTOCOLS: dict[str, Protocol] = {
    "v5": "netflow", "v9": "netflow", "ipfix": "ipfix", "sflow4": "sflow", "sflow6": "sflow",
}  # fmt: skip
UNITS = {"v5": "exporter_missed_flows", "ipfix": "exporter_missed_records"}


def datagram(kind: str, number: int, count: int, part: int, uptime: int = 1000) -> bytes:
    """A datagram of a kind; those that number flows or records take `count`, the others one."""
    number %= WRAP
    if kind == "v5":
        return exported.netflow_v5(number, count, uptime, engine=(part, 7))
    if kind == "v9":
        return exported.netflow_v9(number, uptime, source_id=part, rest=bytes(count))
    if kind == "ipfix":
        return exported.ipfix(number, TEMPLATE, exported.a_set(256, bytes(10 * count + count % 4)), domain=part)
    return exported.sflow(number, uptime, "2001:db8::5" if kind == "sflow6" else "192.0.2.5", part, bytes(count))


@settings(max_examples=75)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1 << 32),
    parts=st.integers(1, 4),
    loss=st.sampled_from([0.0, 0.05, 0.5]),
    delay=st.integers(0, 3),
    near_wrap=st.booleans(),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
    spread=st.booleans(),
    behind=st.booleans(),
)
def test_what_was_lost_is_what_is_missed(
    kind: str,
    seed: int,
    parts: int,
    loss: float,
    delay: int,
    near_wrap: bool,
    cuts: list[int],
    spread: bool,
    behind: bool,
) -> None:
    """Of interleaved exporters whose datagrams get lost and overtaken, over the wrap too, just what was lost is missed.

    Only before an exporter's first datagram and after its last nobody can know of a loss.
    """
    draw = random.Random(seed)
    number = {part: draw.randrange(WRAP - 200, WRAP) if near_wrap else draw.randrange(WRAP) for part in range(parts)}
    arrivals: list[tuple[float, int, int, int]] = []
    for at in range(20 * parts if kind == "ipfix" else 0):  # what shows where the number stands
        arrivals.append((at - 1000.0, at % parts, number[at % parts], 1 + at // parts % 2))
        number[at % parts] += 1 + at // parts % 2
    lost: list[tuple[int, int, int]] = []
    for at in range(draw.randrange(1, 120)):
        part, count = draw.randrange(parts), draw.randrange(1, 30)
        takes = count if kind in UNITS else 1
        if draw.random() < loss:
            lost.append((part, number[part], takes))
        else:
            # each exporter's own datagrams are what may overtake each other, by up to `delay` places
            arrivals.append((at + draw.random() * delay, part, number[part], count))
        number[part] += takes
    arrivals.sort()
    came = [(part, first) for _, part, first, _ in arrivals]
    begun, ended = dict(reversed(came)), {part: max(each for it, each in came if it == part) for part, _ in came}
    missed = sum(takes for part, first, takes in lost if part in begun and begun[part] < first < ended[part])
    address = "192.0.2.%d" if spread else "192.0.2.9%.0s"
    own = behind and kind == "ipfix"
    sent = [(address % part, datagram(kind, first + own * count, count, part)) for _, part, first, count in arrivals]
    account = observed(PROTOCOLS[kind], sent, cuts, stride=2000 if seed % 2 else 0)
    assert account[UNITS.get(kind, "exporter_missed")] == missed
    assert account["exporters"] == len(begun)
    assert account.keys() <= {UNITS.get(kind, "exporter_missed"), "exporters", "exporter_reordered"}
    overtaken = sum(
        first < max(each for it, each in came[: at + 1] if it == part) for at, (part, first) in enumerate(came)
    )
    assert account["exporter_reordered"] == overtaken


def signed(number: int) -> int:
    """The nearest way to a number, modulo 2**32."""
    return (number + WRAP // 2) % WRAP - WRAP // 2


def near(ahead: int, exact: bool) -> bool:
    """Return whether a number this far ahead of what is due is of the same series."""
    return -WINDOW <= ahead <= (WINDOW if exact else MAX_GAP)


class Reference:
    """One exporter, followed datagram by datagram and number by number; what it misses is counted under `unit`."""

    def __init__(self, unit: str = "missed") -> None:
        self.unit = unit
        self.due: int | None = None
        self.exact = True
        self.up = 0
        self.open: list[range] = []
        """Numbers of each gap, oldest first."""
        self.parked: list[tuple[int, bool, int, list[range], int]] = []
        """Series that were interrupted: due, exact, uptime, gaps, and how far the jump away was."""
        self.counts: Counter[str] = Counter()

    def take(self, number: int, count: int, up: int, sure: bool) -> None:
        """Take note of a datagram, as the module's docstring says."""
        if self.due is not None:
            start = self.due + signed(number - self.due)
            in_gap = any(each in gap for gap in self.open for each in range(start, start + count))
            if not near(start - self.due, self.exact) and not in_gap:
                self.change_series(number, up, start - self.due)
        ahead = 0 if self.due is None else signed(number - self.due)
        start = number if self.due is None else self.due + ahead
        if self.due is not None and signed(up - self.up) < -UPTIME_SLACK_MS:
            self.counts["exporter_restarts"] += 1
            self.miss(self.open)
            self.due, self.open, ahead = None, [], 0
        if self.due is None:
            self.due = start
        elif ahead > 0 and self.exact:
            self.keep([*self.open, range(self.due, start)])
        elif ahead < 0:
            self.counts["exporter_reordered"] += 1
            stop = start + count if sure else self.due
            pieces: list[range] = []
            for gap in self.open:
                apart = gap.stop <= start or stop <= gap.start or start == stop
                pieces += [gap] if apart else [range(gap.start, start), range(stop, gap.stop)]
            self.keep([piece for piece in pieces if piece])
            if start + count <= self.due:
                return
        self.due, self.exact, self.up = start + count, sure, up

    def change_series(self, number: int, up: int, jump: int) -> None:
        """Go on with the interrupted series that a number is of, or begin another."""
        assert self.due is not None
        ways = (
            each
            for each in self.parked
            if near(signed(number - each[0]), each[1]) and signed(up - each[2]) >= -UPTIME_SLACK_MS
        )
        found = next(ways, None)
        self.parked.append((self.due, self.exact, self.up, self.open, 0 if found else jump))
        self.due, self.open = None, []
        if found:
            self.parked.remove(found)
            self.due, self.exact, self.up, self.open, _ = found
        while len(self.parked) > MAX_PARKED:
            self.end_series(sure=True)

    def end_series(self, *, sure: bool) -> None:
        """The series that was interrupted first does not go on."""
        *_, gaps, jump = self.parked.pop(0)
        self.miss(gaps)
        if jump > MAX_GAP or jump < -WINDOW:
            self.counts["exporter_restarts"] += 1
        elif jump > 0:
            self.counts[self.unit if sure else "exporter_unsure"] += jump if sure else 1

    def finish(self) -> None:
        """Nothing follows."""
        self.miss(self.open)
        while self.parked:
            self.end_series(sure=False)

    def keep(self, gaps: list[range]) -> None:
        """Keep the last of these."""
        self.miss(gaps[: max(0, len(gaps) - MAX_HOLES)])
        self.open = gaps[max(0, len(gaps) - MAX_HOLES) :]

    def miss(self, gaps: list[range]) -> None:
        """Count these as missed."""
        self.counts[self.unit] += sum(map(len, gaps))


def followed(taken: Sequence[tuple[int, int, int, int, bool]], cuts: Sequence[int]) -> Counter[str]:
    """Return the counts for (exporter, number, count, uptime, sure) each, in batches that begin at `cuts`."""
    account: Counter[str] = Counter()
    numbers = SequenceTracker(3, account, "missed")
    for start, stop in pairwise([0, *sorted({cut % (len(taken) + 1) for cut in cuts}), len(taken)]):
        batch = sorted(taken[start:stop], key=lambda each: each[0])
        if batch:
            slot, *columns = (np.array(column, np.int64) for column in zip(*batch, strict=True))
            first = np.append(True, slot[1:] != slot[:-1])
            numbers.track(slot[first], first, columns[0], columns[1], columns[2], columns[3].astype(bool))
    numbers.settle(at_once=True)
    return account


steps = st.tuples(
    st.integers(0, 2),
    st.sampled_from(
        [
            *(0, 0, 0, 0, 0, 1, 2, 7, -1, -2, -5, -9, 30, -30),
            *(WINDOW, -WINDOW, -WINDOW - 40, WINDOW + 40, 2 * WINDOW, MAX_GAP + 1, 1 << 31),
        ]
    ),
    st.integers(0, 4),
    st.sampled_from([1_000_000] * 12 + [5]),
    st.sampled_from([True] * 6 + [False]),
)


@settings(max_examples=150)
@example(
    [(0, jump, count, 1_000_000, True) for jump, count in ((0, 4), (1, 4), (WINDOW, 0), (-WINDOW - 5, 1), (0, 1))],
    [],
    0,
)  # a run that begins in a gap, and goes on where only a restart leads
@given(st.lists(steps, max_size=60), st.lists(st.integers(0, 60), max_size=4), st.sampled_from([0, 5, WRAP - 20]))
def test_any_sequence_is_followed_as_one_by_one(
    walk: list[tuple[int, int, int, int, bool]], cuts: list[int], origin: int
) -> None:
    """Jumps both ways, repeats, restarts and datagrams of unknown count: columns count what a plain loop counts."""
    references = [Reference() for _ in range(3)]
    at, sent = [origin] * 3, list[Sent]()
    taken = []
    for part, jump, count, _, sure in walk:
        number = (at[part] + jump) % WRAP
        taken.append((part, number, count, 0, sure))
        references[part].take(number, count, 0, sure)
        at[part] = number + count
    account = followed(taken, cuts)
    for each in references:
        each.finish()
    assert account["missed"] == sum(each.counts["missed"] for each in references)
    assert account["exporter_reordered"] == sum(each.counts["exporter_reordered"] for each in references)
    assert account["exporter_restarts"] == sum(each.counts["exporter_restarts"] for each in references)
    by_uptime = [Reference() for _ in range(3)]
    sent.clear()
    at = [origin] * 3
    for part, jump, count, uptime, _ in walk:
        number = (at[part] + jump) % WRAP
        sent.append(("192.0.2.1", exported.netflow_v5(number, count + 1, uptime, engine=(part, 0))))
        by_uptime[part].take(number, count + 1, uptime, sure=True)
        at[part] = number + count + 1
    account = observed("netflow", sent, cuts)
    for each in by_uptime:
        each.finish()
    assert account["exporter_missed_flows"] == sum(each.counts["missed"] for each in by_uptime)
    assert account["exporter_restarts"] == sum(each.counts["exporter_restarts"] for each in by_uptime)


fragments = st.sampled_from([
    exported.netflow_v5(1, 2), exported.netflow_v9(3), exported.sflow(4), exported.sflow(4, agent="2001:db8::1"),
    TEMPLATE, exported.ipfix(9, TEMPLATE, exported.a_set(256, bytes(20))), exported.ipfix(9, TEMPLATE * 20),
    exported.a_set(3, b"\0"), exported.ipfix(9, exported.a_set(2, b"\x01\x00\xff\xff" + bytes(60))),
    b"\0\x0a\0\x10", b"\0\x0a\0\x14" + bytes(16),
])  # fmt: skip


@settings(max_examples=150)
@given(
    st.lists(st.lists(st.binary(max_size=60) | fragments, max_size=4).map(b"".join), max_size=30),
    st.sampled_from(["netflow", "ipfix", "sflow"]),
    st.sampled_from([0, 3000]),
)
def test_arbitrary_bytes_are_counted(payloads: list[bytes], protocol: Protocol, stride: int) -> None:
    """Nothing is raised, whatever comes; datagrams of another protocol are counted, and change no byte."""
    payloads = [payload[:3000] for payload in payloads]
    batch = batch_of(from_one(*payloads), stride)
    before = bytes(batch.payload)
    account: Counter[str] = Counter()
    exporters = ExporterTracker(protocol, account)
    for _ in range(2):
        exporters.observe(batch)
    exporters.settle(at_once=True)
    assert bytes(batch.payload) == before
    assert account["not_flow"] % 2 == 0
    assert account["not_flow"] <= 2 * len(payloads)
    assert all(count >= 0 for count in account.values())


@pytest.mark.parametrize("kind", KINDS)
def test_datagrams_of_the_protocol_are_no_strangers(kind: str) -> None:
    """A datagram of the protocol is taken for one, and one of another protocol is `not_flow`."""
    other = exported.netflow_v9(1) if PROTOCOLS[kind] != "netflow" else exported.sflow(1)
    sent = from_one(datagram(kind, 7, 3, 0), other, b"", datagram(kind, 7 + (3 if kind in UNITS else 1), 3, 0))
    assert observed(PROTOCOLS[kind], sent) == {"not_flow": 2, "exporters": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        exported.netflow_v5(1, 2)[:-1], exported.netflow_v5(1, 2) + b"\0", exported.netflow_v5(1, 0),
        exported.netflow_v9(1)[:19],
    ],
)  # fmt: skip
def test_header_that_does_not_fit_its_datagram_is_none(wrong: bytes) -> None:
    """A datagram cut short, or longer than its header says, is not followed."""
    assert observed("netflow", from_one(wrong)) == {"not_flow": 1}


def test_gap_is_missed_a_moment_later() -> None:
    """A gap counts when it was not filled for a second; numbers that fill it before are not missed."""
    account: Counter[str] = Counter()
    exporters = ExporterTracker("netflow", account)
    exporters.observe(batch_of(from_one(*map(exported.netflow_v9, (1, 4)))))
    exporters.settle()
    assert account["exporter_missed"] == 0
    exporters.observe(batch_of(from_one(exported.netflow_v9(3))))
    exporters.settle()
    assert (account["exporter_missed"], account["exporter_reordered"]) == (1, 1)
    exporters.observe(batch_of(from_one(exported.netflow_v9(2))))  # too late
    exporters.settle()
    assert (account["exporter_missed"], account["exporter_reordered"]) == (1, 2)


def test_restart_is_no_loss() -> None:
    """An exporter that has been up for less long, or falls back far, begins anew; what it loses then is missed."""
    later = exported.netflow_v9(500, uptime=90_000)
    by_uptime = [later, exported.netflow_v9(0, uptime=10), exported.netflow_v9(2, uptime=20)]
    assert observed("netflow", from_one(*by_uptime)) == {"exporters": 1, "exporter_restarts": 1, "exporter_missed": 1}
    by_number = [exported.sflow(1_000_000), exported.sflow(0), exported.sflow(2)]
    assert observed("sflow", from_one(*by_number)) == {"exporters": 1, "exporter_restarts": 1, "exporter_missed": 1}
    wrapped = [exported.netflow_v9(1, uptime=WRAP - 5), exported.netflow_v9(2, uptime=100_000)]
    assert observed("netflow", from_one(*wrapped)) == {"exporters": 1}


def test_exporters_are_told_apart_by_what_they_say() -> None:
    """One address may have several engines, source ids or domains; an sFlow agent may have several addresses."""
    engines = [
        exported.netflow_v5(number, engine=engine) for number, engine in ((5, (0, 1)), (90, (0, 2)), (700, (1, 1)))
    ]
    ids = [exported.netflow_v9(number, source_id=number) for number in (5, 90)]
    assert observed("netflow", from_one(*engines, *ids)) == {"exporters": 5}
    agent = [("192.0.2.1", exported.sflow(5)), ("192.0.2.2", exported.sflow(6)), ("2001:db8::1", exported.sflow(8))]
    assert observed("sflow", agent) == {"exporters": 1, "exporter_missed": 1}


def test_number_of_exporters_is_bounded() -> None:
    """The exporter that was silent for longest is forgotten for a new one, with what it misses counted."""
    account: Counter[str] = Counter()
    exporters = ExporterTracker("netflow", account, capacity=2)
    for source_id, number in ((1, 1), (1, 4), (2, 1), (3, 1), (2, 3), (1, 900)):
        exporters.observe(batch_of(from_one(exported.netflow_v9(number, source_id=source_id))))
    exporters.settle(at_once=True)
    assert +account == {"exporter_evictions": 2, "exporter_missed": 3, "exporters": 2}


class TestTemplates:
    def test_records_are_counted_by_templates(self) -> None:
        """Data of several templates, options too, of any order of sets, with padding: its records are counted."""
        learned = exported.ipfix(
            0,
            exported.a_set(2, exported.template(256, [4, 4]) + exported.template(257, [1, 8], enterprise=True)),
            exported.a_set(3, exported.options_template(300, [4, 2])),
        )
        data = exported.ipfix(
            0, exported.a_set(300, bytes(6)), exported.a_set(256, bytes(8 * 3 + 2)), exported.a_set(257, bytes(9 * 2))
        )
        assert observed("ipfix", from_one(learned, data, exported.ipfix(6))) == {"exporters": 1}
        assert observed("ipfix", from_one(learned, data, exported.ipfix(8)))["exporter_missed_records"] == 2

    @pytest.mark.parametrize(
        "unsure",
        [
            exported.a_set(258, bytes(20)),
            exported.a_set(256, bytes(20))[:-2],
            b"\x01\x00\x00\x00",
            exported.a_set(256, b"") * 17,
        ],
    )
    def test_only_what_is_certain_is_missed(self, unsure: bytes) -> None:
        """Behind a datagram whose records can't be counted nothing is missed, however far the next one is."""
        begin = [exported.ipfix(0, TEMPLATE), exported.ipfix(0)]
        sent = from_one(*begin, exported.ipfix(0, unsure), exported.ipfix(50), exported.ipfix(53))
        assert observed("ipfix", sent) == {"exporters": 1, "exporter_unsure": 1, "exporter_missed_records": 3}

    def test_records_that_vary_in_length_are_not_counted(self) -> None:
        """Of a template with a field that says its own length, a datagram's records are not known."""
        varying = exported.a_set(2, exported.template(256, [4, 0xFFFF]))
        sent = from_one(
            exported.ipfix(0, varying), exported.ipfix(0, exported.a_set(256, bytes(30))), exported.ipfix(9)
        )
        assert observed("ipfix", sent) == {"exporters": 1, "exporter_unsure": 1}

    def test_template_that_changes_counts_from_then_on(self) -> None:
        """The receive call in which a template becomes another is unsure; afterwards records are counted by the new."""
        new = exported.a_set(2, exported.template(256, [20]))
        before = from_one(exported.ipfix(0, TEMPLATE, exported.a_set(256, bytes(20))), exported.ipfix(2))
        change = from_one(exported.ipfix(2, new, exported.a_set(256, bytes(20))))
        after = from_one(exported.ipfix(3, exported.a_set(256, bytes(20))), exported.ipfix(5))
        account = observed("ipfix", [*before, *change, *after], cuts=[2, 3])
        assert account == {"exporters": 1, "exporter_unsure": 1, "exporter_missed_records": 1}

    def test_more_templates_than_are_read_at_once_are_forgotten(self) -> None:
        """A flood of templates costs bounded work: who sends it is followed again when its templates come again."""
        flood = [
            ("192.0.2.1", exported.ipfix(0, *(exported.a_set(2, exported.template(256 + at, [1] * 300)),), domain=at))
            for at in range(30)
        ]
        data = [("192.0.2.1", exported.ipfix(0, exported.a_set(256 + at, bytes(300)), domain=at)) for at in range(30)]
        account = observed("ipfix", [*flood, *data], cuts=[30])
        assert 0 < account["exporter_unsure"] < 30
        assert observed("ipfix", [*flood, *flood, *data], cuts=[30, 60])["exporter_unsure"] < account["exporter_unsure"]


def test_large_batch_with_a_hostile_sender_among_others() -> None:
    """Numbers drawn at random by one sender change nothing of what is counted for the others."""
    draw = np.random.default_rng(5)
    sent = []
    for number in range(200):
        sent.append(("192.0.2.1", exported.netflow_v9(number)))
        sent.append(("192.0.2.66", exported.netflow_v9(int(draw.integers(WRAP)))))
    account = observed("netflow", [*sent, ("192.0.2.1", exported.netflow_v9(203))])
    alone = observed("netflow", [each for each in sent if each[0] == "192.0.2.66"])
    assert account["exporter_missed"] - alone["exporter_missed"] == 3
    assert alone["exporter_restarts"] > 100


Step = tuple[int, int]
"""The exporting process that sends, or the port that a datagram leaves by; and its number."""


def observed_in_calls(sent: Sequence[Sent], most: int, *, settled: bool = True) -> Counter[str]:
    """Return the counts when datagrams come in receive calls of these sizes, with a second between them or not."""
    account: Counter[str] = Counter()
    exporters = ExporterTracker("netflow", account)
    for start in range(0, len(sent), most):
        exporters.observe(batch_of(sent[start : start + most]))
        if settled:
            exporters.settle()
    exporters.settle(at_once=True)
    return +account


class TestSeveralProcesses:
    """Exporting processes behind one address, of one source id."""

    @pytest.mark.parametrize("port", [2055, 2056])
    @pytest.mark.parametrize("begins", [(100_000, 5_000), (5_000, 100_000), (7, 20_000_000), (WRAP - 30, 5_000)])
    @pytest.mark.parametrize("most", [1, 7, 200])
    def test_two_contiguous_series_miss_nothing(self, begins: tuple[int, int], port: int, most: int) -> None:
        """Two processes whose numbers run on miss nothing, by two ports and by one, whichever way they lie."""
        sent: list[Sent] = []
        for number in range(67):
            sent.append(("192.0.2.1", exported.netflow_v9((begins[0] + number) % WRAP), 2055))
            sent.append(("192.0.2.1", exported.netflow_v9((begins[1] + number) % WRAP), port))
        account = observed_in_calls(sent, most)
        assert account == {"exporters": 1 if port == 2055 else 2}

    @given(
        seed=st.integers(0, 1 << 32),
        processes=st.integers(1, 4),
        own_ports=st.booleans(),
        loss=st.sampled_from([0.0, 0.1, 0.4]),
        most=st.integers(1, 40),
        settled=st.booleans(),
    )
    def test_what_each_has_lost_is_missed(
        self, seed: int, processes: int, own_ports: bool, loss: float, most: int, settled: bool
    ) -> None:
        """With losses, just what each process has lost between its own datagrams is missed; of one port too."""
        draw = random.Random(seed)
        apart = 10 if own_ports else 1_000_000  # by one port they are told apart by their numbers alone
        number = [apart * each + draw.randrange(5) for each in range(processes)]
        sent: list[Sent] = []
        came: list[Step] = []
        for _ in range(200):
            process = draw.randrange(processes)
            if draw.random() >= loss:
                came.append((process, number[process]))
                sent.append(("192.0.2.1", exported.netflow_v9(number[process]), 2055 + process * own_ports))
            number[process] += 1
        missed = 0
        for process in range(processes):
            own = [each for it, each in came if it == process]
            missed += max(own) - min(own) + 1 - len(own) if own else 0
        account = observed_in_calls(sent, most, settled=settled)
        assert account["exporter_missed"] <= missed
        if own_ports and not account["exporter_reordered"]:
            assert account["exporter_missed"] == missed or account["exporters"] < processes
        if not own_ports:
            assert account["exporter_missed"] == missed
        assert account["exporter_restarts"] == 0

    def test_what_goes_on_by_another_port_is_one(self) -> None:
        """One process that takes a port for each datagram is followed as one, with what it loses, by few slots."""
        numbers = [number for number in range(1, 300) if number % 10 or number < 10]
        sent: list[Sent] = [("192.0.2.1", exported.netflow_v9(number), 10_000 + number) for number in numbers]
        for most in (1, 50):
            account = observed_in_calls(sent, most)
            assert account == {"exporters": 1, "exporter_missed": len(range(10, 300, 10))}

    @given(
        st.lists(st.integers(0, 2), min_size=30, max_size=120),
        st.sets(st.integers(0, 119)),
        st.integers(1, 40),
    )
    def test_ports_that_fill_each_others_gaps_are_joined(self, ports: list[int], lost: set[int], most: int) -> None:
        """One numbering over several ports never misses more than was lost, however it is dealt out."""
        sent: list[Sent] = [
            ("192.0.2.1", exported.netflow_v9(number), 2055 + port)
            for number, port in enumerate(ports)
            if number not in lost
        ]
        account = observed_in_calls(sent, most)
        assert account["exporter_missed"] <= len(lost & {*range(len(ports))})

    def test_gaps_that_another_port_fills_join_it(self) -> None:
        """Two ports found to be of one numbering are one exporter from then on, whose losses are all missed."""
        dealt: list[Sent] = [
            ("192.0.2.1", exported.netflow_v9(number), 2055 + number % 2) for number in range(100) if number != 60
        ]
        assert observed_in_calls(dealt, 20) == {"exporters": 1, "exporter_missed": 1}

    def test_agents_of_one_address_on_several_hosts_are_apart(self) -> None:
        """Two hosts whose sFlow agents give the same address, as containers do, are two exporters."""
        sent = [
            (f"192.0.2.{1 + number % 2}", exported.sflow(number // 2 + 90_000 * (number % 2), agent="127.0.0.1"))
            for number in range(100)
        ]
        assert observed("sflow", sent) == {"exporters": 2}

    def test_engines_of_netflow_v5_too(self) -> None:
        """NetFlow v5 numbers flows: two processes of one engine miss what each has lost, in flows."""
        sent: list[Sent] = []
        for number in range(50):
            for process, begin in enumerate((1_000, 900_000)):
                if (number, process) != (20, 1):
                    sent.append(("192.0.2.1", exported.netflow_v5(begin + 30 * number, 30), 2055 + process))
        assert observed_in_calls(sent, 9) == {"exporters": 2, "exporter_missed_flows": 30}

    def test_a_jump_counts_once_the_series_before_is_silent(self) -> None:
        """An exporter that skips far and never goes back has lost that; it counts in a minute, at the end as unsure."""
        account: Counter[str] = Counter()
        exporters = ExporterTracker("netflow", account)
        exporters.observe(batch_of(from_one(*map(exported.netflow_v9, (1, 2, 5000)))))
        for _ in range(PARKED_SECONDS):
            exporters.settle()
        assert not account["exporter_missed"]
        exporters.settle()
        assert account["exporter_missed"] == 5000 - 3
        exporters.observe(batch_of(from_one(exported.netflow_v9(50_000))))
        exporters.settle(at_once=True)
        assert (account["exporter_missed"], account["exporter_unsure"]) == (5000 - 3, 1)

    def test_ports_kept_are_bounded(self) -> None:
        """Of one that takes port after port the first are forgotten, which evicts nobody."""
        account: Counter[str] = Counter()
        exporters = ExporterTracker("netflow", account, capacity=MAX_PORTS + 10)
        exporters.observe(batch_of([("192.0.2.9", exported.netflow_v9(5))]))
        for number in range(3 * MAX_PORTS):
            exporters.observe(batch_of([("192.0.2.1", exported.netflow_v9(number), 3000 + number)]))
        exporters.observe(batch_of([("192.0.2.9", exported.netflow_v9(7))]))
        exporters.settle(at_once=True)
        assert +account == {"exporters": 2, "exporter_missed": 1}


def test_forged_gaps_cost_as_many_steps_as_datagrams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports of one exporter that skip every other number, all at once, are compared in linear time."""
    made: list[Hole] = []

    class Counted(Hole):
        def __init__(self, start: int, stop: int, old: bool = False) -> None:
            super().__init__(start, stop, old)
            made.append(self)

    monkeypatch.setattr(stretches, "Hole", Counted)
    account: Counter[str] = Counter()
    exporters = ExporterTracker("netflow", account)
    for turn in range(2):
        exporters.observe(
            batch_of(
                [
                    ("192.0.2.1", exported.netflow_v9(1_000_000 * port + 2 * (number + 100 * turn)), port)
                    for number in range(100)
                    for port in (1, 2, 3, 4)
                ]
            )
        )
    assert len(made) < 10 * 800
    assert account["exporter_missed"] == 2 * 4 * 99 + 4 - 4 * MAX_HOLES


def test_forged_gaps_take_a_bounded_time() -> None:
    """Ports that may fill each other's gaps cost so much a second; beyond that these are unsure. A lone one misses."""
    account: Counter[str] = Counter()
    exporters = ExporterTracker("netflow", account)
    (*_, (_, tracker)) = exporters._kinds

    def forge(turn: int) -> None:
        numbers = [(1200 * turn + 17 * number + port, port) for number in range(59) for port in range(17)]
        numbers += [(1200 * turn + 1100, port) for port in range(17)]  # a number that all have had parts them
        exporters.observe(batch_of([("192.0.2.1", exported.netflow_v9(number), port) for number, port in numbers]))

    turns = 0
    while not account["exporter_unsure"]:
        forge(turns)
        turns += 1
    taken, missed = tracker.steps, account["exporter_missed"]
    assert MAX_STEPS <= taken < 1.1 * MAX_STEPS
    lone = [exported.netflow_v9(2 * number, source_id=7) for number in range(MAX_HOLES + 6)]
    exporters.observe(batch_of(from_one(*lone)))
    forge(turns)
    assert (tracker.steps, account["exporter_missed"]) == (taken, missed + 5)
    exporters.settle()
    forge(turns + 1)
    assert account["exporter_missed"] > missed + 5

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.bus.bodies.exporters_message import Exporters
from shared.bus.bodies.fields import MAX_NUMBER
from shared.bus.bodies.health_message import Health, Troubled
from shared.bus.bodies.journal_messages import (
    Behind,
    CatchUpReport,
    JournalPlace,
    JournalPortion,
    JournalRead,
    Replayed,
    WorkerPosition,
)
from shared.bus.bodies.nodes_message import Node, Nodes
from shared.bus.bodies.offload_messages import CollectorPath, KernelCopies, KernelServed, OffloadPaths, OffloadReply
from shared.bus.bodies.template_messages import Renewals, TemplateDatagram, Templates
from shared.bus.messages import (
    KINDS,
    MAX_ENVELOPE,
    MAX_MESSAGE,
    MAX_TOPIC,
    VERSION,
    Again,
    Body,
    Borrow,
    Datagrams,
    Envelope,
    MessageError,
    Part,
    RegistryChange,
    RegistrySnapshot,
    ServeReply,
    ServeRequest,
    Status,
    TransmitReply,
    TransmitRequest,
    again_topic,
    borrow_nothing,
    datagrams_topic,
    decode,
    encode,
)
from shared.client import Client, Place
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.limits import MAX_DATAGRAM, MAX_ROWS
from tests.builders import heavy_bodies, make_batch

CAUSES = {"malformed", "bad_version", "unknown_kind", "not_borrowed"}
CLIENT = Client("a", 7, "192.0.2.9", 2055, streams=("messages",), prefixes=("192.0.2.0/24",), sample=3, group="g")
BODIES: dict[str, Body] = {
    "datagrams": Datagrams("messages", 1_700_000_000_000_000_000),
    "again": Again("messages", 1_700_000_000_000_000_000, left=3),
    "registry.snapshot": RegistrySnapshot(5, 0, 1, [CLIENT, Client("b", 8, "::1", 1)]),
    "registry.change": RegistryChange(5, 6, [CLIENT], ["b"]),
    "serve.request": ServeRequest(1, "reply/gateway.1.a/", 6),
    "serve.reply": ServeReply(1, 6),
    "transmit.request": TransmitRequest(7, "reply/operator.1.a/", "eth1", bytes(range(60)), 3, 0.5, True),
    "transmit.reply": TransmitReply(7, 2, "unavailable", "eth1 is down"),
    "status": Status("ingest.1", 42, 0, 3, 0, 1, {"stream/messages": {"received": 2**62}}),
    "health": Health("relay", 3, 0, 1, [Troubled("a", 7, "refusing", 1500, 2**62), Troubled("b", 8, None, 0, 5)]),
    "exporters": Exporters("messages", 1.5, 9, 1, 2, [(b"x" * 16, 2**62, 0)]),
    "offload.copies": KernelCopies(4095, 2**62, "reply/offload.1.a/", 0, 1, [KernelServed(CLIENT, ("messages",))]),
    "offload.reply": OffloadReply(2**62),
    "replay.batch": Replayed(7, "messages", 1_700_000_000_000_000_000, "ingest.2", 2**62, 5, 30),
    "replay.portion": JournalPortion(
        7, 1, [WorkerPosition("ingest.2", 2**62, 6, 33, 1)], JournalPlace(12, 4096), True, 4, 5, "unavailable", "why"
    ),
    "catchup": CatchUpReport(
        "relay", [Behind("a", 7, "catching_up", 3, [Place("messages", "ingest.2", 2**62, 6, 33, 1)], 9, 10, 11)]
    ),
    "journal.read": JournalRead(
        7,
        "replay/forwarder.1.5f/",
        "messages",
        3,
        [WorkerPosition("ingest.2", 2**62, 5, 30)],
        9,
        10,
        JournalPlace(2, 3),
    ),
    "offload.paths": OffloadPaths(3, 0, 1, [CollectorPath("a", "kernel"), CollectorPath("b", "relay", "it is slow")]),
    "templates": Templates(
        "netflow", 1, 2, [TemplateDatagram(bytes(10) + b"\xff\xff\n\0\0\1", 2055, bytes(16), 2**32 - 1)]
    ),
    "nodes": Nodes(
        True,
        [
            Node("berlin", "live", 0),
            Node("bonn", "silent", 2500, 9, 3, {"relay": [Place("messages", "uplink.1", 2**62, 0, 33)]}, 7),
        ],
        ("berlin",),
    ),
    "renewals": Renewals("netflow", [TemplateDatagram(bytes(16), 0, bytes(65507), 0)]),
}
BATCHES = {
    "datagrams": datagrams_topic("messages"),
    "again": again_topic("ingest.1", "forwarder.1"),
    "replay.batch": "replay/forwarder.1.5f/",
}
"""Topics of the kinds that have arrays."""
ENVELOPE = [VERSION, "datagrams", "ingest.1", 9, 4, 12]


def encoded(kind: str) -> list[Part]:
    """A sound message of a kind."""
    topic, batch = BATCHES.get(kind, "registry/"), None
    if kind in BATCHES:
        batch = make_batch([b"", b"one", b"three"], ["192.0.2.1", "::1"])
    return encode(topic, BODIES[kind], sender="ingest.1", boot=9, sequence=4, total=12, batch=batch)


def cause_of(parts: Sequence[Part], borrow: Borrow = borrow_nothing) -> str:
    """The cause for which the parts are refused, "" when they are taken."""
    try:
        decode(parts, borrow)
    except MessageError as error:
        return error.cause if str(error) else "no reason given"
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back(kind: str) -> None:
    """A message of every kind is decoded to what was encoded."""
    parts = encoded(kind)
    message = decode(parts)
    assert message.body == BODIES[kind]
    assert list(msgspec.structs.astuple(message.envelope)) == [VERSION, kind, *ENVELOPE[2:]]
    assert message.topic == bytes(parts[0]).decode()
    assert (message.batch is not None) == (kind in BATCHES)


def test_batch_is_a_view_of_the_received_parts() -> None:
    """The columns come back as they were, without a copy, and can't be written to."""
    parts = encoded("datagrams")
    received = [bytes(part) for part in parts[:3]] + [memoryview(bytes(part)) for part in parts[3:]]
    batch = decode(received).batch
    assert batch is not None
    assert list(batch.datagrams()) == [("192.0.2.1", 514, b""), ("::1", 514, b"one"), ("192.0.2.1", 514, b"three")]
    assert batch.payload is received[4]
    assert not batch.rows.flags.writeable


@pytest.mark.parametrize("kind", ["datagrams", "again"])
def test_rows_come_with_the_generation_that_the_kernel_has_copied_them_by(kind: str) -> None:
    """A batch tells the generation of all its rows, or of each; one that nobody else has copied tells none."""
    batch = make_batch([b"", b"one", b"three"])
    for fields, expected in (
        ({}, None),
        ({"generation": 0xFFFF}, [0xFFFF] * 3),
        ({"generations": b"\x01\x00\x00\x00\x00\x02"}, [1, 0, 0x200]),
    ):
        body = msgspec.structs.replace(BODIES[kind], **fields)
        message = decode(encode(BATCHES[kind], body, sender="ingest.1", boot=9, sequence=4, total=12, batch=batch))
        assert message.body == body
        assert message.batch is not None
        assert (None if message.batch.generations is None else message.batch.generations.tolist()) == expected


def test_generations_of_another_number_of_rows_are_refused() -> None:
    """A batch whose generations are more or fewer than its rows is malformed: nobody could tell whose they are."""
    for column in (b"\1\0", b"\1\0" * 4, b"\1\0\1", b"\1\0" * (MAX_ROWS + 1)):
        body = Datagrams("messages", 0, generations=column)
        batch = make_batch([b"", b"one", b"three"])
        parts = encode(BATCHES["datagrams"], body, sender="ingest.1", boot=9, sequence=4, total=12, batch=batch)
        assert cause_of(parts) == "malformed"


def test_batch_without_rows_is_a_mark() -> None:
    """A batch without rows passes: it says where a sequence stands."""
    parts = encode(
        "datagrams/messages/", BODIES["datagrams"], sender="ingest.1", boot=1, sequence=0, total=0, batch=make_batch([])
    )
    batch = decode(parts).batch
    assert batch is not None
    assert len(batch) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_our_messages_are_those_of_another_encoder(kind: str) -> None:
    """Envelope and body are to the byte what an independent implementation of msgpack makes of them."""
    _, envelope, body, *_ = encoded(kind)
    assert envelope == msgspec.msgpack.encode([VERSION, kind, *ENVELOPE[2:]])
    sent = {"datagrams": 5, "again": 6}.get(kind)
    """Fields; those behind are of use only where the kernel copies."""
    assert body == msgspec.msgpack.encode(msgspec.to_builtins(BODIES[kind], builtin_types=(bytes,))[:sent])


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_another_encoder_are_read(kind: str) -> None:
    """Envelope and body that an independent implementation encoded are decoded."""
    topic, _, _, *arrays = encoded(kind)
    envelope, body = msgspec.msgpack.encode([VERSION, kind, *ENVELOPE[2:]]), msgspec.msgpack.encode(BODIES[kind])
    assert decode([topic, envelope, body, *arrays]).body == BODIES[kind]


def packed(**changes: Any) -> list[Part]:
    """The parts of a datagrams message with some fields of its envelope, or whole parts, changed."""
    parts = encoded("datagrams")
    names = ("version", "kind", "sender", "boot", "sequence", "total")
    envelope = [changes.get(name, was) for name, was in zip(names, ENVELOPE, strict=True)]
    parts[1] = msgpack.packb(envelope)
    for name, number in (("topic", 0), ("envelope", 1), ("body", 2), ("rows", 3), ("payload", 4)):
        if name in changes:
            parts[number] = changes[name]
    return parts


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, ""),
        ({"version": VERSION + 1}, "bad_version"),
        ({"version": 0}, "bad_version"),
        ({"version": -1}, "bad_version"),
        ({"kind": "datagram"}, "unknown_kind"),
        ({"kind": ""}, "unknown_kind"),
        ({"version": True}, "malformed"),
        ({"sequence": True}, "malformed"),
        ({"sequence": 1.0}, "malformed"),
        ({"sequence": float("nan")}, "malformed"),
        ({"total": -1}, "malformed"),
        ({"boot": -1}, "malformed"),
        ({"total": 2**64 - 1}, "malformed"),
        ({"sequence": "4"}, "malformed"),
        ({"sender": b"ingest.1"}, "malformed"),
        ({"sender": "ingest.1\n"}, "malformed"),
        ({"sender": None}, "malformed"),
        ({"total": msgpack.ExtType(1, b"")}, "malformed"),
        ({"total": msgpack.Timestamp(1)}, "malformed"),
        ({"envelope": b""}, "malformed"),
        ({"envelope": msgpack.packb(ENVELOPE[:5])}, "malformed"),
        ({"envelope": msgpack.packb(dict(enumerate(ENVELOPE)))}, "malformed"),
        ({"envelope": msgpack.packb(ENVELOPE) + b"\0"}, "malformed"),
        ({"envelope": msgpack.packb([*ENVELOPE[:2], "x" * MAX_ENVELOPE, *ENVELOPE[3:]])}, "malformed"),
        ({"body": b""}, "malformed"),
        ({"body": msgpack.packb(["messages"])}, "malformed"),
        ({"body": msgpack.packb(["messages", True])}, "malformed"),
        ({"body": msgpack.packb(["traps", 0])}, "malformed"),
        ({"body": msgpack.packb(["messages/more", 0]), "topic": b"datagrams/messages/more/"}, "malformed"),
        ({"body": msgpack.packb(["x" * 65, 0]), "topic": b"datagrams/%s/" % (b"x" * 65)}, "malformed"),
        ({"body": msgpack.packb(["", 0]), "topic": b"datagrams//"}, "malformed"),
        ({"topic": b"datagrams/traps/"}, "malformed"),
        ({"topic": b"datagrams/messages"}, "malformed"),
        ({"topic": b"\xff"}, "malformed"),
        ({"topic": b""}, "malformed"),
        ({"topic": b"x" * (MAX_TOPIC + 1)}, "malformed"),
        ({"rows": b""}, "malformed"),
        ({"rows": bytes(59)}, "malformed"),
        ({"rows": bytes(80)}, "malformed"),
        ({"rows": bytes(20 * (MAX_ROWS + 1)), "payload": b""}, "malformed"),
        ({"rows": bytes(20 * MAX_ROWS), "payload": b""}, ""),
        ({"rows": b"\xff" * 20, "payload": bytes(65535)}, "malformed"),
        ({"payload": b""}, "malformed"),
        ({"payload": b"ninebytes"}, "malformed"),
    ],
)
def test_each_wrong_part_is_refused_under_its_cause(changes: dict[str, Any], cause: str) -> None:
    """The fault of a message decides the word under which it is counted."""
    assert cause_of(packed(**changes)) == cause


@pytest.mark.parametrize(
    "fields",
    [
        {"port": 65536},
        {"port": -1},
        {"port": True},
        {"port": 9.0},
        {"sample": 0},
        {"sample": -1},
        {"address": "collector.example"},
        {"address": ""},
        {"prefixes": ["192.0.2.1/24"]},
        {"prefixes": "::/0"},
        {"prefixes": ["::/0"] * 257},
        {"streams": ["a"] * 65},
        {"source": "forged"},
        {"withheld": True},
        {"withheld": {"by": "ops"}},
        {"withheld": {"by": "ops", "since": 1.0, "reason": "x" * 201}},
    ],
)
def test_client_that_no_copy_can_be_sent_to_is_refused(fields: dict[str, Any]) -> None:
    """A registry entry whose fields a sender of copies can't use never gets to one."""
    client = {"name": "a", "generation": 1, "address": "127.0.0.1", "port": 9, "streams": ["messages"]} | fields
    envelope = msgpack.packb([VERSION, "registry.snapshot", *ENVELOPE[2:]])
    assert cause_of([b"registry/", envelope, msgpack.packb([1, 0, 1, [client]])]) == "malformed"


def test_topic_is_short() -> None:
    """A topic longer than any of ours is refused, whatever the kind."""
    for size, cause in ((MAX_TOPIC, ""), (MAX_TOPIC + 1, "malformed")):
        assert cause_of([b"x" * size, *encoded("registry.change")[1:]]) == cause


def test_account_beyond_what_can_be_added_to_is_refused() -> None:
    """A counter near the end of msgpack's integers is refused: no receiver could add to it and report the sum."""
    body = Status("ingest.1", 1, 0, 1, 0, 1, {"stream/messages": {"published": 2**64 - 1}})
    assert cause_of(encode("status/i/", body, sender="ingest.1", boot=1, sequence=0, total=0)) == "malformed"


SICK = ["a", 7, "refusing", 1500, 3]


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (["relay", 1, 0, 1, [SICK]], ""),
        (["original", 0, 0, 1, []], ""),
        (["forged", 1, 0, 1, []], "malformed"),
        (["relay", -1, 0, 1, []], "malformed"),
        (["relay", 1, -1, 1, []], "malformed"),
        (["relay", 1, 0, 0, []], "malformed"),
        (["relay", 1, 0, 1 << 20, []], "malformed"),
        (["relay", 1, 0, 1, None], "malformed"),
        (["relay", 1, 0, 1, [["", *SICK[1:]]]], "malformed"),
        (["relay", 1, 0, 1, [["n" * 256, *SICK[1:]]]], "malformed"),
        (["relay", 1, 0, 1, [["a", -7, *SICK[2:]]]], "malformed"),
        (["relay", 1, 0, 1, [["a", 7, "ok", 0, 0]]], "malformed"),
        (["relay", 1, 0, 1, [["a", 7, "slow", -1, 0]]], "malformed"),
        (["relay", 1, 0, 1, [["a", 7, "slow", 1.5, 0]]], "malformed"),
        (["relay", 1, 0, 1, [["a", 7, "slow", 0, MAX_NUMBER + 1]]], "malformed"),
    ],
)
def test_health_that_nobody_could_mean_is_refused(body: list[object], cause: str) -> None:
    """A list with an unknown source or word, a number out of bounds or a name too long is refused whole."""
    assert cause_of([b"health/relay/", msgpack.packb([VERSION, "health", *ENVELOPE[2:]]), msgpack.packb(body)]) == cause


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BATCHES])
@pytest.mark.parametrize("extra", [[b""], [b"", b""]])
def test_arrays_belong_to_datagrams_alone(kind: str, extra: list[Part]) -> None:
    """Parts after the body of any other kind make the message malformed."""
    assert cause_of([*encoded(kind), *extra]) == "malformed"


def test_batch_out_of_the_journal_is_one_only_on_a_readers_topic() -> None:
    """A batch of the journal without its payload, or on the topic of a stream, is malformed."""
    topic, *rest = encoded("replay.batch")
    for parts in ([topic, *rest[:-1]], [b"datagrams/messages/", *rest], [b"again/ingest.1/forwarder.1/", *rest]):
        assert cause_of(parts) == "malformed"
        with pytest.raises(MessageError, match="batch out of the journal on"):
            decode(parts)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 6, 1000])
def test_wrong_number_of_parts_is_refused(count: int) -> None:
    """Datagrams have five parts, neither fewer nor more."""
    parts = encoded("datagrams")
    assert cause_of((parts * 200)[:count]) == "malformed"


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa0", b"\xdd\x00\x00\x00\x01"])
@pytest.mark.parametrize("number", [1, 2])
def test_nesting_a_hundred_thousand_deep_is_refused(opening: bytes, number: int) -> None:
    """Arrays and maps nested beyond any stack cost their message and nothing else."""
    for kind in KINDS:
        parts = encoded(kind)
        parts[number] = opening * 100_000
        assert cause_of(parts) == "malformed"
        body = list(msgspec.msgpack.decode(encoded(kind)[2]))
        behind = bytes([0x91 + len(body)]) + msgpack.packb(body)[1:]  # where a later version might add a field
        assert cause_of([*encoded(kind)[:2], behind + opening * 100_000, *encoded(kind)[3:]]) == "malformed"


@pytest.mark.parametrize("header", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
def test_header_that_announces_gigabytes_takes_none(header: bytes) -> None:
    """An array, map or string said to have 4 billion items, of which none is there, is refused at once."""
    for kind in KINDS:
        topic, envelope, body, *arrays = encoded(kind)
        assert cause_of([topic, header, body, *arrays]) == "malformed"
        assert cause_of([topic, envelope, header, *arrays]) == "malformed"
        assert cause_of([topic, envelope, b"\x94\x01\x00\x01" + header, *arrays]) == "malformed"


def peak_mb(parts: Sequence[Part]) -> float:
    """By how much the resident memory of this process grows at most while it decodes a message, sound or not."""
    gc.collect()
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    before = int(status.read_text().partition("VmRSS:")[2].split()[0])
    cause_of(parts)
    return (int(status.read_text().partition("VmHWM:")[2].split()[0]) - before) / 1024


@pytest.mark.parametrize("kind", ["registry.snapshot", "status"])
def test_ten_megabytes_of_empty_maps_take_no_memory(kind: str) -> None:
    """10 MB of empty maps are refused at the first of them, which is no client and no account."""
    parts = encoded(kind)
    count = 10_000_000
    maps = b"\xdd" + count.to_bytes(4, "big") + b"\x80" * count
    parts[2] = (b"\x94\x01\x00\x01" if kind == "registry.snapshot" else b"\x97\xa1i\x01\x00\x01\x00\x01") + maps
    assert cause_of(parts) == "malformed"
    assert peak_mb(parts) < 10


def test_longest_messages_take_bounded_memory() -> None:
    """A part of the longest size takes well under 100 MB to decode, whatever fills it and however small its items."""
    for kind, body in heavy_bodies():
        assert MAX_MESSAGE * 0.6 < len(body) <= MAX_MESSAGE
        assert peak_mb([b"t/", msgpack.packb([VERSION, kind, "ingest.9", *ENVELOPE[3:]]), body]) < 60, kind


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=100), max_size=7))
def test_arbitrary_parts_raise_nothing_else(parts: list[bytes]) -> None:
    """Arbitrary bytes in any number of parts are refused by MessageError, with a cause that is counted."""
    assert cause_of(parts) in CAUSES


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100)
@given(st.sampled_from(sorted(KINDS)), st.lists(values, max_size=7) | values, st.binary(max_size=60), st.binary())
def test_arbitrary_bodies_raise_nothing_else(kind: str, body: object, rows: bytes, payload: bytes) -> None:
    """Any msgpack value as the body of any kind is taken or refused by MessageError."""
    envelope = msgpack.packb([VERSION, kind, *ENVELOPE[2:]])
    arrays = [rows, payload] if kind in BATCHES else []
    assert cause_of([b"registry/", envelope, msgpack.packb(body), *arrays]) in {*CAUSES, ""}


@settings(max_examples=100)
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_damaged_messages_raise_nothing_else(kind: str, data: st.DataObject) -> None:
    """A sound message with bytes flipped, parts lost, doubled or cut is taken or refused by MessageError."""
    parts = [bytes(part) for part in encoded(kind)]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(parts) - 1)))
        damage = data.draw(st.sampled_from(["flip", "drop", "double", "cut", "append"]))
        if damage == "flip" and parts and parts[at]:
            byte = data.draw(st.integers(0, len(parts[at]) - 1))
            flipped = parts[at][byte] ^ data.draw(st.integers(1, 255))
            parts[at] = parts[at][:byte] + bytes([flipped]) + parts[at][byte + 1 :]
        elif damage == "drop":
            del parts[at : at + 1]
        elif damage == "double":
            parts[at:at] = parts[at : at + 1]
        elif damage == "cut" and parts:
            parts[at] = parts[at][: data.draw(st.integers(0, len(parts[at])))]
        elif parts:
            parts[at] += data.draw(st.binary(max_size=20))
    if (cause := cause_of(parts)) == "":
        decoded = decode(parts)
        if decoded.batch is not None:
            decoded.batch.check()
    assert cause in {*CAUSES, ""}


def lent(payloads: Sequence[bytes], loan: int, chunk: int | None, stride: int) -> tuple[list[Part], DatagramBatch]:
    """A message whose payload is lent, and the batch that it is of."""
    batch = make_batch(payloads, ["192.0.2.1", "::1"])
    if stride:
        whole = b"".join(payload.ljust(stride, b"?") for payload in payloads)
        batch = DatagramBatch(batch.stream, batch.received_ns, batch.rows, whole, stride)
    body = Datagrams("messages", 5, loan, chunk, stride)
    return encode(
        datagrams_topic("messages"), body, sender="ingest.1", boot=9, sequence=4, total=12, batch=batch
    ), batch


@given(
    st.lists(st.binary(max_size=40), max_size=9),
    st.integers(1, MAX_NUMBER),
    st.integers(0, MAX_NUMBER),
    st.sampled_from([0, 40, 41, 1000]),
)
def test_lent_payload_comes_back(payloads: list[bytes], loan: int, chunk: int, stride: int) -> None:
    """A message with a loan has no payload part; who borrows is asked once, for as many bytes, and they are taken."""
    parts, batch = lent(payloads, loan, chunk, stride)
    asked = []

    def borrow(envelope: Envelope, body: Datagrams, size: int) -> memoryview:
        asked.append((envelope.sender, envelope.boot, body, size))
        return memoryview(batch.payload)

    taken = decode(parts, borrow).batch
    assert len(parts) == 4
    assert asked == [("ingest.1", 9, Datagrams("messages", 5, loan, chunk, stride), len(batch.payload))]
    assert taken is not None
    assert list(taken.datagrams()) == list(batch.datagrams())
    assert taken.stride == stride
    assert cause_of(parts) == "not_borrowed"


@given(st.lists(st.binary(max_size=40), max_size=9), st.sampled_from([0, 40, 41, 1000]))
def test_payload_with_a_stride_may_be_in_the_message(payloads: list[bytes], stride: int) -> None:
    """Without a chunk the payload is a part of the message, whatever the stride, and nobody is asked for it."""
    parts, batch = lent(payloads, 7, None, stride)
    taken = decode(parts).batch
    assert len(parts) == 5
    assert taken is not None
    assert list(taken.datagrams()) == list(batch.datagrams())


def borrow_zeros(_envelope: Envelope, _body: Datagrams, size: int) -> bytes:
    """Lends as much as is asked for; it must be what a chunk could hold, or be refused without."""
    if not 0 <= size <= 1 << 21:
        raise MessageError("not_borrowed", "more than a chunk")
    return bytes(size)


ROWS = make_batch([b"one", b"three"]).rows.tobytes()


@pytest.mark.parametrize(
    ("body", "arrays", "cause"),
    [
        (["messages", 0, 1, 0, 0], [ROWS], ""),
        (["messages", 0, 1], [ROWS], "malformed"),
        (["messages", 0, 1], [ROWS, b"onethree"], ""),
        (["messages", 0, 1, 0, 5], [ROWS], ""),
        (["messages", 0, 1, 0, 5], [b""], ""),
        (["messages", 0, MAX_NUMBER, MAX_NUMBER, MAX_DATAGRAM], [ROWS], ""),
        (["messages", 0, 1, 0, 0], [ROWS, b"onethree"], "malformed"),
        (["messages", 0, 1, 0, 0], [ROWS, b""], "malformed"),
        (["messages", 0, 1, 0, 0], [], "malformed"),
        (["messages", 0, 1, None, 0], [ROWS, b"onethree"], ""),
        (["messages", 0], [ROWS], "malformed"),
        (["messages", 0, 1, 0, 4], [ROWS], "malformed"),
        (["messages", 0, 1, 0, 5], [ROWS[:-1]], "malformed"),
        (["messages", 0, 1, 0, 5], [bytes(20 * (MAX_ROWS + 1))], "malformed"),
        (["messages", 0, 1, 0, 0], [b"\xff" * 20], "malformed"),
        (["messages", 0, 1, 0, MAX_DATAGRAM], [bytes(20 * MAX_ROWS)], "not_borrowed"),
        (["messages", 0, 1, 0, 0], [ROWS * 1000], "malformed"),
        (["messages", 0, 0, None, 5], [ROWS, b"onethree"], "malformed"),
        (["messages", 0, 0, None, 5], [ROWS, b"one..three"], ""),
        (["messages", 0, 1, 0, MAX_DATAGRAM + 1], [ROWS], "malformed"),
        (["messages", 0, 1, 0, -1], [ROWS], "malformed"),
        (["messages", 0, -1, 0, 0], [ROWS], "malformed"),
        (["messages", 0, 1, -1, 0], [ROWS], "malformed"),
        (["messages", 0, MAX_NUMBER + 1, 0, 0], [ROWS], "malformed"),
        (["messages", 0, 1, MAX_NUMBER + 1, 0], [ROWS], "malformed"),
        (["messages", 0, 2**64 - 1, 2**64 - 1, 2**64 - 1], [ROWS], "malformed"),
        (["messages", 0, True, 0, 0], [ROWS], "malformed"),
        (["messages", 0, 1.0, 0, 0], [ROWS], "malformed"),
        (["messages", 0, 1, None, 0], [ROWS], "malformed"),
        (["messages", 0, "1", 0, 0], [ROWS], "malformed"),
    ],
)
def test_loan_and_payload_exclude_each_other(body: list[object], arrays: list[bytes], cause: str) -> None:
    """A chunk with a payload part, neither of both, a stride too small and numbers out of bounds are refused."""
    envelope = msgpack.packb(ENVELOPE)
    found = cause_of([b"datagrams/messages/", envelope, msgpack.packb(body), *arrays], borrow_zeros)
    assert found == cause


numbers = st.integers(0, 70_000) | st.integers(-1, 2**64 - 1) | st.sampled_from([0, 1, MAX_NUMBER, MAX_NUMBER + 1])


@settings(max_examples=150)
@given(
    numbers, numbers, numbers | st.just(5), st.binary(max_size=100) | st.just(ROWS), st.lists(st.binary(), max_size=2)
)
def test_arbitrary_loans_raise_nothing_else(
    loan: int, chunk: int, stride: int, rows: bytes, payload: list[bytes]
) -> None:
    """Any numbers in a loan with any rows are taken, and then sound, or refused by MessageError, whoever borrows."""
    body = msgpack.packb(["messages", 0, loan, chunk, stride])
    parts = [b"datagrams/messages/", msgpack.packb(ENVELOPE), body, rows, *payload]
    if cause_of(parts, borrow_zeros) == "":
        batch = decode(parts, borrow_zeros).batch
        assert batch is not None
        batch.check()
        list(batch.datagrams())
    for borrow in (borrow_nothing, borrow_zeros, lambda *_: b"", lambda *_: bytes(7)):
        assert cause_of(parts, borrow) in {*CAUSES, ""}

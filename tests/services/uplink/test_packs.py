import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.uplink.packs import HEAD, JOIN_NS, LENGTHS, MARK, UNKNOWN, Pack, Packer, read_pack
from services.uplink.subjects import Origin, parse_subject, stream_subjects, unparse_subject
from shared.bus.messages import Datagrams, Message, MessageError, datagrams_topic
from shared.datagrams.batch import DatagramBatch
from shared.settings.uplink import ALL, STREAM
from tests.builders import make_batch, make_envelope

ORIGIN = Origin("berlin", "messages", "ingest.2")


def message(payloads: list[bytes], sequence: int = 0, total: int = 0, stride: int = 0, lent: bool = False) -> Message:
    """A message with datagrams, as it comes from the bus."""
    batch = make_batch(payloads)
    if stride:
        spread = b"".join(each.ljust(stride, b"?") for each in payloads)
        batch = DatagramBatch(batch.stream, batch.received_ns, batch.rows, spread, stride)
    envelope = make_envelope(sender="ingest.2", kind="datagrams", boot=7, sequence=sequence, total=total)
    body = Datagrams("messages", batch.received_ns, 3, 1 if lent else None, stride)
    return Message(datagrams_topic("messages"), envelope, body, batch)


def pack(*messages: Message) -> Pack:
    """The message that these go in."""
    packer = Packer(ORIGIN, 7)
    for each in messages:
        assert each.batch is not None
        packer.add(each, each.batch)
    return packer.close()


PAYLOADS = st.lists(st.binary(max_size=300), min_size=1, max_size=20)


@given(st.lists(st.tuples(PAYLOADS, st.sampled_from([0, 300]), st.booleans()), min_size=1, max_size=5))
def test_batches_arrive_as_they_were_on_the_bus(sent: list[tuple[list[bytes], int, bool]]) -> None:
    """Rows, payloads, times and numbers come out as they went in, whichever way the payload lay in memory."""
    messages, total = [], 0
    for sequence, (payloads, stride, lent) in enumerate(sent):
        messages.append(message(payloads, sequence, total, stride, lent))
        total += len(payloads)
    found = pack(*messages)
    arrived = read_pack(ORIGIN, found.payload)
    assert (found.start, found.last, found.datagrams) == (0, len(sent) - 1, total)
    assert (arrived.boot, arrived.after) == (7, UNKNOWN)
    rows = [row for each in messages if each.batch for row in each.batch.datagrams()]
    assert [row for each in arrived.batches if each.batch for row in each.batch.datagrams()] == rows
    for came in arrived.batches:
        assert came.batch is not None
        assert came.batch.received_ns in range(messages[0].batch.received_ns, messages[-1].batch.received_ns + 1)  # type: ignore[union-attr]


def test_batches_that_came_together_become_one() -> None:
    """Batches join the one before that was received at most 5 ms earlier, up to 1024 rows, if none is missing."""
    for apart, gap, joined in ((0, 0, 1), (JOIN_NS, 0, 1), (JOIN_NS + 1, 0, 2), (-1, 0, 2), (0, 1, 2)):
        first, second = message([b"x"] * 3), message([b"y"], 1, 3 + gap)
        assert second.batch is not None
        second.batch.received_ns += apart
        arrived = read_pack(ORIGIN, pack(first, second).payload)
        assert len(arrived.batches) == joined, (apart, gap)
        totals = [(each.envelope.total, len(each.batch)) for each in arrived.batches if each.batch]
        assert totals == ([(0, 4)] if joined == 1 else [(0, 3), (3 + gap, 1)])
    some = [message([b"x"] * 600, number, 600 * number) for number in range(3)]
    assert len(read_pack(ORIGIN, pack(*some).payload).batches) == 3


def test_each_message_tells_what_was_sent_before_it() -> None:
    """`after` is the worker's count at the end of the message before; the number names what is in it."""
    packer = Packer(ORIGIN, 7)
    for sequence, total in ((4, 100), (9, 300)):
        each = message([b"a", b"b"], sequence, total)
        assert each.batch is not None
        packer.add(each, each.batch)
        found = packer.close()
        assert found.number == f"7/ingest.2/messages/{total}-{total + 2}"
        assert read_pack(ORIGIN, found.payload).after == (UNKNOWN if total == 100 else 102)


WHOLE = pack(message([b"one", b"two"]), message([b"three"], 1, 2)).payload


@given(st.binary(max_size=200) | st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=8)).map(
    lambda edit: WHOLE[: edit[0]] + edit[1] + WHOLE[edit[0] + len(edit[1]) :]
) | st.integers(0, len(WHOLE)).map(lambda end: WHOLE[:end]))  # fmt: skip
def test_whatever_comes_is_read_or_refused(payload: bytes) -> None:
    """Bytes of any kind are a message, or a MessageError: nothing else is raised."""
    try:
        arrived = read_pack(ORIGIN, payload)
    except MessageError:
        return
    assert arrived.batches


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"", "none of fanwire's messages between sites"),
        (b"FWU2" + WHOLE[4:], "a message of another format"),
        (HEAD.pack(MARK, 0, -1), "a head that tells of 0 batches, in 16 bytes"),
        (HEAD.pack(MARK, 1 << 31, -1), "a head that tells of 2147483648 batches"),
        (WHOLE + b"x", "1 bytes too many or too few behind its batches"),
        (HEAD.pack(MARK, 1, -1) + LENGTHS.pack(1, 1, 0, 1 << 31), "malformed"),
    ],
)
def test_bad_messages_are_explained(payload: bytes, told: str) -> None:
    """A message that can't be used says what is wrong with it."""
    with pytest.raises(MessageError) as refused:
        read_pack(ORIGIN, payload)
    assert told in f"{refused.value.cause} {refused.value}"


def test_nobody_sends_under_anothers_name() -> None:
    """Batches of another worker, or stream, than the subject says are refused; so are those of two starts."""
    for other in (ORIGIN._replace(worker="ingest.1"), ORIGIN._replace(stream="flows")):
        with pytest.raises(MessageError):
            read_pack(other, WHOLE)
    with pytest.raises(MessageError, match=r"of ingest\.2 under another name"):
        read_pack(ORIGIN._replace(worker="ingest.1"), WHOLE)
    first, second = message([b"a"]), message([b"b"], 1, 1)
    second = Message(
        second.topic, make_envelope(sender="ingest.2", kind="datagrams", boot=8), second.body, second.batch
    )
    with pytest.raises(MessageError, match="batches of 2 starts of a worker in one message"):
        read_pack(ORIGIN, pack(first, second).payload)


@given(st.from_regex(STREAM, fullmatch=True), st.integers(0, 999_999_999))
def test_subjects_lead_back(stream: str, worker: int) -> None:
    """A subject stands for one origin, and matches the subjects of its stream, whatever letters the stream has."""
    assume(stream != ALL)
    origin = Origin("site-1", stream, f"ingest.{worker}")
    subject = unparse_subject(origin)
    assert parse_subject(subject) == origin
    assert subject.rpartition(".")[0] == stream_subjects("site-1", stream).rpartition(".")[0]


@given(st.text(max_size=40) | st.text("fanwire.-*>%2E1", max_size=40))
def test_other_subjects_stand_for_nothing(subject: str) -> None:
    """A subject of another form is refused."""
    try:
        origin = parse_subject(subject)
    except ValueError:
        return
    assert unparse_subject(origin) == subject

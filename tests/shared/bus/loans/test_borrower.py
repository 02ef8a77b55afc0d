import gc
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.bus.loans.borrower import MAX_UNREADABLE, Borrowed, Borrower
from shared.bus.messages import Datagrams, Envelope, MessageError, inline_topic
from tests.builders import make_envelope
from tests.shared.bus.loans.lending import Lending

STREAM = "messages"


class Reader:
    """A borrower as a subscriber has it: `wanted` are the topics it subscribes to."""

    def __init__(self, directory: Path | None) -> None:
        self.wanted: list[str] = []
        self.borrower = Borrower(directory, self.wanted.append, self.wanted.remove)

    def meet(self, lending: Lending, number: int = 0) -> None:
        """Receive a worker's mark."""
        self.borrower.note_lending(envelope_of(lending), Datagrams(STREAM, 0, number), is_mark=True)

    def hear(self, lending: Lending) -> None:
        """Receive a payload of a worker in a message."""
        self.borrower.note_lending(envelope_of(lending), Datagrams(STREAM, 0, lending.pool.number), is_mark=False)

    def read(self, lending: Lending, loan: tuple[int, int, int] | None) -> bytes | None:
        """Read a loan, and give it back; None when that is refused."""
        assert loan is not None
        number, chunk, size = loan
        try:
            return bytes(self.borrower.borrow(envelope_of(lending), Datagrams(STREAM, 0, number, chunk), size))
        except MessageError:
            return None


def envelope_of(lending: Lending) -> Envelope:
    """Return the envelope of a worker's messages."""
    return make_envelope(sender="ingest.1", boot=lending.boot)


def filled(text: str) -> bytes:
    """A payload that is in no other chunk."""
    return hashlib.sha256(text.encode()).digest() * 100


def lend_all(lending: Lending) -> list[tuple[int, int, int]]:
    """Lend until every chunk is lent."""
    loans: list[tuple[int, int, int]] = []
    while loan := lending.lend(filled(f"{lending.boot} {len(loans)}")):
        loans.append(loan)
    return loans


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test enters into it."""
    with ExitStack() as everything:
        yield everything
    gc.collect()


@pytest.fixture
def reader(tmp_path: Path, opened: ExitStack) -> Reader:
    """A reader in the bus directory."""
    reader = Reader(tmp_path)
    opened.callback(reader.borrower.close)
    return reader


def test_successor_is_not_taken_for_the_worker_that_was(tmp_path: Path, opened: ExitStack, reader: Reader) -> None:
    """Loans of a worker that was replaced before its mark was read are refused, never read in the successor's memory.

    The successor lends to others meanwhile, and to this reader as soon as it has read the successor's own mark.
    """
    before = opened.enter_context(Lending(tmp_path, boot=1))
    witness = Reader(tmp_path)
    opened.callback(witness.borrower.close)
    witness.meet(before)
    before.turn()
    queued = lend_all(before)
    assert [witness.read(before, loan) for loan in queued] == [filled(f"1 {number}") for number in range(3)]
    before.close()
    after = opened.enter_context(Lending(tmp_path, boot=2))
    witness.meet(after)
    after.turn()
    assert witness.read(after, after.lend(filled("2"))) == filled("2")

    reader.meet(before)  # by the path, which leads to the successor
    after.turn()
    assert [reader.read(before, loan) for loan in queued] == [None] * 3
    assert reader.wanted == [inline_topic(STREAM)]
    after.turn()
    assert [witness.read(after, loan) is not None for loan in lend_all(after)] == [True] * 3, (
        "nobody else is waited for"
    )

    reader.meet(after, after.pool.number)
    after.turn()
    reader.hear(after)
    assert reader.wanted == []
    assert [reader.read(after, loan) for loan in lend_all(after)] == [filled(f"2 {number}") for number in range(3)]


def test_predecessors_messages_behind_the_successors_mark_are_not_read(
    tmp_path: Path, opened: ExitStack, reader: Reader
) -> None:
    """A loan under another boot id than that of the worker last met is refused; that worker's own is read."""
    lending = opened.enter_context(Lending(tmp_path, boot=2))
    reader.meet(lending)
    lending.turn()
    other = make_envelope(sender="ingest.1", boot=1)
    loan = lending.lend(b"payload")
    assert loan is not None
    with pytest.raises(MessageError, match="lends a payload") as refused:
        reader.borrower.borrow(other, Datagrams(STREAM, 0, *loan[:2]), loan[2])
    assert refused.value.cause == "not_borrowed"
    assert reader.read(lending, loan) == b"payload"


def test_wrong_answer_ends_the_connection(tmp_path: Path, opened: ExitStack) -> None:
    """A worker that answers with another boot id than was asked for is told at once not to wait."""
    lending = opened.enter_context(Lending(tmp_path, boot=2))
    witness = Borrowed(lending.path, STREAM, 2)
    opened.callback(witness.close)
    mistaken = Borrowed(lending.path, STREAM, 1)
    opened.callback(mistaken.close)
    lending.turn()
    assert (witness.admitted, mistaken.admitted) == (True, False)
    lending.turn()
    for number in range(6):
        loan = lending.lend(b"%d" % number)
        assert loan is not None
        witness.passed(loan[0])


def test_reader_without_a_directory_has_payloads_sent(opened: ExitStack, tmp_path: Path) -> None:
    """A mark is enough, where no memory can be reached, to have payloads sent in messages, once for all workers."""
    reader, lending = Reader(None), opened.enter_context(Lending(tmp_path))
    for _ in range(2):
        reader.meet(lending)
    assert reader.wanted == [inline_topic(STREAM)]
    assert reader.read(lending, (1, 0, 10)) is None
    assert reader.wanted == [inline_topic(STREAM)]


def test_made_up_workers_are_bounded(reader: Reader) -> None:
    """A few of the workers that lend what can't be read are remembered, and payloads are asked for once."""
    for number in range(MAX_UNREADABLE * 2):
        envelope = make_envelope(sender=f"ingest.{number}", boot=1)
        reader.borrower.note_lending(envelope, Datagrams(STREAM, 0), is_mark=True)
    assert len(reader.borrower._unreadable[STREAM]) == MAX_UNREADABLE
    assert reader.wanted == [inline_topic(STREAM)]


def test_stream_that_is_left_holds_nothing_up(tmp_path: Path, opened: ExitStack, reader: Reader) -> None:
    """Of streams beyond the prefixes nothing is borrowed any more, of the others as before."""
    lending = opened.enter_context(Lending(tmp_path))
    reader.meet(lending)
    lending.turn()
    assert reader.read(lending, lending.lend(b"one")) == b"one"
    reader.borrower.keep_streams(["status/", f"datagrams/{STREAM}/"])
    assert reader.read(lending, lending.lend(b"two")) == b"two"
    reader.borrower.keep_streams(["datagrams/traps/"])
    lending.turn()
    assert lending.lend(b"three") is None, "somebody still borrows"

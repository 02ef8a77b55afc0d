import errno
import gc
import hashlib
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from shared.bus.loans.borrower import Borrowed
from shared.bus.loans.lender import (
    ANSWER,
    CHUNK,
    GRACE_SECONDS,
    MAX_BORROWERS,
    MAX_REQUEST,
    PAGE,
    Lender,
    Pool,
    Room,
    pool_path,
)
from shared.process.lifecycle import CANT_CREATE, OperatorError
from tests.shared.bus.loans.lending import Lending, PoolClock
from tests.stack import CHECKOUT, wait_until

STREAM = "messages"
BOOT = 7
View = memoryview | np.ndarray


@pytest.fixture
def lending(tmp_path: Path) -> Iterator[Lending]:
    """A worker that lends three chunks of one stream."""
    with Lending(tmp_path) as worker:
        yield worker
    gc.collect()


def borrow(lending: Lending, opened: ExitStack | None = None, stream: str = STREAM) -> Borrowed:
    """A borrower that the lender has admitted."""
    borrowed = Borrowed(lending.path, stream, lending.boot)
    if opened is not None:
        opened.callback(borrowed.close)
    lending.turn()
    return borrowed


def connect(lending: Lending, opened: ExitStack, request: bytes | None = None) -> socket.socket:
    """A plain connection to a lender, which has asked for something."""
    sock = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    sock.settimeout(60)
    sock.connect(str(lending.path))
    if request is not None:
        sock.send(request)
    return sock


def ask(borrower: Borrowed, number: int, chunk: int, size: int) -> Any:
    """The payload of a loan, to be compared with bytes."""
    return borrower.payload(number, chunk, size)


def chunks_lent(lending: Lending) -> set[int]:
    """Lend as much as can be; return the chunks."""
    found = set()
    while loan := lending.lend(b"x"):
        found.add(loan[1])
    return found


def filled(number: int, size: int) -> bytes:
    """Bytes that follow from a number, and are in no other payload."""
    return (hashlib.sha256(b"%d" % number).digest() * (size // 32 + 1))[:size]


def test_path_is_the_workers_own() -> None:
    """Each worker is asked at a path of its own in the bus directory."""
    assert pool_path(Path("/run/bus"), "ingest.12") == Path("/run/bus/pool.12")


@pytest.mark.parametrize("size", [0, 1, 16_384, CHUNK - 1, CHUNK])
def test_payload_arrives_as_it_was_written(lending: Lending, opened: ExitStack, size: int) -> None:
    """A payload of any size up to a chunk is read as it was written, in every chunk, by every borrower."""
    borrowers = [borrow(lending, opened) for _ in range(3)]
    for _ in range(2):
        loans = [lending.lend(filled(number, size)) for number in range(3)]
        held = []
        for borrower in borrowers:
            for number, loan in enumerate(loans):
                assert loan is not None
                payload = ask(borrower, *loan)
                assert payload == filled(number, size)
                held.append(payload)
        assert {loan[1] for loan in loans if loan} == {0, 1, 2}
        del payload, held


def test_payload_can_only_be_read(lending: Lending, opened: ExitStack) -> None:
    """Neither a view nor an array on a payload can be written to."""
    borrowed = borrow(lending, opened)
    loan = lending.lend(b"payload")
    assert loan is not None
    payload = ask(borrowed, *loan)
    assert payload is not None
    assert payload.readonly
    array = np.frombuffer(payload, np.uint8)
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True


def descriptors_of(lending: Lending, opened: ExitStack) -> tuple[int, int]:
    """The descriptors of memory and page that a borrower is passed."""
    sock = connect(lending, opened, STREAM.encode())
    lending.turn()
    answer, descriptors, _, _ = socket.recv_fds(sock, ANSWER.size, 2)
    assert ANSWER.unpack(answer) == (lending.pool.number, 3 * CHUNK, lending.boot)
    memory, page = descriptors
    opened.callback(os.close, memory)
    opened.callback(os.close, page)
    return memory, page


def test_borrower_can_neither_write_to_nor_resize_the_memory(lending: Lending, opened: ExitStack) -> None:
    """The memory passed to a borrower can't be mapped to write, written, cut or grown; its page can be."""
    memory, page = descriptors_of(lending, opened)
    with pytest.raises(PermissionError):
        mmap.mmap(memory, 3 * CHUNK, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", 0)
    for size in (0, 4 * CHUNK):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)
    assert os.fstat(memory).st_size == 3 * CHUNK
    assert os.fstat(page).st_size == PAGE
    with mmap.mmap(page, PAGE) as mapped:
        mapped[:8] = mapped[:8]


def test_borrower_can_not_get_around_that(lending: Lending, opened: ExitStack) -> None:
    """Opened anew the memory can't be written either, nor can anything be cut from under the worker that reads it."""
    memory, page = descriptors_of(lending, opened)
    anew = os.open(f"/proc/self/fd/{memory}", os.O_RDWR)  # anybody's right: a memfd has mode 0777
    opened.callback(os.close, anew)
    with pytest.raises(PermissionError):
        mmap.mmap(anew, 3 * CHUNK)
    with pytest.raises(PermissionError):
        os.pwrite(anew, b"x", 0)
    for descriptor in (anew, page):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)


def test_descriptors_are_not_inherited(lending: Lending, opened: ExitStack) -> None:
    """No descriptor of the pool stays open in a process that is started."""
    borrow(lending, opened)
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and "fanwire" in str(link.readlink()):
            assert not os.get_inheritable(int(link.name))


def test_nothing_is_lent_without_borrowers(lending: Lending) -> None:
    """Nothing is lent before somebody has borrowed, nor after the last one has gone."""
    assert lending.pool.lend() is None
    first, second = borrow(lending), borrow(lending)
    assert lending.pool.lend() is not None
    for borrower, lent in ((first, True), (second, False)):
        borrower.close()
        lending.turn()
        assert (lending.pool.lend() is not None) == lent


def test_nothing_is_lent_for_a_moment_after_somebody_is_new(
    lending: Lending, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the grace time after `hold_back` nothing is lent, and each one begins it anew."""
    clock = PoolClock(monkeypatch)
    borrow(lending, opened)
    assert lending.pool.lend() is not None
    lending.pool.hold_back()
    assert lending.pool.lend() is None
    clock.now += GRACE_SECONDS / 2
    lending.pool.hold_back()
    clock.now += GRACE_SECONDS * 0.9
    assert lending.pool.lend() is None
    clock.now += GRACE_SECONDS * 0.1 + 1e-6
    assert lending.pool.lend() is not None


def test_loan_that_was_not_published_is_made_again(lending: Lending, opened: ExitStack) -> None:
    """Until a loan is said to be lent its number is not used up, and its chunk is free."""
    borrow(lending, opened)
    first, second = lending.pool.lend(), lending.pool.lend()
    assert first is not None
    assert second is not None
    assert (first.number, first.chunk) == (second.number, second.chunk)
    lending.pool.lent(second)
    third = lending.pool.lend()
    assert third is not None
    assert third.number == second.number + 1
    assert third.chunk != second.chunk


def test_nothing_is_lent_while_everything_is_held(lending: Lending, opened: ExitStack) -> None:
    """With every chunk held by one of two borrowers nothing is lent; what it gives back first is lent first."""
    holds, idle = borrow(lending, opened), borrow(lending, opened)
    held = []
    for number in range(3):
        loan = lending.lend(filled(number, 100))
        assert loan is not None
        held.append((loan[1], ask(holds, *loan)))
        assert ask(idle, *loan) is not None
    assert lending.lend(b"x") is None
    chunk = held.pop(0)[0]
    loan = lending.lend(b"new")
    assert loan is not None
    assert loan[1] == chunk
    assert [payload for _, payload in held] == [filled(number, 100) for number in (1, 2)]


def test_older_loan_keeps_the_newer_ones(lending: Lending, opened: ExitStack) -> None:
    """Nothing is given back that is newer than something held: that is what one number can say."""
    borrowed = borrow(lending, opened)
    loans = [lending.lend(b"%d" % number) for number in range(3)]
    held = [ask(borrowed, *loan) for loan in loans if loan]
    del held[1:]
    assert lending.lend(b"x") is None
    held.clear()
    assert lending.lend(b"x") is not None


@pytest.mark.parametrize(
    ("number", "chunk", "size"),
    [(0, 0, 1), (-1, 0, 1), (1, 3, 1), (1, -1, 1), (1, 1 << 62, 1), (1, 0, CHUNK + 1), (1, 0, -1), (1, 0, 1 << 62)],
)
def test_loan_out_of_bounds_is_none(lending: Lending, opened: ExitStack, number: int, chunk: int, size: int) -> None:
    """A number, chunk or size that no loan can have is None, and the next loan is read all the same."""
    borrowed = borrow(lending, opened)
    assert ask(borrowed, number, chunk, size) is None
    loan = lending.lend(b"payload")
    assert loan is not None
    assert ask(borrowed, *loan) == b"payload"


def test_loan_is_read_once_and_in_order(lending: Lending, opened: ExitStack) -> None:
    """A number that was seen, or one before it, is None: nobody waits for it."""
    borrowed = borrow(lending, opened)
    first, second = lending.lend(b"first"), lending.lend(b"second")
    assert first is not None
    assert second is not None
    assert ask(borrowed, *second) == b"second"
    assert ask(borrowed, *second) is None
    assert ask(borrowed, *first) is None


def test_loan_from_before_the_borrower_is_none(lending: Lending, opened: ExitStack) -> None:
    """A loan made before the worker knew of a borrower, or while it has not answered, is not for it."""
    first = borrow(lending, opened)
    loan = lending.lend(b"before")
    assert loan is not None
    late = Borrowed(lending.path, STREAM, lending.boot)
    opened.callback(late.close)
    assert ask(late, *loan) is None
    assert ask(late, 99, 0, 1) is None
    lending.turn()
    assert ask(late, *loan) is None
    assert ask(first, *loan) == b"before"
    loan = lending.lend(b"after")
    assert loan is not None
    assert ask(late, *loan) == b"after"


def test_number_far_ahead_harms_nobody(lending: Lending, opened: ExitStack) -> None:
    """After a made-up number a borrower reads no real loan, and what is held stays as it is."""
    fooled, other = borrow(lending, opened), borrow(lending, opened)
    loan = lending.lend(filled(0, 1000))
    assert loan is not None
    held = ask(fooled, *loan), ask(other, *loan)
    assert ask(fooled, (1 << 62), loan[1], 10) is not None
    for number in range(1, 30):
        if new := lending.lend(filled(number, 1000)):
            assert ask(fooled, *new) is None
            assert ask(other, *new) == filled(number, 1000)
    assert held == (filled(0, 1000),) * 2


def test_nobody_to_ask_is_an_oserror(tmp_path: Path, lending: Lending) -> None:
    """Without a socket, or with one that nobody listens at any more, asking is an OSError and leaves nothing open."""
    with pytest.raises(FileNotFoundError):
        Borrowed(tmp_path / "pool.2", STREAM, BOOT)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left_over:
        left_over.bind(str(tmp_path / "pool.3"))
    with pytest.raises(ConnectionRefusedError):
        Borrowed(tmp_path / "pool.3", STREAM, BOOT)


def test_lender_takes_the_place_of_a_killed_one(tmp_path: Path) -> None:
    """A path that a killed worker left is bound anew, and is gone after a clean end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left_over:
        left_over.bind(str(tmp_path / "pool.1"))
    with Lending(tmp_path) as lending, ExitStack() as opened:
        borrow(lending, opened)
        assert lending.lend(b"x") is not None
    assert not (tmp_path / "pool.1").exists()
    gc.collect()


def test_path_has_one_lender_at_a_time(lending: Lending, tmp_path: Path, opened: ExitStack) -> None:
    """A worker with a number that is in use is refused, the other goes on; when that has ended the number is free."""
    borrowed = borrow(lending, opened)
    with pytest.raises(OperatorError, match="number 1") as refused:
        Lender(lending.path, 2, {}, lambda *_: None, lambda _: None)
    assert refused.value.exit_code == CANT_CREATE
    loan = lending.lend(b"payload")
    assert loan is not None
    assert ask(borrowed, *loan) == b"payload"
    lending.close()
    with Lending(tmp_path, boot=2) as successor:
        borrow(successor, opened)
        assert successor.lend(b"x") is not None
    gc.collect()


class Holder:
    """A borrower as the script plays it: what is on its way, what it holds, and what it should have given back."""

    def __init__(self, borrowed: Borrowed, admitted: int) -> None:
        self.borrowed = borrowed
        self.coming: deque[tuple[tuple[int, int, int], bytes]] = deque()
        self.held: list[tuple[int, int, View, bytes]] = []
        self.seen = self.given_back = admitted
        self.out: set[int] = set()
        self.closed = False

    def settle(self) -> None:
        """Say up to which number nothing is held, when something was dropped."""
        held = {number for number, *_ in self.held}
        if self.out - held:
            self.given_back = min(held) - 1 if held else self.seen
        self.out = held

    def take(self, kind: int) -> None:
        """Read the next loan, and hold it by one or several views of different kinds."""
        (number, chunk, size), expected = self.coming.popleft()
        payload = self.borrowed.payload(number, chunk, size)
        assert payload is not None
        assert payload == expected
        assert self.borrowed.payload(number, chunk, size) is None, "a loan was read twice"
        self.seen = number
        self.out.add(number)
        views: list[tuple[View, bytes]] = [(payload, expected)]
        middle = size // 2
        if kind & 1:
            views.append((payload[middle:], expected[middle:]))
        if kind & 2:
            views.append((np.frombuffer(payload, np.uint8), expected))
        if kind & 4:
            views.append((np.frombuffer(payload, np.uint8)[middle:][::-1], expected[middle:][::-1]))
        if kind & 8:
            del views[0]
        self.held += [(number, chunk, view, each) for view, each in views]


class Script:
    """A pool with borrowers that come, read, hold, lose, give back and go in any order; the model is in `Holder`."""

    def __init__(self, directory: Path, chunks: int) -> None:
        self.lending = Lending(directory, chunks=chunks)
        self.numbers = [0] * chunks
        self.holders: list[Holder] = []
        self.made = 0

    def lend(self, size: int) -> None:
        """Lend a payload; it must be possible exactly when some chunk is not waited for."""
        self.lending.turn()
        limit = min((holder.given_back for holder in self.holders), default=-1)
        self.made += 1
        payload = filled(self.made, size)
        loan = self.lending.lend(payload)
        assert (loan is not None) == any(number <= limit for number in self.numbers)
        if loan is None:
            return
        assert loan[1] not in {chunk for holder in self.holders for _, chunk, *_ in holder.held}
        self.numbers[loan[1]] = loan[0]
        for holder in self.holders:
            if not holder.closed:
                holder.coming.append((loan, payload))

    def come(self) -> None:
        """Admit one more."""
        self.holders.append(Holder(borrow(self.lending), max(self.numbers)))

    def go(self, holder: Holder) -> None:
        """Close one, which may still hold something."""
        holder.borrowed.close()
        holder.closed = True
        holder.coming.clear()

    def play(self, act: int, which: int, detail: int) -> None:
        """One step."""
        if act <= 3:
            self.lend((1, 64, 4096, 70_000)[detail % 4])
        elif act == 4 and len(self.holders) < 4:
            self.come()
        elif self.holders:
            holder = self.holders[which % len(self.holders)]
            if act in (5, 6, 7) and holder.coming:
                holder.take(detail)
            elif act == 8 and holder.coming:
                holder.coming.popleft()
            elif act in (9, 10) and holder.held:
                del holder.held[detail % len(holder.held)]
            elif act == 11:
                holder.held.clear()
            elif act == 12 and not holder.closed and detail % 4 == 0:
                self.go(holder)
        self.holders = [holder for holder in self.holders if holder.held or not holder.closed]
        self.check()

    def check(self) -> None:
        """Nothing that is held has changed."""
        for holder in self.holders:
            holder.settle()
            for _, _, view, expected in holder.held:
                assert bytes(view) == expected

    def drop_all(self) -> None:
        """Let every borrower read what is on its way, and drop everything."""
        for holder in self.holders:
            while holder.coming:
                holder.take(0)
            holder.held.clear()
            holder.settle()

    def finish(self) -> None:
        """Give everything back, and see that all can be lent again."""
        self.drop_all()
        self.holders = [holder for holder in self.holders if not holder.closed]
        if not self.holders:
            self.come()
        self.lend(1)  # who has lost the last ones learns of them by the next
        self.drop_all()
        if max(self.numbers) == min(holder.seen for holder in self.holders):
            assert chunks_lent(self.lending) == set(range(len(self.numbers)))

    def close(self) -> None:
        """End everything."""
        for holder in self.holders:
            holder.held.clear()
            holder.borrowed.close()
        self.holders.clear()
        self.lending.close()


steps = st.tuples(st.integers(0, 12), st.integers(0, 3), st.integers(0, 15))


@settings(max_examples=75)
@given(st.integers(1, 4), st.lists(steps, max_size=80))
def test_what_is_held_never_changes(chunks: int, acts: list[tuple[int, int, int]]) -> None:
    """Held payloads stay and others can be lent, however borrowers come, read, lose, hold, give back and go."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as many as there are
    with TemporaryDirectory() as directory:
        script = Script(Path(directory), chunks)
        try:
            script.come()
            for act in acts:
                script.play(*act)
            script.finish()
        finally:
            script.close()
    del script
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_borrower_that_lost_every_loan_does_not_end_lending(lending: Lending, opened: ExitStack) -> None:
    """After the bus has lost for a borrower all that is lent, it is lent to again once it hears what has passed."""
    borrowed = borrow(lending, opened)
    loan = lending.lend(b"one")
    assert loan is not None
    assert ask(borrowed, *loan) is not None
    while lending.lend(b"lost on the bus"):
        pass
    borrowed.passed(lending.pool.number)
    assert chunks_lent(lending) == {0, 1, 2}


def test_what_has_passed_gives_back_nothing_that_is_held(lending: Lending, opened: ExitStack) -> None:
    """Further loans change nothing of held ones; no older number is accepted, no lost loan read."""
    borrowed = borrow(lending, opened)
    held, lost = lending.lend(filled(1, 1000)), lending.lend(b"lost on the bus")
    assert held is not None
    assert lost is not None
    payload = ask(borrowed, *held)
    borrowed.passed(lost[0])
    borrowed.passed(held[0])
    assert ask(borrowed, *lost) is None
    assert len(chunks_lent(lending)) == 1
    assert payload == filled(1, 1000)
    del payload
    borrowed.passed(lending.pool.number)
    assert chunks_lent(lending) == {0, 1, 2}


def test_cycle_is_given_back_by_the_collector(lending: Lending, opened: ExitStack) -> None:
    """A payload in a cycle of references is held until the garbage collector has found it, and then given back."""
    borrowed = borrow(lending, opened)
    gc.disable()
    try:
        for _ in range(3):
            loan = lending.lend(b"cycle")
            assert loan is not None
            cycle: list[object] = [ask(borrowed, *loan)]
            cycle.append(cycle)
        del cycle
        assert lending.lend(b"x") is None
    finally:
        gc.enable()
    gc.collect()
    assert lending.lend(b"x") is not None


def test_payloads_may_be_dropped_by_any_thread(
    lending: Lending, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that drop payloads while others are read change nothing that is held, and leave no chunk behind."""
    borrowed = borrow(lending, opened)
    waiting: deque[tuple[memoryview, bytes]] = deque()
    wrong: list[bytes] = []
    ignored: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: ignored.append(repr(each.exc_value)))
    ending = threading.Event()

    def drop() -> None:
        while not ending.is_set() or waiting:
            try:
                payload, expected = waiting.popleft()
            except IndexError:
                continue
            if payload != expected:
                wrong.append(expected)
            del payload

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=drop) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for number in range(5000):
            if loan := lending.lend(filled(number, 256)):
                payload = ask(borrowed, *loan)
                assert payload is not None
                waiting.append((payload, filled(number, 256)))
                del payload
    finally:
        ending.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert (wrong, ignored) == ([], [])
    assert chunks_lent(lending) == {0, 1, 2}


def test_closing_keeps_what_is_held(lending: Lending, opened: ExitStack) -> None:
    """A borrower closed while it holds payloads keeps them as they are, and is waited for until it drops them."""
    other, closed = borrow(lending, opened), borrow(lending)
    held = []
    for number in range(3):
        loan = lending.lend(filled(number, CHUNK))
        assert loan is not None
        held.append(ask(closed, *loan))
        assert ask(other, *loan) is not None
    closed.close()
    del closed
    gc.collect()
    lending.turn()
    assert lending.lend(b"x") is None
    for number, payload in enumerate(held):
        assert payload == filled(number, CHUNK)
    held.clear()
    del payload
    lending.turn()
    assert chunks_lent(lending) == {0, 1, 2}


def test_worker_that_ends_leaves_what_is_held(tmp_path: Path) -> None:
    """After a worker has ended its borrowers still read what they hold, and drop it without harm."""
    with Lending(tmp_path) as lending:
        borrowed = borrow(lending)
        loan = lending.lend(filled(7, CHUNK))
        assert loan is not None
        payload = ask(borrowed, *loan)
    del lending
    gc.collect()
    assert payload == filled(7, CHUNK)
    assert ask(borrowed, 2, 0, 1) is not None  # nobody will write there
    del payload
    borrowed.close()


@pytest.mark.parametrize("request_", [b"", b"nosuch", b"\xff\xfe", b"\0", b"m" * MAX_REQUEST, b"m" * 60_000, None])
def test_bad_request_costs_who_made_it(lending: Lending, opened: ExitStack, request_: bytes | None) -> None:
    """A borrower that asks for nothing known, or goes at once, is sent away, and others are served."""
    sock = connect(lending, opened, request_)
    if request_ is None:
        sock.close()
    lending.turn()
    if request_ is not None:
        assert sock.recv(100) == b""
    borrowed = borrow(lending, opened)
    loan = lending.lend(b"x")
    assert loan is not None
    assert ask(borrowed, *loan) == b"x"


def test_answer_that_can_not_be_had_is_no_payload(tmp_path: Path, opened: ExitStack) -> None:
    """A lender that sends garbage, no descriptors, or goes without an answer, lends nothing, now or later."""
    listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.bind(str(tmp_path / "pool.1"))
    listener.listen()
    answers = [None, b"", b"x", ANSWER.pack(0, CHUNK, BOOT), ANSWER.pack(0, CHUNK, BOOT) + b"x"]
    for answer in answers:
        for passed in ([], [0], [0, 0], [0, 0, 0]):
            borrowed = Borrowed(tmp_path / "pool.1", STREAM, BOOT)
            accepted, _ = listener.accept()
            with accepted:
                if answer is not None:
                    socket.send_fds(accepted, [answer], passed)
            for number in range(1, 4):
                assert ask(borrowed, number, 0, 1) is None
            borrowed.close()


def test_page_that_can_not_be_mapped_is_no_payload(tmp_path: Path, opened: ExitStack) -> None:
    """Memory without a page to give it back by is not read."""
    listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.bind(str(tmp_path / "pool.1"))
    listener.listen()
    borrowed = Borrowed(tmp_path / "pool.1", STREAM, BOOT)
    opened.callback(borrowed.close)
    accepted = opened.enter_context(listener.accept()[0])
    memory = os.memfd_create("memory")
    try:
        os.ftruncate(memory, CHUNK)
        with (tmp_path / "page").open("wb") as page:
            socket.send_fds(accepted, [ANSWER.pack(0, CHUNK, BOOT)], [memory, page.fileno()])
    finally:
        os.close(memory)
    assert ask(borrowed, 1, 0, 1) is None
    assert ask(borrowed, 2, 0, 1) is None


def test_more_borrowers_than_allowed_do_without(lending: Lending, opened: ExitStack) -> None:
    """Beyond the most borrowers one is sent away; when one of them has gone there is room again."""
    others: list[socket.socket] = []
    for _ in range(MAX_BORROWERS - 1):
        others.append(connect(lending, opened))
        lending.turn()
    last = borrow(lending, opened)
    refused = borrow(lending, opened)
    loan = lending.lend(b"x")
    assert loan is not None
    assert ask(last, *loan) == b"x"
    assert ask(refused, *loan) is None
    others.pop().close()
    lending.turn()
    admitted = borrow(lending, opened)
    loan = lending.lend(b"y")
    assert loan is not None
    assert (ask(last, *loan), ask(refused, *loan), ask(admitted, *loan)) == (b"y", None, b"y")


def test_streams_have_memory_of_their_own(tmp_path: Path, opened: ExitStack) -> None:
    """A borrower of one stream holds up none of the others."""
    with Lending(tmp_path, "messages", "traps", chunks=1) as lending:
        ours, theirs = borrow(lending, opened), borrow(lending, opened, "traps")
        loans = [pool.lend() for pool in lending.pools.values()]
        for text, pool, loan in zip((b"ours", b"them"), lending.pools.values(), loans, strict=True):
            assert loan is not None
            loan.memory[:4] = text
            pool.lent(loan)
        assert ask(ours, 1, 0, 4) == b"ours"
        held = ask(theirs, 1, 0, 4)
        assert held == b"them"
        assert [pool.lend() is not None for pool in lending.pools.values()] == [True, False]
        del loan, loans, held
    gc.collect()


BORROWER = """
import hashlib, sys
from pathlib import Path
from shared.bus.loans.borrower import Borrowed

borrowed, held = Borrowed(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])), []
print("asked", flush=True)
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "hold":
        held.append(borrowed.payload(*map(int, numbers)))
    elif word == "drop":
        held.clear()
    print(*(payload and hashlib.sha256(payload).hexdigest() for payload in held), flush=True)
"""


class Process:
    """A borrower in a process of its own."""

    def __init__(self, lending: Lending, opened: ExitStack) -> None:
        self.popen = opened.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", BORROWER, str(lending.path), STREAM, str(lending.boot)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=CHECKOUT,
                text=True,
            )
        )
        opened.callback(self.popen.kill)
        assert self.popen.stdout
        assert self.popen.stdout.readline() == "asked\n"
        lending.turn()

    def tell(self, line: str) -> list[str]:
        """Order it to do something; return the digests of what it holds then."""
        assert self.popen.stdin
        assert self.popen.stdout
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()
        return self.popen.stdout.readline().split()


def hold_everything(lending: Lending, process: Process, other: Borrowed) -> list[str]:
    """Let a process hold all chunks; return their digests."""
    digests: list[str] = []
    while loan := lending.lend(filled(len(digests), CHUNK)):
        digests.append(hashlib.sha256(filled(len(digests), CHUNK)).hexdigest())
        assert process.tell("hold {} {} {}".format(*loan)) == digests
        assert ask(other, *loan) is not None
    assert len(digests) == 3
    return digests


def test_killed_borrower_is_forgotten(lending: Lending, opened: ExitStack) -> None:
    """A process killed with SIGKILL while it holds everything is waited for no longer, and all can be lent."""
    other, process = borrow(lending, opened), Process(lending, opened)
    hold_everything(lending, process, other)
    process.popen.send_signal(signal.SIGKILL)
    process.popen.wait()
    lending.turn()
    assert chunks_lent(lending) == {0, 1, 2}


def test_stopped_borrower_keeps_what_it_holds(lending: Lending, opened: ExitStack) -> None:
    """A process stopped with SIGSTOP finds what it holds unchanged afterwards, however much is asked of the pool."""
    other, process = borrow(lending, opened), Process(lending, opened)
    digests = hold_everything(lending, process, other)
    process.popen.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.popen.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it stands still")
    for number in range(1000):
        lending.turn()
        assert lending.lend(filled(number, 1000)) is None
    process.popen.send_signal(signal.SIGCONT)
    assert process.tell("look") == digests
    assert process.tell("drop") == []
    assert chunks_lent(lending) == {0, 1, 2}


def test_pools_share_the_room_there_is(tmp_path: Path) -> None:
    """Several streams lend no more memory together than there is room for; what one has used it keeps."""
    room = Room(3 * CHUNK)
    pools = [Pool(name, 2 * CHUNK, room) for name in ("a", "b")]
    borrowers = []
    try:
        for pool in pools:
            borrower, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            borrowers += [borrower, ours]
            pool.admit(ours, BOOT)

        def lend(pool: Pool) -> bool:
            loan = pool.lend()
            if loan:
                pool.lent(loan)
            return loan is not None

        assert [lend(pools[0]), lend(pools[0]), lend(pools[0])] == [True, True, False]
        assert [lend(pools[1]), lend(pools[1])] == [True, False], "the second has one chunk left, not two"
        for pool in pools:
            pool.dismiss(borrowers[2 * pools.index(pool) + 1])
            pool.admit(borrowers[2 * pools.index(pool) + 1], BOOT)  # has given back all that was lent before
        assert [lend(pools[0]), lend(pools[0]), lend(pools[1]), lend(pools[1])] == [True, True, True, False]
    finally:
        for pool in pools:
            pool.close()
        for sock in borrowers:
            for descriptor in socket.recv_fds(sock, 64, 4)[1] if sock in borrowers[::2] else ():
                os.close(descriptor)
            sock.close()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
def test_accepting_that_fails_rests_until_it_is_tried_again(
    lending: Lending, opened: ExitStack, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A borrower that waits where accept(2) fails wakes the worker once, and is let in later."""
    accept, calls = socket.socket.accept, []

    def refuse(_sock: socket.socket) -> None:
        calls.append(error)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(socket.socket, "accept", refuse)
    borrowed = Borrowed(lending.path, STREAM, lending.boot)
    opened.callback(borrowed.close)
    for _ in range(3):
        lending.turn()
    assert calls == [error]
    lending.lender.renew()
    lending.turn()
    assert calls == [error, error]
    monkeypatch.setattr(socket.socket, "accept", accept)
    lending.lender.renew()
    lending.turn()
    assert borrowed.admitted


def test_a_lender_that_rests_can_be_closed(lending: Lending, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ends while accepting has failed, ends like any."""

    def refuse(_sock: socket.socket) -> None:
        raise OSError(errno.EMFILE, "no descriptors")

    monkeypatch.setattr(socket.socket, "accept", refuse)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(lending.path))
        lending.turn()
    lending.close()
    assert not lending.path.exists()


@pytest.mark.parametrize("removed", [("pool.1",), ("pool.1.lock",), ("pool.1", "pool.1.lock")], ids=" ".join)
def test_what_others_remove_is_made_anew(
    lending: Lending, opened: ExitStack, tmp_path: Path, removed: tuple[str, ...]
) -> None:
    """New borrowers are let in again, the former ones keep what they have, and the number stays in use."""
    first = borrow(lending, opened)
    for name in removed:
        (tmp_path / name).unlink()
    assert lending.lender.renew()
    assert not lending.lender.renew()
    second = borrow(lending, opened)
    loan = lending.lend(b"payload")
    assert loan is not None
    assert [ask(each, *loan) for each in (first, second)] == [b"payload"] * 2
    with pytest.raises(OperatorError, match="number 1"):
        Lender(lending.path, 2, {}, lambda *_: None, lambda _: None)


def test_a_number_taken_by_another_worker_is_left_to_it(lending: Lending, opened: ExitStack, tmp_path: Path) -> None:
    """A worker whose lock was removed and taken by another leaves the path to that one, also when it ends."""
    borrowed = borrow(lending, opened)
    (tmp_path / "pool.1.lock").unlink()
    with Lending(tmp_path, boot=2) as other:
        with capture_logs() as logs:
            assert not lending.lender.renew()
        assert logs[0]["event"] == "payloads can't be lent to new subscribers, and go through the bus"
        assert "number 1" in logs[0]["cause"]
        loan = lending.lend(b"payload")
        assert loan is not None
        assert ask(borrowed, *loan) == b"payload"
        lending.close()
        assert borrow(other, opened).admitted
    gc.collect()


def test_a_directory_that_is_gone_is_waited_for(lending: Lending, opened: ExitStack, tmp_path: Path) -> None:
    """A worker whose whole bus directory was removed goes on, and lends again once the directory is back."""
    shutil.rmtree(lending.path.parent)
    assert not lending.lender.renew()
    lending.path.parent.mkdir()
    assert lending.lender.renew()
    assert borrow(lending, opened).admitted

"""From a datagram socket to batches: one receive call, its columns, cut where a bus message would grow too long."""

import contextlib
import socket
import time
from collections import Counter
from typing import Final

import numpy as np
import numpy.typing as npt

from services.ingest.batch_publisher import StreamFeed
from services.ingest.packet_marks import MarkReader
from services.ingest.replies import Replier
from services.ingest.reuseport_sharing import leave_to_others
from services.ingest.trains import split_trains
from shared.bus.loans.lender import CHUNK, LENT_SIZE, Loan
from shared.datagrams.batch import DatagramBatch, Generations, Rows
from shared.datagrams.limits import MAX_DATAGRAM, MAX_PAYLOAD, MAX_ROWS
from shared.datagrams.mmsg import UDP_GRO, ReceiveArena
from shared.ledger.counters import BYTES, KERNEL_DROPPED, MARKS_READ, RECEIVE_ERRNO, RECEIVE_ERRORS, RECEIVED, TRUNCATED
from shared.log import get_logger
from shared.net.addresses import LOCAL_SENDER
from shared.net.bpf import refuse_input
from shared.net.sockets import InheritedSocket, close_listener, kernel_drops

FEW_ROWS: Final = 64
"""Datagrams; handled one by one they cost less than as columns."""
MAX_TRAINS: Final = 64
"""Pieces received at once where each may be a train: more would not stay in the cache until they are copied."""
SMALLEST_STRIDE: Final = 256
"""Bytes, for datagrams of different lengths: a power of two not below the longest."""
MAX_FAILURES: Final = 100
"""Receive calls that may fail in a row before each further one waits."""
BACK_OFF_SECONDS: Final = 0.01
Lengths = npt.NDArray[np.uint32]

log = get_logger()


class DatagramReceiver:
    """Receives from one UDP or AF_UNIX datagram socket; `account` is the listener's own.

    With `trains` the kernel may hand over many datagrams of one exporter as one piece (UDP_GRO, udp(7)). `marks` reads
    which of them it has copied already.
    """

    def __init__(
        self,
        sock: socket.socket,
        feed: StreamFeed,
        account: Counter[str],
        arena: ReceiveArena,
        reply: bytes | None,
        *,
        trains: bool = False,
        marks: MarkReader | None = None,
    ) -> None:
        self._socket = sock
        self._feed = feed
        self._account = account
        self._failures = 0
        """Calls in a row that failed."""
        self._arena = arena
        self._family = sock.family
        self.inherited = isinstance(sock, InheritedSocket)
        self._kernel_dropped = 0
        if self.inherited:  # drops that our predecessors counted are not ours
            with contextlib.suppress(OSError):
                self._kernel_dropped = kernel_drops(sock)
        self._stride = 0
        """Distance of the next datagrams in lent memory; 0: there may be too little to lend."""
        self._marks = marks if marks and marks.begin(sock) else None
        self.assign_stream(feed, account, reply, trains=trains)

    def assign_stream(
        self, feed: StreamFeed, account: Counter[str], reply: bytes | None, *, trains: bool = False
    ) -> None:
        """Count and publish for this stream from the next datagram on, send this reply, and take trains if it wants."""
        if self._feed is not feed:
            self.count_kernel_drops()  # up to now they belong to the other stream
            self._feed, self._account = feed, account
        self._numbered = feed.exporters if self._family != socket.AF_UNIX else None
        self._account[TRUNCATED] += 0
        self._trains = MAX_ROWS if takes_trains(self._socket, wanted=trains and not reply) else 0
        """Pieces that the next call may bring where each may be a train; 0: none is."""
        self._replier = Replier(self._socket, reply, feed.account) if reply and self._family != socket.AF_UNIX else None
        self._plain = self._numbered is None and self._replier is None and self._family != socket.AF_UNIX

    @property
    def reads_marks(self) -> bool | None:
        """Return whether it can tell what the kernel has copied; None: it is no UDP socket."""
        return None if self._family == socket.AF_UNIX else self._marks is not None

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def receive(self) -> tuple[int, int]:
        """Put datagrams that have come, at most `MAX_ROWS`, on the bus; return their number and bytes."""
        arena = self._arena
        loan = self._feed.lend(LENT_SIZE) if self._stride else None
        try:
            count = arena.receive(
                self._socket.fileno(),
                loan.memory if loan else None,
                self._stride,
                trains=self._trains,
                marks=self._marks is not None,
            )
        except (
            OSError
        ) as error:  # an ICMP error to a reply of ours, or the kernel short of memory: the next call goes on
            self._fail(error)
            return 0, 0
        if self._failures:
            self._failures = self._account[RECEIVE_ERRNO] = 0
        if count == 0:
            return 0, 0
        copied = self._marks.generations(arena, count) if self._marks else None
        if copied is not None:
            self._feed.account[MARKS_READ] += int(np.count_nonzero(copied))
        if self._trains and (segments := arena.segments(count)).any():
            return self._take_trains(count, segments, loan, copied)
        if count <= FEW_ROWS and self._plain and loan is None:
            few = arena.lengths_of_few(count)
            if sum(few) < LENT_SIZE:
                return self._take_few(few, copied)
        received_ns = time.time_ns()
        lengths = arena.lengths(count)
        size, longest = int(np.add.reduce(lengths)), int(np.maximum.reduce(lengths))
        wanted, wanted_size = self._refuse_oversized(lengths) if longest > MAX_DATAGRAM else (count, size)
        self._account[RECEIVED] += count
        self._account[BYTES] += wanted_size
        self._account[TRUNCATED] += arena.truncated(count)
        is_wanted = bool(wanted) and self._feed.receive(wanted, wanted_size)
        rows = arena.rows(count, self._family) if is_wanted or self._numbered else None
        if rows is not None and self._numbered:
            payload, stride = arena.located(count)
            self._feed.observe(DatagramBatch(self._feed.stream, received_ns, rows, payload, stride))
        if rows is not None and is_wanted:
            if self._family == socket.AF_UNIX:
                rows["address"] = np.frombuffer(LOCAL_SENDER, np.uint8)
            if loan and size >= LENT_SIZE and longest <= self._stride:
                self._feed.publish(received_ns, rows, loan.memory[: count * self._stride], loan, self._stride, copied)
            else:
                self._publish_fitting(received_ns, rows, lengths, arena.payload(0, count), copied)
        if self._replier:
            self._replier.reply(arena, count)
        arena.restore(count)
        self._stride = stride_for(longest, equal=size == longest * count) if size >= LENT_SIZE else 0
        if self._trains:
            self._stride, self._trains = 0, MAX_ROWS
        return count, size

    def _take_trains(
        self, count: int, segments: Lengths, loan: Loan | None, copied: Generations | None
    ) -> tuple[int, int]:
        """Take datagrams of which some came together; they stand end to end as they came."""
        received_ns, arena = time.time_ns(), self._arena
        counts, lengths = split_trains(arena.lengths(count), segments)
        datagrams, size = len(lengths), int(lengths.sum())
        rows = np.repeat(arena.rows(count, self._family), counts)
        rows["length"] = lengths
        copied = None if copied is None else np.repeat(copied, counts)
        wanted, wanted_size = self._refuse_oversized(lengths)
        self._account[RECEIVED] += datagrams
        self._account[BYTES] += wanted_size
        is_wanted = bool(wanted) and self._feed.receive(wanted, wanted_size)
        # Equal trains that fill their places stand end to end in lent memory; the next ones are received like these.
        piece, per_piece = int(arena.lengths(count)[0]), int(counts[0])
        alike = bool((arena.lengths(count) == piece).all() and (counts == per_piece).all())
        if loan and alike and piece == self._stride and size >= LENT_SIZE and datagrams <= MAX_ROWS:
            payload: bytes | memoryview = loan.memory[:size]
        else:
            payload, loan = arena.payload(0, count), None
        batch = DatagramBatch(self._feed.stream, received_ns, rows, payload, generations=copied)
        if self._numbered:
            self._feed.observe(batch)
        if is_wanted and loan:
            self._feed.publish(received_ns, rows, payload, loan, copied=copied)
        elif is_wanted:
            self._publish_fitting(received_ns, rows, lengths, payload, copied)
        if self._replier:  # since a reload: a stream with a reply takes no trains from the start
            self._replier.refuse(datagrams)
        arena.restore(count)
        self._stride, self._trains = (piece, MAX_ROWS // per_piece) if alike else (0, MAX_TRAINS)
        return datagrams, size

    def _refuse_oversized(self, lengths: npt.NDArray[np.integer]) -> tuple[int, int]:
        """Count datagrams that are too long; return the number of the others, and their bytes."""
        fits = lengths <= MAX_DATAGRAM
        wanted = int(np.count_nonzero(fits))
        if wanted < len(lengths):
            self._feed.refuse_oversized(len(lengths) - wanted)
        return wanted, int(lengths[fits].sum())

    def _publish_fitting(
        self,
        received_ns: int,
        rows: Rows,
        lengths: npt.NDArray[np.integer],
        payload: bytes | memoryview,
        copied: Generations | None,
    ) -> None:
        """Put datagrams that stand end to end on the bus, in as many messages as needed, without those too long.

        What may be lent is lent. `lengths` are true where those of `rows` are not, which hold 16 bits.
        """
        fits = lengths <= MAX_DATAGRAM
        if not fits.all():
            ends = np.cumsum(lengths, dtype=np.int64)
            places = zip((ends - lengths)[fits].tolist(), ends[fits].tolist(), strict=True)
            view = memoryview(payload)
            payload, rows = b"".join([view[start:end] for start, end in places]), rows[fits]
            copied = None if copied is None else copied[fits]
        batch = DatagramBatch(self._feed.stream, received_ns, rows, payload, generations=copied)
        for part in batch.parts(CHUNK):
            loan = self._feed.lend(len(part.payload))
            if loan:
                lent = loan.memory[: len(part.payload)]
                lent[:] = part.payload
                self._feed.publish(part.received_ns, part.rows, lent, loan, copied=part.generations)
            else:
                for each in part.parts(MAX_PAYLOAD):
                    self._feed.publish(each.received_ns, each.rows, each.payload, copied=each.generations)

    def _take_few(self, lengths: list[int], copied: Generations | None) -> tuple[int, int]:
        """Take what has come without arrays, which cost more than a few datagrams do."""
        count, size = len(lengths), sum(lengths)
        received_ns = time.time_ns()
        account, arena = self._account, self._arena
        account[RECEIVED] += count
        account[BYTES] += size
        if self._feed.receive(count, size):
            rows, payload = arena.rows_of_few(lengths, self._family), arena.payload_of_few(lengths)
            self._feed.publish_few(received_ns, count, rows, payload, copied)
        arena.restore(count)
        self._stride = 0
        return count, size

    def _fail(self, error: OSError) -> None:
        """Count a failed call; where none succeeds any more the loop must not spin."""
        self._feed.account[RECEIVE_ERRORS] += 1
        self._account[RECEIVE_ERRORS] += 1
        self._account[RECEIVE_ERRNO] = error.errno or 0
        self._failures += 1
        if self._account[RECEIVE_ERRORS] > 1:
            log.error(
                "can't receive at a listener; see `fanwire doctor`",
                stream=self._feed.stream,
                error=error.strerror,
                cause=error.errno,
            )
        if self._failures >= MAX_FAILURES:
            time.sleep(BACK_OFF_SECONDS)

    def count_kernel_drops(self) -> None:
        """Count the datagrams that the kernel dropped since the last call because the receive buffer was full."""
        try:
            drops = kernel_drops(self._socket)
        except OSError as error:
            if self._kernel_dropped >= 0:
                self._kernel_dropped = -1
                log.warning(
                    "the kernel does not report its drops (SO_MEMINFO): kernel_dropped stays as it is",
                    error=error.strerror,
                )
            return
        fresh, self._kernel_dropped = (drops - self._kernel_dropped) % (1 << 32), drops
        self._feed.account[KERNEL_DROPPED] += fresh
        self._account[KERNEL_DROPPED] += fresh

    def refuse_input(self) -> None:
        """Take no new datagrams: they go to another worker; without one the kernel drops, and counts, them."""
        if not leave_to_others(self._socket):
            refuse_input(self._socket)

    def finish(self) -> None:
        """Count drops last, then close: later drops would not be counted."""
        self.count_kernel_drops()
        self.close()

    def close(self) -> None:
        """Close the socket, and remove the path of an AF_UNIX one unless it was inherited."""
        close_listener(self._socket)


def takes_trains(sock: socket.socket, *, wanted: bool) -> bool:
    """Return whether a socket takes trains: what it was once told stays, for there may be some in its queue."""
    if sock.family == socket.AF_UNIX or isinstance(sock, InheritedSocket):
        return False  # who passed it may have asked for control messages that take the room
    try:
        if wanted:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        return bool(sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO))
    except OSError:  # before Linux 5.0
        return False


def stride_for(longest: int, *, equal: bool) -> int:
    """Return the distance for datagrams like the last ones: at most `longest` bytes, or all `equal`.

    Equal ones stand end to end, so that they can leave as one piece.
    """
    return min(MAX_DATAGRAM, longest if equal else max(SMALLEST_STRIDE, 1 << (longest - 1).bit_length()))

"""The bus: the only place that makes ZeroMQ sockets.

Everything connects to the broker: a `Publisher` (XPUB) to the broker's XSUB, a `Subscriber` (SUB) to its XPUB, over
`ipc://` in one directory that only its owner may enter, or over `tcp://` (see `shared.bus.endpoint`). A message lost on
the way shows as a gap in the sender's sequence: every message carries boot id, sequence and running datagram count
(see `shared.bus.continuity`).
"""

import errno
import itertools
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Final

import zmq

from shared.bus.bodies.fields import REPLAY_PREFIX, REPLY_PREFIX
from shared.bus.endpoint import DIRECT, PLACE, BusLink
from shared.bus.messages import (
    FILLER,
    MAX_MESSAGE,
    MAX_TOPIC,
    Body,
    Datagrams,
    Message,
    MessageError,
    Part,
    borrow_nothing,
    decode,
    encode,
)
from shared.bus.publishing.subscriptions import Subscriptions
from shared.log import get_logger
from shared.process.lifecycle import CANT_CREATE, OperatorError

if TYPE_CHECKING:
    from shared.bus.loans.borrower import Borrower
    from shared.datagrams.batch import DatagramBatch

HELLO_TOPIC: Final = "broker/"
"""The broker subscribes to it itself, so a publisher that has seen this subscription is connected to a broker."""
LINGER_MS: Final = 1000
"""Time that unsent messages may hold up an exit: a drain must end within 4 s, and ZeroMQ's default has no limit."""
TERM_SECONDS: Final = 2.0
"""Time after which an exit waits no longer for libzmq: getaddrinfo(3) may take a minute, in libzmq's own thread."""
HANDED_ON: Final = Path("/proc/self/fd")
"""Directory of descriptors: a process that may open the bus directory hands it on this way to one that may not."""
MAX_SUBSCRIPTION: Final = 2 * MAX_TOPIC
"""Bytes that an XPUB takes in one piece: a subscription to the longest topic, or a part of the handshake. libzmq keeps
each byte of a subscription in a node of its own: one of 1 MB would take over 100 MB of the broker."""
SUBSCRIPTIONS_MAX: Final = 4096
"""Bounds the memory that a hostile subscriber can take of a publisher."""

EVENTS: Final = int(zmq.EVENTS)
POLLIN: Final = int(zmq.POLLIN)
NOBLOCK: Final = int(zmq.NOBLOCK)
MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
"""Numbers, for what is done with every message: `|` and `&` of enums take longer than the call that they are for."""

log = get_logger()


def broker_is_up(directory: Path, link: BusLink = DIRECT) -> bool:
    """Return whether something accepts connections where subscribers connect."""
    return link.is_up(directory)


class _Context(zmq.Context[zmq.Socket[bytes]]):
    def term(self) -> None:
        """Wait until sockets have lingered; not for the resolver, which libzmq's thread asks for `[bus] connect`."""
        ending = Thread(target=super().term, name="bus end", daemon=True)
        ending.start()
        ending.join(TERM_SECONDS)


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A ZeroMQ context with one I/O thread; never shared across fork."""
    return _Context(io_threads=1)


def configure(sock: zmq.Socket[bytes], high_water_mark: int) -> zmq.Socket[bytes]:
    """Set the options that every socket of the bus has, the broker's included; return the socket."""
    sock.set(zmq.LINGER, LINGER_MS)
    sock.set(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION if sock.type == zmq.XPUB else MAX_MESSAGE)
    # The mark is for messages. Subscriptions go the other way and must not be lost: nobody repeats them.
    messages, subscriptions = (zmq.SNDHWM, zmq.RCVHWM) if sock.type == zmq.XPUB else (zmq.RCVHWM, zmq.SNDHWM)
    sock.set(messages, high_water_mark)
    sock.set(subscriptions, SUBSCRIPTIONS_MAX)
    sock.set(zmq.RECONNECT_IVL, 50)
    sock.set(zmq.RECONNECT_IVL_MAX, 500)
    return sock


@dataclass(slots=True)
class _Numbering:
    sequence: int = 0
    total: int = 0


class Publisher:
    """Publishes a service's messages, and sees which topics have subscribers."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        directory: Path,
        sender: str,
        high_water_mark: int,
        link: BusLink = DIRECT,
    ) -> None:
        self.sender = sender
        self.boot = secrets.randbits(62)
        self._numbering: dict[str, _Numbering] = {}
        self._subscriptions = Subscriptions(HELLO_TOPIC, SUBSCRIPTIONS_MAX)
        check_directory(directory)
        self._socket = configure(context.socket(zmq.XPUB), high_water_mark)
        # Verbose: it sees every late subscriber, not only the first, so that each gets the last value. No drop: at the
        # mark a send is refused and counted; the default loses it in silence.
        self._socket.set(zmq.XPUB_VERBOSE, 1)
        self._socket.set(zmq.XPUB_NODROP, 1)
        self._send = super(zmq.Socket, self._socket).send
        """Without pyzmq's options of other socket types, which take longer than the call."""
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        link.connect(self._socket, directory, "publish")

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """The socket for a `zmq.Poller`; it becomes ready when subscriptions have come."""
        return self._socket

    def fileno(self) -> int:
        """Return a descriptor, for other selectors, that becomes readable when subscriptions may have come.

        It is edge-triggered, and `publish` may swallow the edge: call `new_subscriptions` after publishing too.
        """
        return int(self._socket.get(zmq.FD))

    @property
    def ready(self) -> bool:
        """Return whether a broker has been observed, and not been lost by the last call of `new_subscriptions`."""
        return self._subscriptions.connected

    def new_subscriptions(self) -> list[str]:
        """Read what subscribers sent since the last call; return the prefixes newly subscribed to, each once.

        Called at least once a second, it notices a broker that is gone.
        """
        if not (self.readable() or self._subscriptions.due):
            return []
        self._subscriptions.check(disconnected=self._was_disconnected())
        fresh: dict[str, None] = {}
        while self.readable():
            prefix = self._subscriptions.note(self._socket.recv(zmq.NOBLOCK))
            if prefix is not None:
                fresh[prefix] = None
        return list(fresh)

    def _was_disconnected(self) -> bool:
        found = False
        while int(self._monitor.get(EVENTS)) & POLLIN:
            self._monitor.recv_multipart(zmq.NOBLOCK)
            found = True
        return found

    def readable(self) -> bool:
        """Return whether subscribers have sent something since `new_subscriptions`."""
        return bool(int(self._socket.get(EVENTS)) & POLLIN)

    def wanted(self, topic: str) -> bool:
        """Return whether anyone subscribes to `topic`: a message that nobody wants need not be encoded."""
        return self._subscriptions.wanted(topic)

    def publish(
        self,
        topic: str,
        body: Body,
        batch: "DatagramBatch | None" = None,
        arrays: Sequence[Part] = (),
        count: int = 0,
    ) -> bool:
        """Put a message on the bus. Return False, with nothing sent, when its queue is at the high-water mark.

        Instead of a batch there may be its arrays as they are sent, and how many rows they have.
        """
        numbering = self._numbering.get(topic)
        if numbering is None:
            numbering = _Numbering()
            if not topic.startswith((REPLY_PREFIX, REPLAY_PREFIX)):  # who receives them chooses: nothing is kept for it
                self._numbering[topic] = numbering
        parts = encode(
            topic,
            body,
            sender=self.sender,
            boot=self.boot,
            sequence=numbering.sequence,
            total=numbering.total,
            batch=batch,
        )
        parts += arrays
        if not self._put(parts):
            return False
        numbering.sequence += 1
        numbering.total += len(batch) if batch is not None else count
        return True

    def _put(self, parts: Sequence[Part]) -> bool:
        try:
            for part in parts[:-1]:
                self._send(part, MORE)
            self._send(parts[-1], NOBLOCK)
        except zmq.Again:
            return False
        for _ in range(sum(map(len, parts)) // PLACE):  # a queue is bounded by messages, and so by bytes
            self._put((*parts[:2], FILLER))
        return True

    def position(self, topic: str) -> tuple[int, int]:
        """Return the number of messages, and of datagrams, that were published on a topic."""
        numbering = self._numbering.get(topic, _Numbering())
        return numbering.sequence, numbering.total

    def repeat(self, topic: str, body: Body, sequence: int, total: int, arrays: Sequence[Part]) -> bool:
        """Put a message on the bus under the numbers of another one. Return False when the queue is full."""
        parts = encode(topic, body, sender=self.sender, boot=self.boot, sequence=sequence, total=total)
        return self._put([*parts, *arrays])

    def close(self, linger_ms: int | None = None) -> None:
        """Stop publishing; what is queued is still sent while the context lingers, or for so long."""
        if not self._socket.closed:
            self._socket.disable_monitor()  # first: an event that nobody can take would stop ZeroMQ's thread
            self._monitor.close()
            self._socket.close(linger_ms)


class Subscriber:
    """Receives messages from the bus; a malformed one is counted in `rejected`, logged, and dropped.

    Who takes datagrams hands in what borrows payloads that are lent; others do without it, and without numpy.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        directory: Path,
        high_water_mark: int,
        link: BusLink = DIRECT,
        borrower: "type[Borrower] | None" = None,
    ) -> None:
        check_directory(directory)
        self.rejected: Counter[str] = Counter()
        self._prefixes: Counter[str] = Counter()
        self._socket = configure(context.socket(zmq.SUB), high_water_mark)
        lending = None if link.broker else directory  # workers that lend in the directory are not its broker's
        own = self._socket
        self._borrower = borrower(lending, own.subscribe, own.unsubscribe) if borrower else None
        link.connect(self._socket, directory, "subscribe")

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """The socket for a `zmq.Poller`."""
        return self._socket

    def fileno(self) -> int:
        """An edge-triggered descriptor: when it fires, call `receive` until it returns None."""
        return int(self._socket.get(zmq.FD))

    def subscribe(self, prefix: str) -> None:
        """Ask for every topic that begins with `prefix`, which ends in `/`: `a.1` would also bring `a.10`."""
        self._prefixes[prefix] += 1
        if self._borrower:
            self._borrower.expect(prefix)
        self._socket.subscribe(prefix)

    def unsubscribe(self, prefix: str) -> None:
        """Take `subscribe` back."""
        self._socket.unsubscribe(prefix)
        self._prefixes -= Counter([prefix])
        if self._borrower:
            self._borrower.keep_streams(self._prefixes)

    def receive(self) -> Message | None:
        """Return the next message, or None when there is none now. A batch's arrays are views of the received parts."""
        while True:
            if not int(self._socket.get(EVENTS)) & POLLIN:
                return None
            frame = self._socket.recv(NOBLOCK, copy=False)
            parts: list[Part] = [frame.bytes]
            while frame.more:
                frame = self._socket.recv(NOBLOCK, copy=False)
                # Small parts as bytes; the arrays stay where ZeroMQ received them, kept alive by the views on them.
                parts.append(frame.bytes if len(parts) < 3 else frame.buffer)
            if len(parts) == 3 and parts[2] == FILLER:
                continue
            try:
                message = decode(parts, self._borrower.borrow if self._borrower else borrow_nothing)
            except MessageError as error:
                self._reject(error)
            else:
                if self._borrower and type(message.body) is Datagrams and message.body.chunk is None:
                    self._borrower.note_lending(message.envelope, message.body, is_mark=not message.batch)
                return message

    def _reject(self, error: MessageError) -> None:
        self.rejected[error.cause] += 1
        count = sum(self.rejected.values())
        log.warning("bus message dropped", cause=error.cause, reason=str(error)[:200], dropped_so_far=count)

    def close(self) -> None:
        """Stop receiving."""
        if self._borrower:
            self._borrower.close()
        self._socket.close()


class Requests:
    """Requests under way: each has an id, a deadline, and a callback for its answer or for none.

    The request itself is a published message that carries the id and `topic`, on which the answer comes back.
    """

    def __init__(self, sender: str, boot: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.topic = f"{REPLY_PREFIX}{sender}.{boot:x}/"
        self._clock = clock
        self._ids = itertools.count(1)
        self._open: dict[int, tuple[float, Callable[[Message | None], None]]] = {}

    def open(self, deadline_seconds: float, finished: Callable[[Message | None], None]) -> int:
        """Begin a request; `finished` gets the answer, or None when there is none by the deadline."""
        number = next(self._ids)
        self._open[number] = (self._clock() + deadline_seconds, finished)
        return number

    def answer(self, number: int, message: Message) -> None:
        """Hand an answer to the request's `finished`; a late or second answer is ignored."""
        _, finished = self._open.pop(number, (0.0, None))
        if finished is not None:
            finished(message)

    def withdraw(self, number: int) -> None:
        """Forget a request that never got on the bus: `finished` is not called."""
        self._open.pop(number, None)

    def expire(self) -> None:
        """End the requests whose deadline has passed."""
        now = self._clock()
        for number in [number for number, (deadline, _) in self._open.items() if deadline <= now]:
            _, finished = self._open.pop(number)
            finished(None)


def prepare_directory(directory: Path) -> None:
    """Make the bus directory, mode 0700, for a broker of this user. PermissionError when another user owns it.

    An existing directory may have mode 0750, for an operator's group; wider modes are narrowed. OperatorError when the
    directory can't be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        cure = "set [bus] directory to one that this user can make"
        raise OperatorError(CANT_CREATE, f"bus directory {directory}: {error.strerror}; {cure}") from None
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise _not_ours(directory)
    if found.st_mode & 0o027:
        directory.chmod(found.st_mode & 0o750)


def check_directory(directory: Path) -> None:
    """Check that the broker in a bus directory can be trusted. PermissionError when another user made the directory.

    It may be ours, root's, or open to a group of ours. A directory that does not exist is made: in a place that all may
    write to, such as /tmp, any user could make it otherwise.
    """
    # The transmitter's opener may hand the directory on as a descriptor: follow such a link to what was opened.
    look = directory.stat if directory.parent == HANDED_ON else directory.lstat
    try:
        found = look()
    except FileNotFoundError:
        prepare_directory(directory)
        return
    our_group = found.st_gid in (os.getegid(), *os.getgroups())  # the first need not be among the others
    trusted = found.st_uid in (0, os.geteuid()) or (found.st_mode & 0o050 and our_group)
    if not stat.S_ISDIR(found.st_mode) or not trusted or found.st_mode & 0o002:
        raise _not_ours(directory)


def _not_ours(directory: Path) -> PermissionError:
    return PermissionError(
        errno.EPERM, "owned by another user; set [bus] directory to one of this user's", str(directory)
    )

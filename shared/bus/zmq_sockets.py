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
from typing import Final

import structlog
import zmq

from shared.bus.endpoint import DIRECT, BusLink, ipc_endpoint
from shared.bus.loans import Borrowed, pool_path
from shared.bus.messages import (
    MAX_MESSAGE,
    MAX_TOPIC,
    REPLY_PREFIX,
    Body,
    Datagrams,
    Envelope,
    Message,
    MessageError,
    Part,
    datagrams_topic,
    decode,
    encode,
    inline_topic,
)
from shared.datagrams.batch import DatagramBatch
from shared.process.lifecycle import CANT_CREATE, OperatorError

HELLO_TOPIC: Final = "broker/"
"""The broker subscribes to it itself, so a publisher that has seen this subscription is connected to a broker."""
LINGER_MS: Final = 1000
"""How long unsent messages may hold up an exit: drain must be over within 4 s, and the default is for ever."""
HANDED_ON: Final = Path("/proc/self/fd")
"""Where a bus directory is found that was opened by a process which may go there, for one which may not."""
MAX_SUBSCRIPTION: Final = 2 * MAX_TOPIC
"""Bytes that an XPUB takes in one piece: a subscription to the longest topic, or a part of the handshake. libzmq keeps
each byte of a subscription in a node of its own: one of 1 MB would take over 100 MB of the broker."""
SUBSCRIPTIONS_MAX: Final = 4096
"""Bounds what a publisher remembers of a hostile subscriber."""
MAX_UNREADABLE: Final = 256
"""Likewise what a subscriber remembers of made-up workers."""

EVENTS: Final = int(zmq.EVENTS)
POLLIN: Final = int(zmq.POLLIN)
NOBLOCK: Final = int(zmq.NOBLOCK)
MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
"""Numbers, for what is done with every message: `|` and `&` of enums take longer than the call that they are for."""

log = structlog.get_logger()


def publish_endpoint(directory: Path) -> str:
    """Where publishers connect: the broker's XSUB."""
    return ipc_endpoint(directory, "publish")


def subscribe_endpoint(directory: Path) -> str:
    """Where subscribers connect: the broker's XPUB."""
    return ipc_endpoint(directory, "subscribe")


def broker_is_up(directory: Path, link: BusLink = DIRECT) -> bool:
    """Whether something accepts connections where subscribers connect."""
    return link.is_up(directory)


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A ZeroMQ context with one I/O thread; never shared across fork."""
    return zmq.Context(io_threads=1)


def configure(sock: zmq.Socket[bytes], high_water_mark: int) -> zmq.Socket[bytes]:
    """Set the options that every socket of the bus has, the broker's included; return the socket."""
    sock.set(zmq.LINGER, LINGER_MS)
    sock.set(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION if sock.type == zmq.XPUB else MAX_MESSAGE)
    # The mark is for messages; what goes the other way are subscriptions, which must not be lost: nobody repeats them.
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
    """Publishes a service's messages, and sees who subscribes to them."""

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
        self._subscriptions: set[bytes] = set()
        self._wanted: dict[str, bool] = {}
        check_directory(directory)
        self._socket = configure(context.socket(zmq.XPUB), high_water_mark)
        # Verbose: told of every late subscriber, not of the first alone, so that each gets the last value. No drop:
        # at the mark a send is refused, and counted, where the default loses it without a word.
        self._socket.set(zmq.XPUB_VERBOSE, 1)
        self._socket.set(zmq.XPUB_NODROP, 1)
        link.connect(self._socket, directory, "publish")

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For a `zmq.Poller`, which becomes ready when subscriptions have come."""
        return self._socket

    def fileno(self) -> int:
        """A descriptor that becomes readable when subscriptions may have come, for other selectors.

        It is edge-triggered, and `publish` may swallow the edge: call `new_subscriptions` after publishing too.
        """
        return int(self._socket.get(zmq.FD))

    @property
    def ready(self) -> bool:
        """Whether a broker has been observed."""
        return HELLO_TOPIC.encode() in self._subscriptions

    def new_subscriptions(self) -> list[str]:
        """Take in what subscribers said since the last call; return the prefixes newly subscribed to, each once."""
        if not self._readable():
            return []
        fresh: dict[str, None] = {}
        while self._readable():
            said = self._socket.recv(zmq.NOBLOCK)
            self._wanted.clear()
            prefix = said[1:]
            if said[:1] == b"\x01" and len(self._subscriptions) < SUBSCRIPTIONS_MAX:
                self._subscriptions.add(prefix)
                fresh[prefix.decode("utf-8", "replace")] = None
            elif said[:1] == b"\x00":
                self._subscriptions.discard(prefix)
        return list(fresh)

    def _readable(self) -> bool:
        return bool(int(self._socket.get(EVENTS)) & POLLIN)

    def wanted(self, topic: str) -> bool:
        """Whether anyone subscribes to `topic`: what nobody wants need not be encoded."""
        known = self._wanted.get(topic)
        if known is None:
            known = any(topic.encode().startswith(prefix) for prefix in self._subscriptions)
            self._wanted[topic] = known
        return known

    def publish(
        self,
        topic: str,
        body: Body,
        batch: DatagramBatch | None = None,
        arrays: Sequence[Part] = (),
        count: int = 0,
    ) -> bool:
        """Put a message on the bus; False when its queue is at the high-water mark, and then nothing was sent.

        Instead of a batch there may be its arrays as they are sent, and how many rows they have.
        """
        numbering = self._numbering.get(topic)
        if numbering is None:
            numbering = _Numbering()
            if not topic.startswith(REPLY_PREFIX):  # which is its receiver's choice: nothing is kept for it
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
        try:
            for part in parts[:-1]:
                self._socket.send(part, MORE)
            self._socket.send(parts[-1], NOBLOCK)
        except zmq.Again:
            return False
        numbering.sequence += 1
        numbering.total += len(batch) if batch is not None else count
        return True

    def close(self) -> None:
        """Stop publishing; what is queued is still sent while the context lingers."""
        self._socket.close()


class Subscriber:
    """Takes messages from the bus; what is malformed is counted in `rejected`, said, and dropped."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], directory: Path, high_water_mark: int, link: BusLink = DIRECT
    ) -> None:
        check_directory(directory)
        self.rejected: Counter[str] = Counter()
        self._directory = None if link.broker else directory  # the workers that lend there are not those of its broker
        self._lenders: dict[tuple[str, str], tuple[int, Borrowed]] = {}
        """By worker and stream: the worker's boot id, and what it lends."""
        self._inline: dict[str, set[str]] = {}
        """By stream: the workers that lend what can't be read here now."""
        self._prefixes: Counter[str] = Counter()
        self._socket = configure(context.socket(zmq.SUB), high_water_mark)
        link.connect(self._socket, directory, "subscribe")

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For a `zmq.Poller`."""
        return self._socket

    def fileno(self) -> int:
        """An edge-triggered descriptor: when it fires, call `receive` until it returns None."""
        return int(self._socket.get(zmq.FD))

    def subscribe(self, prefix: str) -> None:
        """Ask for every topic that begins with `prefix`, which ends in `/`: `a.1` would also bring `a.10`."""
        self._prefixes[prefix] += 1
        self._socket.subscribe(prefix)

    def unsubscribe(self, prefix: str) -> None:
        """Take `subscribe` back."""
        self._socket.unsubscribe(prefix)
        self._prefixes -= Counter([prefix])
        # Who hears of no loan gives none back, and would hold up the worker: borrow nothing more.
        for key in list(self._lenders):
            if not datagrams_topic(key[1]).startswith(tuple(self._prefixes)):
                self._lenders.pop(key)[1].close()

    def receive(self) -> Message | None:
        """The next message, or None when there is none now. A batch's arrays are views of the received parts."""
        while True:
            if not int(self._socket.get(EVENTS)) & POLLIN:
                return None
            frames = [self._socket.recv(NOBLOCK, copy=False)]
            while frames[-1].more:
                frames.append(self._socket.recv(NOBLOCK, copy=False))
            # Small parts as bytes; the arrays stay where ZeroMQ received them, kept alive by the views on them.
            parts: list[Part] = [frame.bytes for frame in frames[:3]]
            parts += [frame.buffer for frame in frames[3:6]]
            try:
                message = decode(parts, self._borrow)
            except MessageError as error:
                self._reject(error)
            else:
                if isinstance(message.body, Datagrams) and message.body.chunk is None:
                    self._heed(message.envelope, message.body, mark=not message.batch)
                return message

    def _heed(self, envelope: Envelope, body: Datagrams, *, mark: bool) -> None:
        """Take in what a message that lends nothing says of lending."""
        if mark:
            self._meet(envelope, body.stream)
        boot, borrowed = self._lenders.get((envelope.sender, body.stream), (None, None))
        if borrowed is not None and boot == envelope.boot:
            borrowed.passed(body.loan)
            unreadable = self._inline.get(body.stream, ())
            if envelope.sender in unreadable and borrowed.admitted:
                self._inline[body.stream].discard(envelope.sender)
                if not self._inline[body.stream]:
                    self.unsubscribe(inline_topic(body.stream))

    def _meet(self, envelope: Envelope, stream: str) -> None:
        """Ask a worker whose mark has come to lend us what it lends others; say so when that can't be."""
        boot, known = self._lenders.get((envelope.sender, stream), (None, None))
        if boot == envelope.boot:
            return
        if known is not None:
            known.close()
            del self._lenders[envelope.sender, stream]
        try:
            if self._directory is None:
                raise OSError
            borrowed = Borrowed(pool_path(self._directory, envelope.sender), stream)
        except OSError:  # perhaps it lends nothing
            self._want_inline(stream, envelope.sender)
        else:
            self._lenders[envelope.sender, stream] = envelope.boot, borrowed

    def _borrow(self, envelope: Envelope, body: Datagrams, size: int) -> Part:
        boot, borrowed = self._lenders.get((envelope.sender, body.stream), (None, None))
        payload = None
        if borrowed is not None and boot == envelope.boot and body.chunk is not None:
            payload = borrowed.payload(body.loan, body.chunk, size)
        if payload is None:
            self._want_inline(body.stream, envelope.sender)
            raise MessageError("not_borrowed", f"{envelope.sender} lends a payload that can't be read here")
        return payload

    def _want_inline(self, stream: str, worker: str) -> None:
        """Have payloads of a stream sent in messages, until what a worker lends can be read here."""
        unreadable = self._inline.setdefault(stream, set())
        if not unreadable:
            self.subscribe(inline_topic(stream))
        if len(unreadable) < MAX_UNREADABLE:
            unreadable.add(worker)

    def _reject(self, error: MessageError) -> None:
        self.rejected[error.cause] += 1
        count = sum(self.rejected.values())
        log.warning("bus message dropped", cause=error.cause, reason=str(error)[:200], dropped_so_far=count)

    def close(self) -> None:
        """Stop receiving."""
        for _, borrowed in self._lenders.values():
            borrowed.close()
        self._lenders.clear()
        self._socket.close()


class Requests:
    """Requests under way: each has an id, a deadline, and what to do with its answer or with none.

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
        """Hand an answer to who asked; one that comes after its deadline, or twice, is let go."""
        _, finished = self._open.pop(number, (0.0, None))
        if finished is not None:
            finished(message)

    def withdraw(self, number: int) -> None:
        """Let go of a request that never got on the bus: `finished` is not called."""
        self._open.pop(number, None)

    def expire(self) -> None:
        """End the requests whose deadline has passed."""
        now = self._clock()
        for number in [number for number, (deadline, _) in self._open.items() if deadline <= now]:
            _, finished = self._open.pop(number)
            finished(None)


def prepare_directory(directory: Path) -> None:
    """Make the bus directory, mode 0700, for a broker of this user. PermissionError when it is somebody else's.

    An existing directory may have mode 0750, for an operator's group; anything wider is taken back. OperatorError when
    there can be none.
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
    """See that the broker in a bus directory is one to trust. PermissionError when somebody else made the directory.

    It may be ours, root's, or open to a group of ours. One that is not there yet is made: in a place that all may write
    to, such as /tmp, it would be anybody's to make.
    """
    # The transmitter's opener may hand it on as a descriptor: what such a link names is what was opened.
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
    return PermissionError(errno.EPERM, "somebody else's; set [bus] directory to one of this user's", str(directory))

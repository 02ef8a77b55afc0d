"""XSUB to XPUB in ZeroMQ's own loop (`zmq_proxy_steerable`), with its statistics; when there are keys, in ours."""

import fcntl
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import zmq

from services.broker.access import bind_tcp, let_in, refuse_strangers
from services.broker.checkpoint import KEPT_BACK, STATISTICS, Checkpoint
from services.broker.guard import Guard
from shared.addresses import Endpoint
from shared.bus import (
    HELLO_TOPIC,
    Publisher,
    configure,
    new_context,
    prepare_directory,
)
from shared.lifecycle import CANT_CREATE, Lifecycle, OperatorError, Watchdog
from shared.link import DIRECT, Link, ipc_endpoint
from shared.reload import Reload
from shared.status import INTERVAL_SECONDS, Reporter

ENDPOINTS: Final = ("publish", "subscribe")
"""The socket files."""
QUIET_SECONDS: Final = 0.3
DRAIN_SECONDS: Final = 2.0
"""After SIGTERM the rest of the stack still flushes: messages are passed until none came for a while, or so long."""


class Proxy:
    """Owns the bus directory and all endpoints; a second broker on the same directory is refused.

    A group, if given, may enter the directory and connect. With a directory of keys nobody connects without one.
    """

    def __init__(
        self,
        directory: Path,
        high_water_mark: int,
        group: int | None = None,
        listen: Sequence[Endpoint] = (),
        keys: Path | None = None,
    ) -> None:
        self._directory = directory
        self._high_water_mark = high_water_mark
        self._group = group
        self._listen = listen
        self._guard = Guard(keys) if keys else None
        self._checkpoint = Checkpoint()

    def __enter__(self) -> Self:
        self._take_directory()
        self._context = new_context()
        publishers = configure(self._context.socket(zmq.XSUB), self._high_water_mark)
        subscribers = configure(self._context.socket(zmq.XPUB), self._high_water_mark)
        # Every subscription goes on to the publishers, repeated ones too: it is how they see a late subscriber. So
        # does every unsubscription, since our XSUB counts both and would not know when the last one leaves.
        # No XPUB_NODROP here: one stalled subscriber would hold up the rest.
        subscribers.set(zmq.XPUB_VERBOSER, 1)
        link, passing = DIRECT, _pass_messages
        if self._guard is not None:
            self._guard.start(self._context)
            self._guard.protect(publishers, subscribers)
            link, passing = Link(keys=self._guard.keys), self._checkpoint.pass_messages
        try:
            for sock, side in ((publishers, "publish"), (subscribers, "subscribe")):
                refuse_strangers(sock, self._directory, self._group)
                sock.bind(ipc_endpoint(self._directory, side))
                bind_tcp(sock, self._listen, side)
        except BaseException:
            for sock in (publishers, subscribers):
                sock.close()
            self._end()
            raise
        if self._group is not None:
            let_in(self._group, self._directory, *(self._directory / endpoint for endpoint in ENDPOINTS))
        self._control = self._context.socket(zmq.PAIR)
        self._control.bind("inproc://control")
        steering = self._context.socket(zmq.PAIR)
        steering.connect("inproc://control")
        self._thread = threading.Thread(target=passing, args=(publishers, subscribers, steering))
        self._thread.start()
        self._hello = configure(self._context.socket(zmq.SUB), 1)
        link.connect(self._hello, self._directory, "subscribe")
        self._hello.subscribe(HELLO_TOPIC)
        self._publisher = Publisher(self._context, self._directory, "broker.1", self._high_water_mark, link)
        return self

    def _take_directory(self) -> None:
        # A second bind on an ipc path would succeed and take the endpoint away from the first: flock decides.
        try:
            prepare_directory(self._directory)
            self._lock = (self._directory / "lock").open("w")
        except OSError as error:
            raise OperatorError(CANT_CREATE, f"bus directory {self._directory}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise OperatorError(
                CANT_CREATE, f"another broker runs on {self._directory}; stop it, or set another [bus] directory"
            ) from None

    def statistics(self) -> Counter[str]:
        """What has passed so far, by direction, in parts and bytes."""
        self._control.send(b"STATISTICS")
        return Counter({
            name: struct.unpack("=Q", part)[0]
            for name, part in zip(STATISTICS + KEPT_BACK, self._control.recv_multipart(), strict=False)
        })  # fmt: skip

    def serve(self, lifecycle: Lifecycle, reload: Reload) -> None:
        """Report until told to drain, then wait for the rest of the stack to fall silent."""
        watchdog = Watchdog()
        reporter = Reporter(self._publisher)
        poller = zmq.Poller()
        poller.register(lifecycle.fileno(), zmq.POLLIN)
        poller.register(self._publisher.socket, zmq.POLLIN)
        for monitor in self._guard.monitors if self._guard else ():
            poller.register(monitor, zmq.POLLIN)
        while not lifecycle.draining:
            if (lifecycle.fileno(), zmq.POLLIN) in poller.poll(int(INTERVAL_SECONDS * 1000)):
                lifecycle.heed()
                reload.check()
            if self._guard is not None:
                self._guard.observe()
            if reporter.asked_for(self._publisher.new_subscriptions()) or time.monotonic() >= reporter.due_at:
                self._report(reporter)
                watchdog.feed()
        self._drain()

    def _report(self, reporter: Reporter) -> None:
        statistics = self.statistics()  # whether or not anybody listens: an answer shows that messages are passed
        if self._guard is not None:
            statistics += self._guard.counters + self._checkpoint.counters
        reporter.report(lambda: {"broker": statistics})

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        before = -1
        while (now := self.statistics()["from_publishers"]) != before and time.monotonic() < deadline:
            before = now
            time.sleep(QUIET_SECONDS)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.send(b"TERMINATE")
        self._thread.join()
        for closable in (self._publisher, self._hello, self._control):
            closable.close()
        self._end()

    def _end(self) -> None:
        if self._guard is not None:
            self._guard.stop()
        self._context.term()
        # libzmq leaves the socket files; unlinked while we hold the lock, they can't be a successor's.
        for endpoint in ENDPOINTS:
            (self._directory / endpoint).unlink(missing_ok=True)
        self._lock.close()


def _pass_messages(publishers: zmq.Socket[bytes], subscribers: zmq.Socket[bytes], steering: zmq.Socket[bytes]) -> None:
    zmq.proxy_steerable(publishers, subscribers, None, steering)
    for sock in (publishers, subscribers, steering):
        sock.close()

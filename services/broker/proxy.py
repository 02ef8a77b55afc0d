"""XSUB to XPUB in ZeroMQ's own loop (`zmq_proxy_steerable`), with its statistics."""

import fcntl
import struct
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import zmq

from services.broker.access import let_in
from shared.bus import (
    HELLO_TOPIC,
    Publisher,
    configure,
    new_context,
    prepare_directory,
    publish_endpoint,
    subscribe_endpoint,
)
from shared.lifecycle import CANT_CREATE, Lifecycle, OperatorError, Watchdog
from shared.reload import Reload
from shared.status import INTERVAL_SECONDS, Reporter

STATISTICS: Final = tuple(
    f"{direction}_{side}{unit}"
    for side in ("publishers", "subscribers")
    for direction in ("from", "to")
    for unit in ("", "_bytes")
)
"""What the proxy counts, in the order it answers (zmq_proxy_steerable(3)); it counts parts, not messages."""
ENDPOINTS: Final = ("publish", "subscribe")
"""The socket files."""
QUIET_SECONDS: Final = 0.3
DRAIN_SECONDS: Final = 2.0
"""After SIGTERM the rest of the stack still flushes: messages are passed until none came for a while, or so long."""


class Proxy:
    """Owns the bus directory and both endpoints; a second broker on the same directory is refused.

    A group, if given, may enter the directory and connect.
    """

    def __init__(self, directory: Path, high_water_mark: int, group: int | None = None) -> None:
        self._directory = directory
        self._high_water_mark = high_water_mark
        self._group = group

    def __enter__(self) -> Self:
        self._take_directory()
        self._context = new_context()
        publishers = configure(self._context.socket(zmq.XSUB), self._high_water_mark)
        subscribers = configure(self._context.socket(zmq.XPUB), self._high_water_mark)
        # Every subscription goes on to the publishers, repeated ones too: it is how they see a late subscriber. So
        # does every unsubscription, since our XSUB counts both and would not know when the last one leaves.
        # No XPUB_NODROP here: one stalled subscriber would hold up the rest.
        subscribers.set(zmq.XPUB_VERBOSER, 1)
        publishers.bind(publish_endpoint(self._directory))
        subscribers.bind(subscribe_endpoint(self._directory))
        if self._group is not None:
            let_in(self._group, self._directory, *(self._directory / endpoint for endpoint in ENDPOINTS))
        self._control = self._context.socket(zmq.PAIR)
        self._control.bind("inproc://control")
        steering = self._context.socket(zmq.PAIR)
        steering.connect("inproc://control")
        self._thread = threading.Thread(target=_pass_messages, args=(publishers, subscribers, steering))
        self._thread.start()
        self._hello = configure(self._context.socket(zmq.SUB), 1)
        self._hello.connect(subscribe_endpoint(self._directory))
        self._hello.subscribe(HELLO_TOPIC)
        self._publisher = Publisher(self._context, self._directory, "broker.1", self._high_water_mark)
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
            for name, part in zip(STATISTICS, self._control.recv_multipart(), strict=True)
        })  # fmt: skip

    def serve(self, lifecycle: Lifecycle, reload: Reload) -> None:
        """Report until told to drain, then wait for the rest of the stack to fall silent."""
        watchdog = Watchdog()
        reporter = Reporter(self._publisher)
        poller = zmq.Poller()
        poller.register(lifecycle.fileno(), zmq.POLLIN)
        poller.register(self._publisher.socket, zmq.POLLIN)
        while not lifecycle.draining:
            if (lifecycle.fileno(), zmq.POLLIN) in poller.poll(int(INTERVAL_SECONDS * 1000)):
                lifecycle.heed()
                reload.check()
            if reporter.asked_for(self._publisher.new_subscriptions()) or time.monotonic() >= reporter.due_at:
                self._report(reporter)
                watchdog.feed()
        self._drain()

    def _report(self, reporter: Reporter) -> None:
        statistics = self.statistics()  # whether or not anybody listens: an answer shows that messages are passed
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
        self._context.term()
        # libzmq leaves the socket files; unlinked while we hold the lock, they can't be a successor's.
        for endpoint in ENDPOINTS:
            (self._directory / endpoint).unlink(missing_ok=True)
        self._lock.close()


def _pass_messages(publishers: zmq.Socket[bytes], subscribers: zmq.Socket[bytes], steering: zmq.Socket[bytes]) -> None:
    zmq.proxy_steerable(publishers, subscribers, None, steering)
    for sock in (publishers, subscribers, steering):
        sock.close()

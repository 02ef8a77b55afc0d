"""XSUB to XPUB as `zmq_proxy_steerable` does it, but only for messages that their sender's role may publish.

Parts stay where ZeroMQ received them; only topic and envelope of a message are read.
"""

import struct
from collections import Counter
from typing import Final

import zmq

from services.broker.publish_rights import refused_cause
from shared.bus.messages import MessageError, peek
from shared.ledger.counters import REFUSED_MALFORMED, REFUSED_SENDER, REFUSED_TOPIC
from shared.log import get_logger

BURST: Final = 1000
"""Messages of one side before the other has its turn, as in libzmq's own loop."""
COUNTERS: Final = {"sender": REFUSED_SENDER, "topic": REFUSED_TOPIC}
STATISTICS: Final = tuple(
    f"{direction}_{side}{unit}"
    for side in ("publishers", "subscribers")
    for direction in ("from", "to")
    for unit in ("", "_bytes")
)
"""Counters of a proxy, in the order of its answer (zmq_proxy_steerable(3)); it counts parts, not messages."""
KEPT_BACK: Final = ("refused_from_publishers", "refused_from_publishers_bytes")
"""Counters that only a filtering proxy has, answered behind those."""

Socket = zmq.Socket[bytes]

log = get_logger()


class FilteringProxy:
    """Passes messages that their publishers may send; counts, logs and drops the others."""

    def __init__(self) -> None:
        self.counters = Counter[str]()
        """Messages refused, by cause."""
        self._statistics = Counter[str]()

    def pass_messages(self, publishers: Socket, subscribers: Socket, steering: Socket) -> None:
        """Pass messages until told to end."""
        self._statistics = Counter()
        poller = zmq.Poller()
        for sock in (publishers, subscribers, steering):
            poller.register(sock, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if steering in ready and not self._goes_on(steering):
                break
            if publishers in ready:
                self._pass("publishers", publishers, "subscribers", subscribers)
            if subscribers in ready:
                self._pass("subscribers", subscribers, "publishers", publishers)

    def _goes_on(self, steering: Socket) -> bool:
        """Obey an order, and return whether to go on; after `PAUSE` only `TERMINATE` leads on."""
        order, paused = steering.recv(), False
        while order != b"TERMINATE":
            if order == b"STATISTICS":
                steering.send_multipart([struct.pack("=Q", self._statistics[name]) for name in STATISTICS + KEPT_BACK])
            paused |= order == b"PAUSE"
            if not paused:
                return True
            order = steering.recv()
        return False

    def _pass(self, source: str, receiving: Socket, destination: str, sending: Socket) -> None:
        for _ in range(BURST):
            try:
                frames = receiving.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            count, size = len(frames), sum(map(len, frames))
            self._statistics[f"from_{source}"] += count
            self._statistics[f"from_{source}_bytes"] += size
            passes = source == "subscribers" or self._may_pass(frames)
            if passes:
                sending.send_multipart(frames, copy=False)
            del frames  # let the I/O thread free its memory; nothing is kept during the wait
            outcome = f"to_{destination}" if passes else f"refused_from_{source}"
            self._statistics[outcome] += count
            self._statistics[f"{outcome}_bytes"] += size

    def _may_pass(self, frames: list[zmq.Frame]) -> bool:
        try:
            role = str(frames[0].get("User-Id"))
        except zmq.ZMQError:  # a message without a key, which does not get this far where keys are required
            role = ""
        try:
            topic, envelope = peek([frame.buffer for frame in frames])
        except MessageError as error:
            self.counters[REFUSED_MALFORMED] += 1
            log.warning("message refused: malformed", role=role, reason=str(error)[:200])
            return False
        cause = refused_cause(role, topic, envelope)
        if cause:
            self.counters[COUNTERS[cause]] += 1
            log.warning(
                "message refused: the role of its key may not publish it",
                role=role,
                sender=envelope.sender,
                topic=topic[:80],
                kind=envelope.kind[:40],
            )
        return not cause

"""Raw frames for clients: requests to the transmitter, and its replies brought back."""

import errno
from collections import Counter
from collections.abc import Callable
from typing import Final

from services.gateway.protocol.requests import Transmit
from shared.bus.frame_requests import ANSWER_SECONDS
from shared.bus.messages import TRANSMIT_TOPIC, Message, TransmitReply, TransmitRequest
from shared.bus.zmq_sockets import Publisher, Requests

MAX_OPEN: Final = 64
"""Requests that may wait for a reply at a time; the transmitter has at most as many under way."""
MAX_OPEN_OF_HOLDER: Final = 16
"""Those of them that one holder may have; this host may have all."""


class Transmissions:
    """Asks the transmitter to send frames for clients."""

    def __init__(self, publisher: Publisher, requests: Requests) -> None:
        self._publisher = publisher
        self._requests = requests
        self._open: Counter[str] = Counter()
        """By holder."""

    def sends_frames(self) -> bool:
        """Return whether a transmitter is there."""
        return self._publisher.wanted(TRANSMIT_TOPIC)

    def send_frames(self, request: Transmit, holder: str, finished: Callable[[TransmitReply | None], None]) -> None:
        """Pass a request on; `finished` gets the reply, None when none came in time.

        OSError when it can't be passed on.
        """
        if self._open.total() >= MAX_OPEN:
            raise OSError(errno.EBUSY, f"{MAX_OPEN} requests wait for the transmitter already")
        if holder and self._open[holder] >= MAX_OPEN_OF_HOLDER:
            raise OSError(errno.EBUSY, f"{MAX_OPEN_OF_HOLDER} requests of {holder!r} wait for the transmitter already")

        def answered(message: Message | None) -> None:
            self._open[holder] -= 1
            reply = message.body if message else None
            finished(reply if isinstance(reply, TransmitReply) else None)

        number = self._requests.open(request.seconds + ANSWER_SECONDS, answered)
        body = TransmitRequest(
            number,
            self._requests.topic,
            request.interface,
            request.whole,
            request.count,
            request.per_second,
            request.own_fcs,
        )
        if not self._publisher.publish(TRANSMIT_TOPIC, body):
            self._requests.withdraw(number)
            raise OSError(errno.ENOBUFS, "the bus is full and no frame has left")
        self._open[holder] += 1

"""Raw frames for clients: put to the transmitter as requests, and its answers brought back."""

from collections.abc import Callable
from typing import Final, get_args

from services.gateway.protocol.requests import ErrorWord, RequestError, Transmit, no_transmitter
from shared.bus.frame_requests import ANSWER_SECONDS, refusal
from shared.bus.messages import TRANSMIT_TOPIC, Message, TransmitReply, TransmitRequest
from shared.bus.zmq_sockets import Publisher, Requests

MAX_OPEN: Final = 64
"""Requests that may wait for an answer at a time; the transmitter has as many under way at most."""
WORDS: Final[tuple[ErrorWord, ...]] = get_args(ErrorWord)


class Transmissions:
    """Has the transmitter send frames, where clients are `allowed` to ask for it."""

    def __init__(self, publisher: Publisher, requests: Requests, *, allowed: bool) -> None:
        self._publisher = publisher
        self._requests = requests
        self._allowed = allowed
        self._open = 0

    def begin(self, request: Transmit, finished: Callable[[int | RequestError], None]) -> None:
        """Pass a request on; `finished` gets how many frames have left, or why not. `RequestError` if it can't be."""
        if not self._allowed:
            raise RequestError(
                "not_permitted", "clients may not send raw frames here; [gateway] allow_transmit = true lets them"
            )
        if not self._publisher.wanted(TRANSMIT_TOPIC):
            raise no_transmitter()
        if self._open >= MAX_OPEN:
            raise RequestError("unavailable", f"{MAX_OPEN} requests wait for the transmitter already; try again")

        def answered(message: Message | None) -> None:
            self._open -= 1
            finished(_outcome(message, request.count))

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
            raise RequestError("unavailable", "the bus takes nothing just now; no frame has left, try again")
        self._open += 1


def _outcome(message: Message | None, count: int) -> int | RequestError:
    if message is None or not isinstance(message.body, TransmitReply):
        return RequestError("unavailable", "the transmitter did not answer in time; frames may have left all the same")
    reply = message.body
    if not reply.error:
        return reply.sent
    return RequestError(next((word for word in WORDS if word == reply.error), "unavailable"), refusal(reply, count))

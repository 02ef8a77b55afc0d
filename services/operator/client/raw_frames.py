"""Raw frames from a terminal: sent to the transmitter over the bus; its answer is waited for."""

import os
import time
from collections.abc import Callable
from contextlib import closing
from typing import Final

from services.operator.client.bus_reader import connected
from shared.bus.frame_requests import ANSWER_SECONDS, describe_failure, sending_seconds
from shared.bus.messages import TRANSMIT_TOPIC, Message, TransmitReply, TransmitRequest
from shared.bus.zmq_sockets import Publisher, Requests, Subscriber
from shared.process.lifecycle import FAILED, NOT_PERMITTED, OK, UNAVAILABLE, OperatorError
from shared.settings.model import Settings

PATIENCE_SECONDS: Final = 3.0
"""The bus tells a publisher at once which services are there, or, on a machine with no time for it, a moment later."""
LOOK_MS: Final = 50
EXIT_CODES: Final = {"not_permitted": NOT_PERMITTED, "bad_request": FAILED}


def transmit(
    settings: Settings,
    interface: str,
    frame: bytes,
    *,
    count: int = 1,
    per_second: float = 0.0,
    own_fcs: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Ask the transmitter to send a frame; print how many have left. `stopped` ends the wait. OperatorError if refused.

    Any process that may enter the bus directory may use the bus, so there is no further check.
    """
    bus = settings.bus
    sender = f"operator.{os.getpid()}"
    with (
        connected(settings) as (context, link),
        closing(Publisher(context, bus.path, sender, bus.high_water_mark, link)) as publisher,
        closing(Subscriber(context, bus.path, bus.high_water_mark, link)) as subscriber,
    ):
        requests = Requests(sender, publisher.boot)
        subscriber.subscribe(requests.topic)
        wait_for_transmitter(publisher, requests.topic)
        answers: list[Message | None] = []
        number = requests.open(sending_seconds(count, per_second) + ANSWER_SECONDS, answers.append)
        body = TransmitRequest(number, requests.topic, interface, frame, count, per_second, own_fcs)
        publisher.publish(TRANSMIT_TOPIC, body)
        while not (answers or stopped()):
            subscriber.socket.poll(LOOK_MS)
            while message := subscriber.receive():
                if isinstance(message.body, TransmitReply):
                    requests.answer(message.body.id, message)
            requests.expire()
    sent = _sent(answers, count)
    print(f"{sent} {'frame' if sent == 1 else 'frames'} sent on {interface}")
    return OK


def wait_for_transmitter(publisher: Publisher, reply_topic: str) -> None:
    """Wait until a transmitter takes requests, and until the broker has passed our subscription on to all publishers.

    If the request went out earlier, its answer could come before our subscription to it.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (publisher.wanted(TRANSMIT_TOPIC) and publisher.wanted(reply_topic)):
        if time.monotonic() >= deadline:
            cure = "its log and `fanwire doctor` say what it lacks"
            raise OperatorError(UNAVAILABLE, f"no running transmitter has raw sockets; {cure}")
        publisher.socket.poll(LOOK_MS)
        publisher.new_subscriptions()


def _sent(answers: list[Message | None], count: int) -> int:
    reply = answers[0].body if answers and answers[0] else None
    if not isinstance(reply, TransmitReply):
        raise OperatorError(UNAVAILABLE, "the transmitter did not answer in time; some frames may have left")
    if reply.error:
        raise OperatorError(EXIT_CODES.get(reply.error, UNAVAILABLE), describe_failure(reply, count))
    return reply.sent

"""Reports of the services, as a command hears them on the bus."""

import time
from collections.abc import Iterator

from shared.bus.messages import Status
from shared.bus.status import Report, Reports
from shared.bus.zmq_sockets import Subscriber


def heard_reports(subscriber: Subscriber, seconds: float) -> Iterator[Report]:
    """Yield each whole report that comes within this time; the subscriber is subscribed to `status/`."""
    reports, deadline = Reports(), time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        subscriber.socket.poll(int(left * 1000) + 1)
        while message := subscriber.receive():
            if isinstance(message.body, Status) and (report := reports.add(message.envelope, message.body)):
                yield report

"""Messages of another site as a server hands them on, whatever they are."""

import pytest

from shared.ledger.counters import ACKNOWLEDGED, MESSAGES_UNREADABLE
from tests.services.uplink.nats import NatsServer, publish
from tests.services.uplink.test_session import plain, sending_and_receiving

__all__ = ["plain"]

pytestmark = pytest.mark.usefixtures("lab")


@pytest.mark.parametrize(
    ("site", "bad"),
    [
        ("bad-subject", b"PUB fanwire.bad-subject.flows.\xff\xfe 2\r\nhi\r\n"),
        ("bad-header", b"HPUB fanwire.bad-header.flows.ingest-1 4 6\r\nNATShi\r\n"),
        ("bad-status", b"HPUB fanwire.bad-status.flows.2 25 25\r\nNATS/1.0\r\nStatus: 100\r\n\r\n\r\n"),
    ],
)
def test_one_bad_message_costs_itself_alone(plain: NatsServer, site: str, bad: bytes) -> None:
    """A message that can't be decoded, or passes for one of JetStream, is counted; those behind it come at once."""
    sender, reader = sending_and_receiving(plain, site)
    publish(plain, bad)
    sender.offer(b"good")
    sender.run(lambda: sender.counted[ACKNOWLEDGED] == 1)
    reader.run(lambda: reader.came == [b"good"])
    assert reader.account[MESSAGES_UNREADABLE] == 1

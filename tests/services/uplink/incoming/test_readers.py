from services.uplink.incoming.readers import AHEAD, Readers
from shared.bus.messages import Status
from shared.ledger.accounts import unparse_origin

STREAM = "flows"


def report(reached: int, boot: int = 7) -> Status:
    """The report of a reader."""
    return Status(
        "forwarder.1", 1, 0, 0, 0, 1, {unparse_origin("uplink.1", boot, STREAM): {"reached": reached}, "forwarder": {}}
    )


def publish(readers: Readers, first: int, count: int) -> None:
    """Publish messages of ten datagrams."""
    for number in range(first, first + count):
        readers.note_published(STREAM, 10 * (number + 1))


def test_the_slowest_reader_is_waited_for() -> None:
    """So many messages may be ahead of each reader, and of no more; other streams and earlier starts do not count."""
    readers = Readers("uplink.1", 7)
    publish(readers, 0, AHEAD)
    assert not readers.follow(STREAM)
    assert readers.follow("others")
    readers.note_report("forwarder.1", report(10 * AHEAD))
    readers.note_report("journal.1", report(9))
    readers.note_report("transmitter.1", report(0, boot=6))
    assert not readers.follow(STREAM)
    readers.note_report("journal.1", report(10))
    assert readers.follow(STREAM)
    publish(readers, AHEAD, 1)
    assert not readers.follow(STREAM)


def test_who_stands_still_is_left_behind_until_it_goes_on() -> None:
    """A reader that got no further is not waited for, nor is anybody where no one tells; each may come back."""
    readers = Readers("uplink.1", 7)
    publish(readers, 0, AHEAD)
    readers.leave_behind(STREAM)
    assert readers.follow(STREAM)
    readers.note_report("forwarder.1", report(20))
    assert readers.follow(STREAM)
    publish(readers, AHEAD, 2)
    assert not readers.follow(STREAM)
    readers.leave_behind(STREAM)
    assert readers.follow(STREAM)
    readers.note_report("forwarder.1", report(20))
    assert readers.follow(STREAM)
    readers.note_report("forwarder.1", report(19))
    assert not readers.follow(STREAM)

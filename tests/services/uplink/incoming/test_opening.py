import pytest

from services.uplink.incoming.opening import PATIENCE_SECONDS, SUBSCRIBE_SECONDS, Opening
from shared.bus.messages import Status


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def report(sender: str, **account: int) -> Status:
    """The report of a sender of copies, or of another service."""
    return Status(sender, 1, 0, 0, 0, 1, {sender.partition(".")[0]: account})


@pytest.fixture
def clock() -> Clock:
    """A clock at some time."""
    return Clock()


def opens(opening: Opening, *, ready: bool = True) -> bool:
    """Return whether it is open now."""
    opening.check(ready=ready)
    return opening.event.is_set()


@pytest.mark.parametrize("sender", ["forwarder.1", "transmitter.1"])
def test_it_opens_once_a_sender_of_copies_has_the_registry(clock: Clock, sender: str) -> None:
    """A sender without a registry, and any other service, open nothing; one that has it does, a little later."""
    opening = Opening(clock)
    opening.note_report(sender, report(sender))
    opening.note_report("journal.1", report("journal.1", revision=7))
    clock.now += 2 * SUBSCRIBE_SECONDS
    assert not opens(opening)
    opening.note_report(sender, report(sender, revision=0))
    assert not opens(opening)
    clock.now += SUBSCRIBE_SECONDS / 2
    opening.note_report(sender, report(sender, revision=8))
    clock.now += SUBSCRIBE_SECONDS / 2
    assert clock.now == opening.due_at
    assert opens(opening)
    opening.note_report(sender, report(sender, revision=9))
    assert opening.due_at == float("inf")


def test_it_opens_in_the_end_where_nobody_sends_copies(clock: Clock) -> None:
    """A bus without senders of copies is waited for, from when its broker is there."""
    opening = Opening(clock)
    clock.now += 2 * PATIENCE_SECONDS
    assert not opens(opening, ready=False)
    assert not opens(opening)
    clock.now += PATIENCE_SECONDS
    assert opens(opening)

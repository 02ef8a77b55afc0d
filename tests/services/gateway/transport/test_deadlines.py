import math

import pytest

from services.gateway.transport.deadlines import SILENT_SECONDS, Deadlines, too_slow_reader
from shared.settings.tables import Gateway

SETTINGS = Gateway(idle_seconds=100, request_seconds=5)


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def test_each_step_has_its_time() -> None:
    """To begin a request a client has `idle_seconds`, for every other step `request_seconds`; suspended, any time."""
    deadlines = Deadlines(SETTINGS, Clock(), introduced=True)
    found = [deadlines.passes_at]
    for step in (
        deadlines.await_first_byte,
        deadlines.await_last_byte,
        deadlines.await_reader,
        deadlines.await_close,
        deadlines.suspend,
    ):
        step()
        found.append(deadlines.passes_at)
    assert found == [math.inf, 110.0, 15.0, 15.0, 15.0, math.inf]


def test_silence_is_awaited_no_longer_than_the_close() -> None:
    """Each byte puts off closing for a moment, but not beyond the time that the client has to close."""
    clock = Clock()
    deadlines = Deadlines(SETTINGS, clock, introduced=True)
    deadlines.await_close()
    deadlines.await_silence()
    assert deadlines.passes_at == 10 + SILENT_SECONDS
    clock.now = 14.9
    deadlines.await_silence()
    assert deadlines.passes_at == 15.0


def test_introduction_has_one_time() -> None:
    """A client that is not introduced has `request_seconds` from its beginning, whatever it does."""
    clock = Clock()
    deadlines = Deadlines(SETTINGS, clock, introduced=False)
    clock.now = 14.0
    for step in (deadlines.await_first_byte, deadlines.await_last_byte):
        step()
        assert deadlines.passes_at == 15.0


@pytest.mark.parametrize(
    ("introduced", "receiving", "said"),
    [
        (False, True, "no `auth` received within 5 s"),
        (False, False, "no `auth` received within 5 s"),
        (True, True, "request not complete within 5 s; send it in one piece"),
        (True, False, "no request received within 100 s"),
    ],
)
def test_refusal_says_what_was_awaited(introduced: bool, receiving: bool, said: str) -> None:
    """Each refusal has the word `too_slow`, and ends the connection."""
    refused = Deadlines(SETTINGS, Clock(), introduced=introduced).too_slow(receiving=receiving)
    assert (refused.error, refused.closes, str(refused)) == ("too_slow", True, said)
    assert too_slow_reader().error == "too_slow"

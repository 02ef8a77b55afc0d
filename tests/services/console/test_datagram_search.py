import asyncio
from ipaddress import ip_address
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.console.datagram_search import MAX_SHOWN, first_datagram, matching
from shared.bus.messages import Datagrams, Message
from shared.monitoring.exporters import covers
from tests.builders import SOURCES, make_batch, make_envelope

PREFIXES = ["192.0.2.0/30", "192.0.2.4/31", "2001:db8::/126", "2001:db8::5/128", "::/0", "0.0.0.0/0"]


def message(sources: list[str]) -> Message:
    """A batch with a datagram of each source, which says its place in it."""
    batch = make_batch([str(place).encode() for place in range(len(sources))], sources)
    return Message("", make_envelope(), Datagrams("messages", batch.received_ns), batch)


def first(messages: list[Message], *sources: list[str], seconds: float = 60) -> dict[str, Any] | None:
    """The datagram found in these messages, in their order."""
    left = iter(messages)
    return asyncio.run(first_datagram(lambda: next(left, None), matching(sources), seconds))


@given(
    st.lists(st.lists(st.sampled_from(SOURCES), max_size=5), min_size=1, max_size=3),
    st.lists(st.lists(st.sampled_from([*PREFIXES, *SOURCES]), min_size=1, max_size=3), max_size=2),
)
def test_finds_what_a_look_at_each_row_finds(batches: list[list[str]], sets: list[list[str]]) -> None:
    """The datagram found is the first whose source is in every set, with the place where it stood."""
    expected = [
        (str(ip_address(source)), str(place).encode().hex())
        for sources in batches
        for place, source in enumerate(sources)
        if all(covers(tuple(each), source) for each in sets)
    ]
    found = first([message(sources) for sources in batches], *sets, seconds=60 if expected else 0.01)
    assert ([(found["address"], found["hex"])] if found else []) == expected[:1]


def test_shows_the_beginning_of_a_long_datagram() -> None:
    """A datagram is shown up to a limit, and its whole length is told."""
    batch = make_batch([b"short", b"x" * 5000], ["192.0.2.1", "192.0.2.2"])
    found = first([Message("", make_envelope(), Datagrams("messages", 1), batch)], ["192.0.2.2"])
    assert found
    assert (found["length"], found["hex"], found["port"]) == (5000, "78" * MAX_SHOWN, 514)


def test_others_have_their_turn_however_many_messages_come() -> None:
    """A bus that always has another message neither outlasts the deadline nor keeps others from their turns."""
    taken = turns = 0

    def receive() -> Message:
        nonlocal taken
        taken += 1
        return message(["192.0.2.1"])

    async def both() -> object:
        nonlocal turns
        search = asyncio.create_task(first_datagram(receive, matching([["192.0.2.9"]]), 0.05))
        while not search.done():
            turns += 1
            await asyncio.sleep(0)
        return await search

    assert asyncio.run(both()) is None
    assert taken
    assert turns >= taken

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ingest import octet_count_framing
from services.ingest.octet_count_framing import MAX_PENDING, Framing
from shared.datagrams.limits import MAX_DATAGRAM

Outcome = tuple[list[bytes], bool, bool]


def messages_of(*pieces: bytes) -> Outcome:
    """Every message of a connection that brings these pieces and closes; whether it was overlong, or cut off."""
    framing, messages = Framing(), []
    for piece in pieces:
        messages += framing.feed(piece)
        if framing.overlong:
            break
    messages += framing.finish()
    return messages, framing.overlong, framing.unfinished and not framing.overlong


def counted(message: bytes) -> bytes:
    """A message under its octet count."""
    return b"%d %s" % (len(message), message)


@pytest.mark.parametrize(
    ("stream", "messages"),
    [
        (b"", []),
        (b"Hello", [b"Hello"]),
        (b"one\ntwo\n", [b"one", b"two"]),
        (b"one\r\ntwo\r\n", [b"one", b"two"]),
        (b"one\ntwo", [b"one", b"two"]),
        (b"\n\r\n\n", []),
        (b"\r\r\n", [b"\r"]),
        (b"a\rb\n", [b"a\rb"]),
        (b"a\0b\n", [b"a", b"b"]),
        (b"<34>one\0<34>two\0", [b"<34>one", b"<34>two"]),
        (
            b'{"short_message":"one"}\0{"short_message":"two"}\0',
            [b'{"short_message":"one"}', b'{"short_message":"two"}'],
        ),
        (b"one\n\0two\r\n\0\0", [b"one", b"two"]),
        (b"one\0two", [b"one", b"two"]),
        (b"7 <34>one\0<34>two\08 <34>four", [b"<34>one", b"<34>two", b"<34>four"]),
        (counted(b"<34>one\0two\0") + b"three\0", [b"<34>one\0two\0", b"three"]),
        (counted(b"<34>one\ntwo") + counted(b"<13>\r\n"), [b"<34>one\ntwo", b"<13>\r\n"]),
        (counted(b"<34>one") + b"two\n" + counted(b"<35>three"), [b"<34>one", b"two", b"<35>three"]),
        (b"7 <34>one\n8 <34>four", [b"<34>one", b"<34>four"]),
        (b"12 monkeys\n", [b"12 monkeys"]),
        (b"42\n", [b"42"]),
        (b"42", [b"42"]),
        (b"42 ", [b"42 "]),
        (b"42 \n", [b"42 "]),
        (b"0 <34>\n", [b"0 <34>"]),
        (b"007 <34>one\n", [b"007 <34>one"]),
        (b"1234567890 <34>\n", [b"1234567890 <34>"]),
        (b"-5 <34>\n", [b"-5 <34>"]),
        (b" 5 <34>\n", [b" 5 <34>"]),
        (b"5  <34>\n", [b"5  <34>"]),
        (b"1 <", [b"<"]),
    ],
)
def test_messages_end_where_they_should(stream: bytes, messages: list[bytes]) -> None:
    """A message ends at a newline or NUL, at its octet count, or at close; a number before anything but `<` is text."""
    assert messages_of(stream) == (messages, False, False)


@pytest.mark.parametrize("stream", [b"9 <34>four", b"9 <", b"65507 <" + bytes(65505)])
def test_message_that_ends_before_its_count_is_cut_off(stream: bytes) -> None:
    """The part of a counted message that came is no message; it is told as cut off, however long it was to be."""
    assert messages_of(b"one\n" + stream) == ([b"one"], False, True)


@pytest.mark.parametrize(
    "stream",
    [
        b"x" * MAX_DATAGRAM + b"\n",
        b"x" * MAX_DATAGRAM + b"\r\n",
        b"x" * MAX_DATAGRAM + b"\0",
        b"x" * MAX_DATAGRAM,
        counted(b"<" + bytes(MAX_DATAGRAM - 1)),
    ],
)
def test_longest_message_is_whole(stream: bytes) -> None:
    """A message of 65,507 bytes is taken, however it is ended, and so is what follows it."""
    (message,), overlong, cut = messages_of(stream)
    assert len(message) == MAX_DATAGRAM
    assert not overlong
    assert not cut
    ended = stream if stream[-1:] in (b"\n", b"\0") or stream[:1] == b"6" else stream + b"\n"
    assert messages_of(ended, b"next")[0][1:] == [b"next"]


@pytest.mark.parametrize(
    "stream",
    [
        b"x" * (MAX_DATAGRAM + 1) + b"\n",
        b"x" * (MAX_DATAGRAM + 1) + b"\r\n",
        b"x" * (MAX_DATAGRAM + 1) + b"\0",
        b"x" * (MAX_DATAGRAM + 1),
        b"x" * (MAX_PENDING + 1),
        b"x" * 1_000_000,
        b"65508 <",
        b"999999999 <34>one",
        b"65508 <" + bytes(65507),
    ],
)
def test_longer_message_ends_the_connection(stream: bytes) -> None:
    """Messages before one that fits no datagram are taken; it is not, nor are those behind it."""
    assert messages_of(b"one\n" + stream, b"\nnext\n") == ([b"one"], True, False)


@pytest.mark.parametrize(
    ("pieces", "lost_bytes", "lost_behind"),
    [
        ([b"one\n", b"x" * (MAX_DATAGRAM + 1), b"\n"], MAX_DATAGRAM + 1, 0),
        ([b"x" * (MAX_DATAGRAM + 1) + b"\ntwo\nthree\0fo"], MAX_DATAGRAM + 1 + 8 + 2, 3),
        ([b"x" * MAX_PENDING, b"x" * 100], MAX_PENDING + 100, 0),
        ([b"65508 <34>one"], 7, 0),
    ],
)
def test_what_an_overlong_message_costs_is_known(pieces: list[bytes], lost_bytes: int, lost_behind: int) -> None:
    """Bytes and messages that are lost with an overlong message are counted, as far as they were read."""
    framing = Framing()
    for piece in pieces:
        framing.feed(piece)
    framing.finish()
    assert (framing.overlong, framing.lost_bytes, framing.lost_behind) == (True, lost_bytes, lost_behind)


def test_what_waits_for_its_end_is_bounded() -> None:
    """A connection that never ends a message is found overlong as soon as no message can come of it."""
    framing, fed = Framing(), 0
    while not framing.overlong:
        assert framing.feed(b"x" * 1000) == []
        fed += 1000
    assert fed <= MAX_PENDING + 1000


class Looked:
    """A pattern that notes the bytes that it is given to look at."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self.pattern = pattern
        self.bytes = 0

    def search(self, data: bytes, at: int = 0) -> re.Match[bytes] | None:
        """Look for it from a place on."""
        found = self.pattern.search(data, at)
        self.bytes += (found.end() if found else len(data)) - at
        return found

    def match(self, data: bytes, at: int = 0) -> re.Match[bytes] | None:
        """Look for it at a place: it has at most eleven bytes, or as many as it finds."""
        found = self.pattern.match(data, at)
        self.bytes += max(11, len(found[0]) if found else 0)
        return found

    fullmatch = match


@pytest.mark.parametrize(
    "stream",
    [
        b"1" + b"a" * 20_000,
        b"20000 <" + b"a\n" * 9_999 + b"b",
        b"1 <" + b"\n" * 20_000,
        b"1 <" + b"\r\n" * 10_000,
        b"a\n" * 10_000,
        b"1 <\n" + b"a\n" * 10_000,
        b"a\n1 <" * 4_000,
    ],
)
@pytest.mark.parametrize("size", [1, 700, 20_100])
def test_no_byte_is_looked_at_often(stream: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long message, in many pieces or with many messages behind, costs in each piece what that has of new bytes."""
    patterns = []
    for name in ("OCTET_COUNT", "PERHAPS_COUNT", "NEXT_COUNT", "END", "EMPTY"):
        patterns.append(Looked(getattr(octet_count_framing, name)))
        monkeypatch.setattr(octet_count_framing, name, patterns[-1])
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    messages_of(*pieces)
    assert sum(each.bytes for each in patterns) < 50 * (len(stream) + len(pieces))


lines = st.binary(min_size=1, max_size=30).filter(lambda line: not {10, 0} & {*line} and line[-1:] != b"\r")
texts = lines.filter(lambda line: not line[:1].isdigit())
syslogs = st.binary(max_size=30).map(lambda rest: b"<34>" + rest)
frames = st.one_of(
    texts.map(lambda text: (text + b"\n", text)),
    texts.map(lambda text: (text + b"\r\n", text)),
    texts.map(lambda text: (text + b"\0", text)),
    syslogs.map(lambda text: (counted(text), text)),
)


def split(stream: bytes, at: list[int]) -> list[bytes]:
    """The stream in pieces, cut at these places."""
    edges = [0, *sorted(min(each, len(stream)) for each in at), len(stream)]
    return [stream[start:stop] for start, stop in pairwise(edges)]


@settings(max_examples=75)
@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 300), max_size=12))
def test_messages_are_those_that_were_framed(framed: list[tuple[bytes, bytes]], at: list[int]) -> None:
    """Messages under any mix of framings, split anywhere, come out as they were."""
    stream = b"".join(frame for frame, _ in framed)
    assert messages_of(*split(stream, at)) == ([message for _, message in framed], False, False)


fragments = st.sampled_from(
    [b"\n", b"\0", b"\r", b"\r\n", b"1", b"12", b"7 ", b"3 <", b"<", b" ", b"0", b"99999999", b"Hello"]
)


@settings(max_examples=150)
@given(st.lists(fragments | st.binary(max_size=5), max_size=20).map(b"".join), st.lists(st.integers(0, 100)))
def test_however_it_is_split_it_is_the_same(stream: bytes, at: list[int]) -> None:
    """Arbitrary bytes never raise, and how they are split into reads changes nothing."""
    outcome = messages_of(*split(stream, at))
    assert outcome == messages_of(stream)
    assert all(0 < len(message) <= MAX_DATAGRAM for message in outcome[0])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 65500, 65506, 65507, 65508, 65520]), st.booleans()), max_size=4),
    st.lists(st.integers(0, 200_000), max_size=6),
    st.booleans(),
)
def test_long_messages_are_the_same_however_they_are_split(
    sizes: list[tuple[int, bool]], at: list[int], ended: bool
) -> None:
    """Around the longest size too, what is taken does not depend on where a read ended."""
    stream = b"".join(counted(b"<" + bytes(size)) if count else b"x" * size + b"\n" for size, count in sizes)
    stream = stream if ended else stream[:-1]
    assert messages_of(*split(stream, at)) == messages_of(stream)

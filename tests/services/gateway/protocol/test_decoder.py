import itertools
import json
from collections.abc import Iterable
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.protocol.client_names import parse_name
from services.gateway.protocol.decoder import MAX_LINE, Decoder, parse_request
from services.gateway.protocol.requests import (
    Confirm,
    Leave,
    ListClients,
    ListStreams,
    Mac,
    Octets,
    Register,
    Release,
    RequestError,
    SignUp,
    Transmit,
    WatchClients,
    Withhold,
)

Outcome = tuple[object, ...]


def take(reads: Iterable[bytes]) -> list[Outcome]:
    """Everything a decoder makes of these reads and the end after them."""
    decoder = Decoder()
    outcomes: list[Outcome] = []
    for read in [*reads, b""]:
        if read:
            decoder.feed(read)
        else:
            decoder.end()
        outcomes += drain(decoder)
    return outcomes


def drain(decoder: Decoder) -> list[Outcome]:
    """Everything a decoder has now."""
    outcomes: list[Outcome] = []
    while True:
        try:
            request = decoder.next_request()
        except RequestError as refused:
            outcomes.append((refused.error, str(refused), refused.id, refused.closes))
        else:
            if request is None:
                return outcomes
            outcomes.append((request,))


def refused(line: bytes) -> RequestError:
    """The refusal that a line meets."""
    with pytest.raises(RequestError) as caught:
        parse_request(line)
    return caught.value


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes as reads that end at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges) if start < stop]


lines = st.one_of(
    st.binary(max_size=80),
    st.sampled_from(
        [
            b'{"op":"withhold","name":"a"}',
            b'{"op":"list"}',
            b'{"op":"streams","id":1}',
            b'{"op":"nope","id":"a"}',
            b"{",
            b'{"op":"list"',
            b"\r",
            b"\n\r\n\n",
        ]
    ),
    st.dictionaries(
        st.sampled_from(["op", "name", "port", "id", "x"]), st.text("ab\0é{", max_size=5) | st.integers() | st.none()
    ).map(lambda fields: json.dumps(fields).encode()),
)


@given(st.lists(lines, max_size=8), st.lists(st.integers(min_value=0), max_size=8))
def test_splits_change_nothing(parts: list[bytes], places: list[int]) -> None:
    """JSON lines decode to the same requests and refusals however they are cut into reads."""
    data = b"\n".join([b'{"op":"list"}', *parts])
    assert take(cut(data, places)) == take([data])


@given(st.lists(st.binary(min_size=1)))
def test_nothing_but_a_refusal_is_raised(reads: list[bytes]) -> None:
    """A decoder returns requests or refuses in known words, whatever the bytes and the reads."""
    for outcome in take(reads):
        assert outcome[0] in ("bad_request", "bad_name", "too_long") or isinstance(outcome[0], SignUp)


def test_first_byte_decides() -> None:
    """`{` begins JSON lines; anything else is a name, which is what the first read brings and no more."""
    assert take([b'{"op":"list"}\n{"op":"streams"}\n']) == [(ListClients(),), (ListStreams(),)]
    assert take([b"router", b"-7"]) == [(SignUp("router"),)]
    assert take([b"router\r\n"]) == [(SignUp("router"),)]
    assert take([]) == []


def test_last_line_needs_no_newline() -> None:
    """The bytes that are left when the client sends no more are a line."""
    assert take([b'{"op":"list",', b'"id":7}']) == [(ListClients(id=7),)]


def test_blank_lines_are_skipped_in_one_step() -> None:
    """A read of nothing but line ends costs no more than one request."""
    decoder = Decoder()
    decoder.feed(b'{"op":"list"}\n' + b"\r\n\n" * 20_000 + b'{"op":"streams"}\n')
    with patch.object(Decoder, "_next_data", autospec=True, side_effect=Decoder._next_data) as steps:
        assert drain(decoder) == [(ListClients(),), (ListStreams(),)]
    assert steps.call_count == 3


@pytest.mark.parametrize("size", [1, 255])
def test_name_of_any_allowed_length(size: int) -> None:
    """A name has 1 to 255 bytes."""
    assert parse_name(b"n" * size) == "n" * size
    assert parse_name("é".encode() + b"\r\n") == "é"


@pytest.mark.parametrize(
    "data",
    [b"\r\n", b"n" * 256, b"\xff\xfe", "a".encode("utf-16"), b"a\0b", b"a\x1b[31m", b"a\nb", "\x9b".encode(), b"\x7f"],
)
def test_bad_name_closes(data: bytes) -> None:
    """Empty, too long, not UTF-8 or with control characters: `bad_name`, and the connection ends."""
    with pytest.raises(RequestError) as caught:
        parse_name(data)
    assert (caught.value.error, caught.value.closes) == ("bad_name", True)


@pytest.mark.parametrize("data", [b"POST / HTTP/1.1\r\nHost: x\r\n\r\n{}", b"GET /x HTTP/1.0\r\n", b"PRI * HTTP/2.0"])
def test_http_is_no_name(data: bytes) -> None:
    """A browser's request is refused, counted on its own, and what follows in it is not read."""
    with pytest.raises(RequestError) as caught:
        parse_name(data)
    assert caught.value.cross_protocol
    assert len(take([data, b'{"op":"list"}\n'])) == 1


@pytest.mark.parametrize("before", [b" ", b"\r\n", "\N{ZERO WIDTH NO-BREAK SPACE}".encode()])
def test_json_behind_something_else_is_no_name(before: bytes) -> None:
    """A JSON line behind white space or a byte order mark signs nobody up under it."""
    (outcome,) = take([before + b'{"op":"list"}\n'])
    assert outcome[0] == "bad_request"
    assert outcome[1] == "a JSON line begins with `{` as its first byte; send nothing before it"


def test_too_long_a_line() -> None:
    """A line of 64 KiB is read; a byte more is `too_long` and the end, with or without its newline."""
    line = b'{"op":"list"' + b" " * (MAX_LINE - 13) + b"}"
    assert len(line) == MAX_LINE
    assert take([line + b"\n"]) == [(ListClients(),)]
    for data in (line + b" \n", line + b" ", line + b" \n" + b'{"op":"list"}\n'):
        assert [outcome[0] for outcome in take([data])] == ["too_long"]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"[]",
        b"{",
        b'{"op":"list"} x',
        b'{"op":"list","id":NaN}',
        b'{"op":"register","name":"a","ttl":Infinity}',
        b'{"op":"list","id":%s}' % (b"9" * 5000),
        b'\xef\xbb\xbf{"op":"list"}',
        '{"op":"list"}'.encode("utf-16-le"),
        b'{"op":"register","name":"\xff"}',
        b'{"op":"register","name":"\\ud800"}',
        b'{"op":"list","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"op":"list","x":' + b'{"a":' * 10_000,
        b'{"op":' + b"[" * 60_000,
        b'{"op":"leave","name":"a","name":"b","generation":1}',
        b'{"op":"list","id":1,"\\u0069d":1}',
        b'{"op":"list","op":"streams"}',
        b'{"op":"list","x":1,"x":2}',
    ],
)
def test_what_is_no_object_closes(line: bytes) -> None:
    """A line that is not one JSON object in UTF-8, each field once and not too deep, is `bad_request` and the end."""
    assert (refused(line).error, refused(line).closes) == ("bad_request", True)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "true", '"6667"', "6667.0", "6667e0", "[]", "9" * 5000])
def test_port_is_a_whole_number(port: str) -> None:
    """A value that is no port is refused with a sentence, the `id` comes back and the connection stays."""
    error = refused(b'{"op":"register","name":"a","id":"x","port":%s}' % port.encode())
    assert (error.error, error.id, error.closes) == ("bad_request", "x", False)
    assert str(error) == "port: expected a whole number from 1 to 65535"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"op": "nope"}, "unknown op"),
        ({}, "unknown op"),
        ({"op": ["list"]}, "unknown op"),
        ({"op": "list", "x": 1}, "no field `x`"),
        ({"op": "register"}, "name is missing"),
        ({"op": "register", "name": 1}, "name: expected a string"),
        ({"op": "register", "name": "a", "sample": 0}, "sample: expected"),
        ({"op": "register", "name": "a", "from": ["x"] * 65}, "from: expected"),
        ({"op": "register", "name": "a", "streams": ["x"] * 65}, "streams: expected"),
        ({"op": "register", "name": "a", "group": "x" * 65}, "group: expected"),
        ({"op": "register", "name": "a", "group": "x\n"}, "of at most 64 characters, without control characters"),
        ({"op": "register", "name": "a", "source": "own"}, "source: expected"),
        ({"op": "register", "name": "a", "hop_limit": 0}, "hop_limit: expected a whole number from 1 to 255"),
        ({"op": "register", "name": "a", "hop_limit": 256}, "hop_limit: expected a whole number from 1 to 255"),
        ({"op": "register", "name": "a", "dscp": 64}, "dscp: expected a whole number from 0 to 63"),
        ({"op": "register", "name": "a", "ttl": -1}, "ttl: expected"),
        ({"op": "register", "name": "a", "ttl": 1e308}, "ttl: expected"),
        ({"op": "withhold"}, "name is missing"),
        ({"op": "withhold", "name": "a", "reason": "x" * 201}, "reason: expected a string of at most 200 characters"),
        ({"op": "withhold", "name": "a", "reason": "\x1b[31m"}, "characters, without control characters"),
        ({"op": "withhold", "name": "a", "generation": 1}, "no field `generation`"),
        ({"op": "release", "name": "a", "reason": "x"}, "no field `reason`"),
        ({"op": "leave", "name": "a", "generation": "1"}, "generation: expected"),
        ({"op": "renew", "name": "a", "generation": 1.0}, "generation: expected"),
        ({"op": "renew", "name": "a", "generation": True}, "generation: expected"),
        ({"op": "renew", "name": "a", "generation": 10**4000}, "generation: expected"),
        ({"op": "list", "version": 2}, "no field `version`"),
        ({"op": "watch", "revision": -1}, "revision: expected"),
        ({"op": "watch", "epoch": 65 * "e"}, "epoch: expected"),
        ({"op": "confirm", "name": "a"}, "nonce is missing"),
        ({"op": "list", "id": True}, "id: expected"),
        ({"op": "list", "id": 2**64}, "id: expected"),
    ],
)
def test_refusal_says_what_was_expected(fields: dict[str, object], sentence: str) -> None:
    """A JSON object that is no request of ours is `bad_request` with a sentence, and the connection stays."""
    error = refused(json.dumps(fields).encode())
    assert (error.error, error.closes) == ("bad_request", False)
    assert sentence in str(error)


def test_bad_name_in_json_keeps_the_connection() -> None:
    """A name is held to the same rules in JSON, but the next line may be better."""
    for name in ("", "a\0b", "n" * 256, "é" * 128):
        error = refused(json.dumps({"op": "register", "name": name, "id": 5}).encode())
        assert (error.error, error.id, error.closes) == ("bad_name", 5, False)


def test_requests_are_typed() -> None:
    """Fields arrive as the protocol names them."""
    register = parse_request(b'{"op":"register","name":"s","streams":["*"],"port":9,"from":["10.0.0.0/8"],"ttl":5}\r')
    assert register == Register(name="s", streams=("*",), port=9, prefixes=("10.0.0.0/8",), ttl=5.0)
    assert parse_request(b'{"op":"leave","name":"s","generation":3,"id":"q"}') == Leave(name="s", generation=3, id="q")
    assert parse_request(b'{"op":"withhold","name":"s","reason":"r"}') == Withhold(name="s", reason="r")
    assert parse_request(b'{"op":"release","name":"s"}') == Release(name="s")
    assert parse_request(b'{"op":"watch","revision":7,"epoch":"e"}') == WatchClients(revision=7, epoch="e")
    assert parse_request(b'{"op":"confirm","name":"s","nonce":"n"}') == Confirm(name="s", nonce="n")


DOCUMENTED = bytes.fromhex("010203040506 010203040506 0801") + b"[" * 30 + b"PAYLOAD" + b"]" * 30
PARTS = {
    "destination": "01:02:03:04:05:06",
    "source": "01-02-03-04-05-06",
    "ethertype": "0x0801",
    "payload": DOCUMENTED[14:].hex(),
    "checksum": "0x1a2b3c4d",
}


def transmit(**fields: object) -> Transmit:
    """The request in a line with these fields."""
    request = parse_request(json.dumps({"op": "transmit", "interface": "eth1", **fields}).encode())
    assert isinstance(request, Transmit)
    return request


def test_frame_whole_or_in_parts() -> None:
    """A frame is given whole, or as what it is made of, and either way is the same bytes."""
    frame = DOCUMENTED + b"\x1a\x2b\x3c\x4d"
    assert transmit(frame=frame.hex()).whole == transmit(frame=frame.hex(":")).whole == frame
    assert transmit(**PARTS).whole == transmit(**PARTS | {"ethertype": 2049}).whole == frame
    assert transmit(**PARTS | {"checksum": None}).whole == DOCUMENTED
    assert transmit(**PARTS, own_fcs=True).whole == frame
    assert transmit(**PARTS | {"payload": "", "checksum": ""}).whole == DOCUMENTED[:14]


def test_transmit_is_typed() -> None:
    """Fields arrive as what they stand for, and the frames take as long as their pace says."""
    request = transmit(frame="00" * 14, count=21, per_second=10)
    assert request == Transmit(interface="eth1", frame=Octets(14), count=21, per_second=10.0)
    assert request.seconds == 2.0
    assert transmit(**PARTS).source == Mac(range(1, 7))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "destination is missing: expected a MAC address such as 01:02:03:04:05:06"),
        (PARTS | {"payload": None}, "payload is missing: expected hexadecimal digits, two a byte"),
        (PARTS | {"interface": None}, "interface: expected the name of an interface"),
        (PARTS | {"interface": ""}, "interface: expected the name of an interface"),
        (PARTS | {"interface": "x" * 16}, "interface: expected the name of an interface, at most 15 characters"),
        (PARTS | {"source": "relay"}, "source: expected a MAC address such as 01:02:03:04:05:06"),
        (PARTS | {"destination": "01:02:03:04:05"}, "destination: expected a MAC address"),
        (PARTS | {"payload": "0g"}, "payload: expected hexadecimal digits, two a byte"),
        (PARTS | {"payload": 10}, "payload: expected hexadecimal digits, two a byte"),
        (PARTS | {"checksum": "123"}, "checksum: expected hexadecimal digits, two a byte"),
        (PARTS | {"ethertype": True}, 'ethertype: expected a number or its text, such as "0x0801"'),
        (PARTS | {"ethertype": 65536}, "65536 is not an ethertype; expected a number such as 0x0801"),
        (PARTS | {"ethertype": "IPv4"}, "'IPv4' is not an ethertype"),
        (PARTS | {"frame": "00" * 14}, "frame: expected either the whole frame, or its parts"),
        ({"frame": "00" * 14, "checksum": ""}, "frame: expected either the whole frame, or its parts"),
        ({"frame": "00" * 13}, "a frame of 13 bytes; expected from 14 to"),
        ({"frame": "00" * 17, "own_fcs": True}, "a frame of 17 bytes; expected from 18 to"),
        (PARTS | {"checksum": "00", "own_fcs": True}, "a checksum of 1 bytes; expected 4"),
        (PARTS | {"count": 0}, "count: expected a whole number from 1 to 1000000"),
        (PARTS | {"count": 1_000_001}, "count: expected a whole number from 1 to 1000000"),
        (PARTS | {"per_second": -1}, "per_second: expected frames a second up to 1000000, or 0"),
        (PARTS | {"per_second": 1_000_001}, "per_second: expected frames a second up to 1000000, or 0"),
        (PARTS | {"count": 62, "per_second": 1}, "count: 62 frames take 61 s at that pace; expected at most 60 s"),
        (PARTS | {"own_fcs": 1}, "own_fcs: expected true or false"),
        (PARTS | {"name": "a"}, "no field `name`"),
    ],
)
def test_transmit_that_makes_no_frame(fields: dict[str, object], sentence: str) -> None:
    """A request that makes no frame is `bad_request`, and the sentence names the field and what was expected."""
    error = refused(json.dumps({"op": "transmit", "interface": "eth1", "id": 4} | fields).encode())
    assert (error.error, error.id, error.closes) == ("bad_request", 4, False)
    assert sentence in str(error)


texts = st.text("0123456789abcdefxX:- g\n\u0664", max_size=40)


@given(
    st.dictionaries(
        st.sampled_from(["frame", *PARTS, "count", "per_second", "own_fcs"]),
        st.one_of(texts, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()),
    )
)
def test_any_fields_make_a_frame_or_are_refused(fields: dict[str, object]) -> None:
    """The fields of a request make a frame that can be sent, or are `bad_request`, whatever they hold."""
    (outcome,) = take([json.dumps({"op": "transmit", "interface": "eth1"} | PARTS | fields).encode()])
    if isinstance(outcome[0], Transmit):
        assert 14 <= len(outcome[0].whole) <= 65_554
        assert outcome[0].seconds <= 60
    else:
        error, _, _, closes = outcome
        assert (error, closes) == ("bad_request", False)


@given(st.binary(min_size=14, max_size=200), st.sampled_from(["", "0x"]), st.sampled_from(["", " ", ":"]))
def test_any_frame_goes_through_hexadecimal(frame: bytes, before: str, between: str) -> None:
    """Every frame can be written, and is read back to the byte."""
    assert transmit(frame=before + (frame.hex(between) if between else frame.hex())).whole == frame

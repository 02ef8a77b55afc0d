from collections.abc import Callable
from typing import Annotated, Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from shared.bus.bodies.packing import MAX_ITEMS, MAX_MAPS, MAX_STRING, pack, unpack


class Inner(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    size: int = 3


class Outer(msgspec.Struct, array_like=True, frozen=True):
    number: Annotated[int, Meta(ge=0)] = 0
    text: str = ""
    data: bytes = b""
    share: float = 0.0
    is_own: bool = False
    inner: tuple[Inner, ...] = ()
    counts: dict[str, dict[str, int]] = {}
    anything: Any = None


texts = st.text(max_size=300)
outers = st.builds(
    Outer,
    st.integers(0, 2**64 - 1),
    texts,
    st.binary(max_size=300),
    st.floats(allow_nan=False),
    st.booleans(),
    st.lists(st.builds(Inner, texts, st.integers(-(2**63), 2**63))).map(tuple),
    st.dictionaries(texts, st.dictionaries(texts, st.integers(-(2**63), 2**63))),
)


@given(outers)
def test_structs_come_back(outer: Outer) -> None:
    """Structs, with others in them, are packed as msgspec's own msgpack packs them, and unpacked from any buffer."""
    part = pack(outer)
    assert part == msgspec.msgpack.encode(outer)
    assert unpack(part, Outer) == unpack(memoryview(part), Outer) == outer


def body(**changes: object) -> bytes:
    """An `Outer` with some fields changed to whatever."""
    fields: dict[str, object] = msgspec.structs.asdict(Outer()) | changes
    packed: bytes = msgpack.packb(list(fields.values()))
    return packed


def is_refused(part: bytes) -> bool:
    """Return whether nothing is unpacked from a part."""
    try:
        unpack(part, Outer)
    except (ValueError, msgspec.MsgspecError) as error:
        return bool(str(error) or type(error).__name__)
    return False


@pytest.mark.parametrize(
    "changes",
    [
        {"number": True},
        {"number": 1.0},
        {"number": -1},
        {"number": "1"},
        {"text": b"a"},
        {"text": None},
        {"data": "YQ=="},
        {"is_own": 1},
        {"share": "1"},
        {"inner": [["a", 1]]},
        {"inner": {"name": "a"}},
        {"inner": [{b"name": "a"}]},
        {"counts": {"a": {"b": True}}},
        {"counts": {"a": {b"b": 1}}},
    ],
)
def test_no_value_passes_for_another_type(changes: dict[str, object]) -> None:
    """A value of another type than a field's is refused, also where it could be converted."""
    assert not is_refused(body())
    assert is_refused(body(**changes))


@pytest.mark.parametrize(
    ("most", "values"),
    [
        (MAX_STRING, lambda size: b"a" * size),
        (MAX_STRING, lambda size: "a" * size),
        (MAX_ITEMS, lambda size: [None] * size),
        (MAX_ITEMS, lambda size: {str(number): 1 for number in range(size)}),
        (MAX_MAPS - 1, lambda size: [[{}] * (size // 2), [{}] * (size - size // 2)]),
    ],
)
def test_limits_are_exact(most: int, values: Callable[[int], object]) -> None:
    """The largest amount that a limit allows passes, in a field that takes anything, and one more is refused."""
    assert not is_refused(body(anything=values(most)))
    assert is_refused(body(anything=values(most + 1)))


@pytest.mark.parametrize("extension", [b"\xc7\x00\x05", b"\xc7\x00\xff", b"\xd4\x05\x00", b"\xd6\xff\x00\x00\x00\x00"])
def test_extension_types_are_refused(extension: bytes) -> None:
    """Extension types are refused in a field that takes anything, with data or without, timestamps too."""
    assert is_refused(body()[:-1] + extension)


@pytest.mark.parametrize(
    "part",
    [
        b"",
        body() + b"\xc0",
        body()[:-1],
        body()[:-1] + b"\xc1",
        body()[:-1] + b"\xa1\xff",
        body()[:-1] + b"\x81\x01\x01",
        body()[:-1] + b"\x81\xc0\x01",
        body()[:-1] + b"\x91" * 100_000 + b"\x90",
        body()[:-1] + b"\x81\xa0" * 100_000 + b"\x90",
    ],
)
def test_what_is_not_one_value_is_refused(part: bytes) -> None:
    """Nothing, trailing bytes, a part cut short, a byte that begins nothing, wrong text, keys and depth are refused."""
    assert is_refused(part)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_else(part: bytes) -> None:
    """The bytes are a struct, or refused by ValueError or MsgspecError."""
    is_refused(part)
    is_refused(body()[:-1] + part)

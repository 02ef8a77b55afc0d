"""Envelopes and bodies as msgpack: structs are packed, and bytes unpacked within limits and proven to be a struct.

The `msgpack` package knows the format and its limits, msgspec which values make a valid struct.
"""

from typing import Any, Final, NoReturn, TypeVar

import msgpack
import msgspec

MAX_STRING: Final = 1 << 17
"""Bytes of a string: the longest is a frame of 65,554."""
MAX_ITEMS: Final = 1 << 15
"""Items of an array or map: the longest are the accounts of a piece of a status, 16,384 at most."""
MAX_MAPS: Final = 1 << 15
"""Maps in a part, however they are nested: a map of three bytes takes 200 bytes of memory."""

T = TypeVar("T", bound=msgspec.Struct)


class _MapCounter:
    """Counts the maps of one part: bounds for each map alone would not bound a tree of them."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MAX_MAPS

    def __call__(self, found: dict[object, object]) -> dict[object, object]:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {MAX_MAPS} maps")
        return found


def _refuse_extension(code: int, _data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")  # an extension without data passes `max_ext_len`


def _fields(struct: Any) -> object:
    """Return a struct as values that msgpack knows; it hands structs among them in here again."""
    is_array = struct.__struct_config__.array_like
    return msgspec.structs.astuple(struct) if is_array else msgspec.to_builtins(struct)


_packer: Final = msgpack.Packer(default=_fields)


def pack(struct: msgspec.Struct) -> bytes:
    """Return a struct's fields, as an array where it is array-like, else as a map."""
    packed: bytes = _packer.pack(struct)
    return packed


def pack_values(values: tuple[object, ...]) -> bytes:
    """Return the first fields of an array-like struct as `pack` does, without those behind them."""
    packed: bytes = _packer.pack(values)
    return packed


def unpack(part: bytes | memoryview, kind: type[T]) -> T:
    """Return the struct in `part`, whose size the caller has bounded; ValueError or MsgspecError when there is none."""
    found = msgpack.unpackb(
        part,
        use_list=False,  # a tuple takes less memory
        raw=False,
        strict_map_key=True,
        object_hook=_MapCounter(),
        ext_hook=_refuse_extension,
        max_str_len=MAX_STRING,
        max_bin_len=MAX_STRING,
        max_array_len=MAX_ITEMS,
        max_map_len=MAX_ITEMS,
        max_ext_len=0,
    )
    return msgspec.convert(found, kind, builtin_types=(bytes,))  # bytes stay bytes; text is never taken for them

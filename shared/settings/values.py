"""Kinds of values, which several settings have, and their checks. No I/O."""

from collections.abc import Callable, Iterable
from typing import Annotated, Final, Literal, TypeVar, get_args

from msgspec import Meta

T = TypeVar("T")
MAX_PORT: Final = 65_535

Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z",
        description="up to 64 letters, digits, and behind the first also . _ and -",
    ),
]
FullPath = Annotated[str, Meta(pattern="^[/$]", description="an absolute path, or one that begins with a variable")]
"""A path that is the same one for all services, wherever each was started."""
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Port = Annotated[int, Meta(ge=1, le=MAX_PORT)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Bytes = Annotated[int, Meta(ge=4096, le=1 << 30)]
Ceiling = Annotated[int, Meta(ge=67_108_864, le=1 << 40)]
"""Bytes of memory that a process may take; one that has nothing to do takes some 50 MB."""
Scope = Literal["list", "collect", "transmit", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
Ethertype = int | str
"""A number, or its text as in `"0x0801"`."""


def check_each(key: str, parse: Callable[[T], object], values: Iterable[T]) -> None:
    """Raise ValueError, with the key, when one of its values can't be parsed."""
    for value in values:
        try:
            parse(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


def leave_room(key: str, most: int, memory: int) -> None:
    """Raise ValueError when a setting may take over half of the memory that a process has."""
    if most > memory // 2:
        raise ValueError(
            f"{key}: may take {most} bytes, over half of memory, {memory}; lower the one or raise the other"
        )


def parse_ethertype(value: Ethertype) -> int:
    """Return the number of an ethertype. ValueError when it is none.

    >>> parse_ethertype("0x0801"), parse_ethertype(2049)
    (2049, 2049)
    """
    try:
        number = int(value, 0) if isinstance(value, str) else value
    except ValueError:
        number = -1
    if not 0 <= number <= 0xFFFF:
        raise ValueError(f"{value!r} is not an ethertype; expected a number such as 0x0801")
    return number

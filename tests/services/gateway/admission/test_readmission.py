import errno
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.peer import Peer
from services.gateway.admission.readmission import Readmission, find_excess
from services.gateway.admission.rights import Rights
from services.gateway.admission.tokens import Tokens
from services.gateway.registry.entry import Origin
from shared.client import Client
from shared.settings.entries import Token
from shared.settings.own_listeners import OwnListeners
from tests.services.gateway.table import HERE, Table

RED = Peer(0, "192.0.2.7", 4000, Rights("red"))
"""As a restart leaves it: of its rights there is the holder alone."""


def token(**more: Any) -> Token:
    """The token of red."""
    return Token(**{"name": "red", "hash": "sha256:" + 64 * "0", "scopes": ("collect",)} | more)


def excess(
    tokens: list[Token],
    *streams: str,
    peer: Peer = RED,
    address: str = RED.address,
    proven: bool = False,
    origin: Origin = Origin.JSON,
    allowed: tuple[str, ...] = (),
) -> tuple[bool, tuple[str, ...]]:
    """Return whether an entry is removed, and the streams that it keeps."""
    table = Table()
    table.grant(Client("c", 0, address, 9, streams=streams), peer, origin, ttl=5, proven=proven)
    destinations = Destinations(["a", "b"], OwnListeners(()), _no, _no, allowed)
    found = find_excess(table.entries(), Tokens(tokens), destinations)
    before = next(iter(table.entries())).client
    table.expel(found.removed)
    table.narrow(found.narrowed)
    left = table.find("c")
    assert left is None or (left.client.generation, left.ttl) == (before.generation, 5)
    return left is None, left.client.streams if left else ()


_no: Callable[[str], bool] = {""}.__contains__


def test_what_is_allowed_stays() -> None:
    """An entry that its token, its proof, or its place on this host allows is left as it is."""
    assert excess([token()], "a", "*") == (False, ("a", "*"))
    assert excess([token(scopes=("admin",))]) == (False, ())
    assert excess([token(destinations=("192.0.2.0/24",))], "a", address="192.0.2.9") == (False, ("a",))
    assert excess([token()], "a", address="192.0.2.9", allowed=("192.0.2.9/32",)) == (False, ("a",))
    assert excess([token()], "a", address="192.0.2.9", proven=True) == (False, ("a",))
    assert excess([], "a", peer=HERE, address="127.0.0.3") == (False, ("a",))
    assert excess([], "a", peer=HERE, address="192.0.2.9", origin=Origin.SETTINGS) == (False, ("a",))


@pytest.mark.parametrize(
    ("tokens", "more"),
    [
        ([], {}),
        ([token(name="blue")], {"proven": True}),
        ([token(scopes=("list",))], {}),
        ([token(streams=("b",))], {}),
        ([token(destinations=("198.51.100.0/24",))], {"address": "192.0.2.9"}),
        ([token(scopes=("collect", "list"))], {"origin": Origin.NAMES}),  # names are not allowed to red
    ],
)
def test_what_is_not_allowed_goes(tokens: list[Token], more: dict[str, Any]) -> None:
    """An entry goes with its token, its scope, all of its streams, or the destination that needed no proof."""
    assert excess(tokens, "a", **more) == (True, ())


def test_an_entry_of_this_host_needs_its_destination_too() -> None:
    """An entry that [gateway] destinations allowed goes with that setting, for every holder."""
    assert excess([], "a", peer=HERE, address="192.0.2.9") == (True, ())


@pytest.mark.parametrize(("had", "keeps"), [(("a", "b"), ("b",)), (("*",), ("b", "c")), (("*", "a"), ("b", "c"))])
def test_streams_are_narrowed(had: tuple[str, ...], keeps: tuple[str, ...]) -> None:
    """An entry keeps the streams that its token still allows, its generation and its lease."""
    assert excess([token(streams=("b", "c"))], *had) == (False, keeps)


def test_what_can_not_be_taken_away_now_is_taken_later() -> None:
    """While the disk is full entries keep what a reload takes from them, and then lose it without another one."""
    full = [False]

    def keep(*_: object, **__: object) -> None:
        if full[0]:
            raise OSError(errno.EIO, "the registry can't be written to disk just now")

    table = Table(keep=keep)
    for name, streams in (("both", ("a", "b")), ("other", ("b",))):
        table.grant(Client(name, 0, RED.address, 9, streams=streams), RED, Origin.JSON)
    full[0], readmission = True, Readmission(table)
    tokens = Tokens([Token(name="red", certificate="red", scopes=("collect",), streams=("a",))])

    def keeps() -> dict[str, tuple[str, ...]]:
        return {entry.client.name: entry.client.streams for entry in table.entries()}

    readmission.begin(tokens, Destinations(["a", "b"], OwnListeners(()), lambda _: False, lambda _: False))
    readmission.check()
    assert keeps() == {"both": ("a", "b"), "other": ("b",)}
    full[0] = False
    with capture_logs() as logs:
        readmission.check()
        readmission.check()
    assert keeps() == {"both": ("a",)}
    assert [each["clients"] for each in logs] == [["other"], ["both"]]

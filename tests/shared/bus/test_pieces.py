from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shared.bus.bodies.packing import pack
from shared.bus.messages import RegistrySnapshot
from shared.bus.pieces import PIECE_SIZE, Assembler, cut
from shared.client import Client


@dataclass(frozen=True)
class Part:
    """A piece of the list that `key` names."""

    key: str
    piece: int
    pieces: int


def list_of(key: str, pieces: int) -> list[Part]:
    """All pieces of a list."""
    return [Part(key, number, pieces) for number in range(pieces)]


def completed(parts: list[Part]) -> list[str]:
    """The lists that these pieces complete, one after the other; each must be whole."""
    assembler, found = Assembler[Part](), []
    for part in parts:
        if (pieces := assembler.add(part.key, part)) is not None:
            assert pieces == list_of(part.key, part.pieces)
            found.append(part.key)
    return found


@given(st.lists(st.sampled_from([0, 1, PIECE_SIZE // 3, PIECE_SIZE // 2, PIECE_SIZE, PIECE_SIZE * 2])))
def test_pieces_keep_the_order_and_are_as_few_as_go(sizes: list[int]) -> None:
    """No piece is too long unless it is one item, none could have had the next item too, and one is always there."""
    pieces = cut(sizes, int)
    assert [size for piece in pieces for size in piece] == sizes
    assert all(sum(piece) <= PIECE_SIZE or len(piece) == 1 for piece in pieces)
    for piece, following in pairwise(pieces):
        assert sum(piece) + following[0] > PIECE_SIZE
    assert pieces == [[]] if not sizes else all(pieces)


def test_pieces_of_clients_stay_small() -> None:
    """Clients cut by their packed size make bodies that hardly exceed the size of a piece."""
    clients = [Client(f"{number}" + "n" * 200, number, "::1", 1, streams=("s" * 60,) * 64) for number in range(500)]
    pieces = cut(clients, lambda client: len(pack(client)))
    assert len(pieces) > 4
    assert [client for piece in pieces for client in piece] == clients
    assert max(len(pack(RegistrySnapshot(1, 0, len(pieces), piece))) for piece in pieces) < PIECE_SIZE + 100


def test_list_is_whole_with_its_last_piece() -> None:
    """One list after the other comes together, also of a single piece, and the same one again."""
    assert completed(list_of("a", 3) + list_of("b", 1) + list_of("b", 1) + list_of("a", 2)) == ["a", "b", "b", "a"]


def test_list_that_lacks_a_piece_is_dropped() -> None:
    """Whichever piece is lost, the list is not completed, and the next one is."""
    for lost in range(3):
        parts = list_of("a", 3)
        del parts[lost]
        assert completed([*parts, *list_of("b", 3)]) == ["b"]


def test_pieces_out_of_order_complete_nothing() -> None:
    """Pieces turned around or repeated, and the rest of another list, make nothing whole."""
    first, second, third = list_of("a", 3)
    assert completed([second, first, third]) == []
    assert completed([first, third, second]) == []
    assert completed([first, second, second]) == []
    assert completed([third]) == []
    assert completed([list_of("a", 2)[0], list_of("b", 2)[1]]) == []
    assert completed([first, second, first, second, third]) == ["a"]


def test_last_piece_again_completes_nothing() -> None:
    """A list is handed out once."""
    assert completed([*list_of("a", 2), list_of("a", 2)[1]]) == ["a"]


def test_what_was_cleared_is_not_completed() -> None:
    """After `clear` the rest of a list completes nothing, and the next list is put together."""
    assembler, (first, second) = Assembler[Part](), list_of("a", 2)
    assert assembler.add("a", first) is None
    assembler.clear()
    assert assembler.add("a", second) is None
    assert assembler.add("a", first) is None
    assert assembler.add("a", second) == [first, second]

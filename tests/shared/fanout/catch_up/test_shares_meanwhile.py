from shared.client import Client
from shared.fanout.catch_up import shares_meanwhile
from shared.fanout.catch_up.shares_meanwhile import SharesMeanwhile
from shared.fanout.catch_up.window import Numbered
from tests.builders import make_batch, make_client

ONE, TWO = ("ingest.1", 1), ("ingest.2", 1)


def member(name: str) -> Client:
    """A member of the group."""
    return make_client(name, group="g")


def live(total: int, worker: tuple[str, int] = ONE) -> Numbered:
    """A batch of ten datagrams."""
    return Numbered(worker, total, total, make_batch([b"x"] * 10))


def names(shares: SharesMeanwhile, total: int, worker: tuple[str, int] = ONE) -> str:
    """Return the members that share a row, those that are joining in capitals."""
    (((router, joining), _),) = shares.parts(Numbered(worker, total, total, make_batch([b"x"])))
    return "".join(each.name.upper() if each.name in joining else each.name for each in router.clients("messages"))


def test_rows_are_shared_by_those_who_were_there_as_they_came() -> None:
    """Each worker's rows have the members of their moment, those before the begin have the first ones."""
    shares = SharesMeanwhile([member("a"), member("b")])
    shares.note(live(100), ())
    shares.replace([member("a"), member("b"), member("c")])
    shares.note(live(110), ("c", "of another group"))
    shares.note(live(120), ())
    shares.note(live(50, TWO), ("c",))
    shares.replace([member("a"), member("c")])
    shares.note(live(130), ())
    shares.replace([member("a"), member("c")])
    shares.note(live(140), ())
    assert [names(shares, total) for total in (0, 109, 110, 119, 120, 129, 130, 999)] == [
        *("ab", "ab", "abC", "abC", "abc", "abc", "ac", "ac")
    ]
    assert [names(shares, total, TWO) for total in (49, 50, 999)] == ["ab", "abC", "abC"]
    assert names(shares, 0, ("ingest.3", 1)) == "ab"


def test_a_batch_of_the_past_is_cut_where_members_have_come_or_gone() -> None:
    """The journal joins batches that came before and after a change: each part has the members of its moment."""
    shares = SharesMeanwhile([member("a")])
    for total in (0, 10, 20, 30):
        shares.note(live(total), ("a",) if total in (10, 30) else ())
    joined = Numbered(ONE, 9, 5, make_batch([b"%d" % number for number in range(5, 35)]))
    parts = [
        ([*sharing.joining], rows.total, [int(payload) for *_, payload in rows.batch.datagrams()])
        for sharing, rows in shares.parts(joined)
    ]
    assert parts == [
        ([], 5, [*range(5, 10)]),
        (["a"], 10, [*range(10, 20)]),
        ([], 20, [*range(20, 30)]),
        (["a"], 30, [*range(30, 35)]),
    ]


def test_not_every_change_is_known_for_ever() -> None:
    """Of too many changes the latest are known, and the members at the begin."""
    shares = SharesMeanwhile([member("a")])
    for number in range(shares_meanwhile.MOST_CHANGES + 2):
        shares.note(live(10 * number), ("a",) if number % 2 == 0 else ())
    assert [names(shares, total) for total in (5, 15, 25, 35)] == ["a", "a", "A", "a"]

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.ledger.accounts import Accounts, unparse_origin
from shared.monitoring.balance import Balance

BOOT = 0xB0
ORIGIN = unparse_origin("ingest.1", BOOT, "syslog")


def worker(published: int) -> Accounts:
    """Return the report of a worker that has published `published` datagrams."""
    return {"stream/syslog": {"received": published, "published": published}}


def forwarder(reached: int, missed: int = 0) -> Accounts:
    """Return the report of a forwarder that has followed the worker from its start."""
    return {ORIGIN: {"baseline": 0, "taken": reached - missed, "missed": missed, "reached": reached}}


def balance(*reports: tuple[str, Accounts]) -> Balance:
    """A round of these reports, a second after each other."""
    round_ = Balance()
    for number, (service, accounts) in enumerate(reports):
        round_.add_report(service, BOOT, float(number), accounts)
    return round_


def test_balanced_when_the_consumer_is_where_the_worker_was() -> None:
    """A consumer between the worker's count before and after it is in balance, though both keep counting."""
    round_ = balance(("ingest.1", worker(10)), ("forwarder.1", forwarder(15)), ("ingest.1", worker(20)))
    assert list(round_.discrepancies()) == []
    assert round_.settled


def test_consumer_behind_is_a_discrepancy() -> None:
    """A consumer that never reaches what the worker had published first is behind, and the round does not settle."""
    round_ = balance(("ingest.1", worker(10)), ("forwarder.1", forwarder(7)), ("ingest.1", worker(20)))
    assert list(round_.discrepancies()) == ["forwarder is 3 datagrams behind ingest.1 (boot b0) on stream syslog"]
    assert not round_.settled


def test_consumer_ahead_is_a_discrepancy() -> None:
    """A consumer that counts more than the worker says afterwards is wrong, and stays so."""
    reports = [("ingest.1", worker(10)), ("forwarder.1", forwarder(12)), ("ingest.1", worker(11))]
    round_ = balance(*reports, ("ingest.1", worker(12)))
    assert list(round_.discrepancies()) == [
        "forwarder counts 1 datagrams more than ingest.1 (boot b0) on stream syslog"
    ]


def test_each_consumer_is_compared_on_its_own() -> None:
    """One consumer's account says nothing of another's: each has to be where the worker was, and is named if not."""
    reports = [("ingest.1", worker(10)), ("forwarder.1", forwarder(10)), ("transmitter.1", forwarder(12))]
    round_ = balance(*reports, ("ingest.1", worker(10)))
    assert list(round_.discrepancies()) == [
        "transmitter counts 2 datagrams more than ingest.1 (boot b0) on stream syslog"
    ]
    behind = balance(*reports[:2], ("transmitter.1", forwarder(9)), ("ingest.1", worker(10)))
    assert list(behind.discrepancies()) == ["transmitter is 1 datagrams behind ingest.1 (boot b0) on stream syslog"]
    assert not behind.settled
    behind.add_report("transmitter.1", BOOT, 9.0, forwarder(10))
    behind.add_report("ingest.1", BOOT, 10.0, worker(10))
    assert behind.settled


def test_not_settled_before_the_worker_was_heard_after_the_consumer() -> None:
    """An upper bound takes a report of the worker that is later than the consumer's."""
    assert not balance(("ingest.1", worker(10)), ("forwarder.1", forwarder(10))).settled


def test_a_worker_that_is_gone_is_listed() -> None:
    """A killed worker that the consumer still knows is listed, and no discrepancy; its successor is another origin."""
    round_ = balance(("forwarder.1", forwarder(10, missed=2)))
    round_.add_report("ingest.1", BOOT + 1, 9.0, worker(0))
    assert list(round_.discrepancies()) == []
    assert list(round_.gone()) == ["ingest.1 (boot b0) on stream syslog"]
    assert round_.settled


@pytest.mark.parametrize(
    "accounts",
    [
        {"stream/syslog": {"received": 3, "published": 1, "dropped_bus_full": 1}},
        {"collector/siem": {"expected": 9, "offered": 8, "sent": 8}},
        {"collector/siem": {"expected": 8, "offered": 8, "sent": 5, "filtered": 2}},
    ],
)
def test_accounts_that_do_not_add_up_within_a_service(accounts: Accounts) -> None:
    """A fault in a service's own accounts is a discrepancy that names the service."""
    (sentence,) = balance(("some.1", accounts)).discrepancies()
    assert sentence.startswith("some.1: ")


def test_losses_are_told_by_place() -> None:
    """Each loss is pinned to a place; what the kernel dropped is not upstream, where both count datagrams."""
    ingest: Accounts = {
        "stream/sflow": {"exporter_missed": 9, "kernel_dropped": 5, "dropped_no_subscriber": 3},
        "stream/v5": {"exporter_missed_flows": 60, "kernel_dropped": 1, "dropped_bus_full": 2, "dropped_oversized": 4},
    }
    siem = {"missed": 6, "dropped_refused": 7, "dropped_unserved": 4, "refusals": 2, "unreachables": 1}
    consumer = forwarder(reached=8, missed=6) | {"collector/siem": siem, "forwarder": {"dropped_left": 2}}
    assert [tuple(loss) for loss in balance(("forwarder.1", consumer), ("ingest.1", ingest)).losses()] == [
        ("upstream", "ingest.1", "sflow", 4, "datagrams"),
        ("upstream", "ingest.1", "v5", 60, "flows"),
        ("kernel", "ingest.1", "sflow", 5, "datagrams"),
        ("kernel", "ingest.1", "v5", 1, "datagrams"),
        ("ingest", "ingest.1", "v5", 4, "oversized"),
        ("bus", "forwarder.1", "syslog", 6, "datagrams of ingest.1"),
        ("bus", "ingest.1", "v5", 2, "bus_full"),
        ("way out", "forwarder.1", "siem", 7, "refused"),
        ("way out", "forwarder.1", "siem", 4, "unserved"),
        ("way out", "forwarder.1", "collectors that left", 2, "left"),
        ("network", "forwarder.1", "siem", 2, "refused"),
        ("network", "forwarder.1", "siem", 1, "unreachable"),
    ]


def test_accounts_that_nobody_writes() -> None:
    """Negative counts are no losses, and an origin that is none is passed over."""
    strange: Accounts = {"collector/siem": {"dropped_refused": -7}, "origin/x": {"missed": 3}, ORIGIN: {"missed": -1}}
    assert balance(("forwarder.1", strange)).losses() == []


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("publish"), st.integers(1, 300)),
            st.tuples(st.just("deliver"), st.booleans()),
            st.tuples(st.sampled_from(("worker reports", "forwarder reports")), st.none()),
        )
    ),
    st.integers(0, 3),
)
def test_no_history_of_a_right_forwarder_is_out_of_balance(
    events: list[tuple[str, int | bool | None]], invented: int
) -> None:
    """A forwarder that counts right balances, whatever happens in whatever order, batches lost too; one ahead does not.

    Here the bus is a queue: the forwarder takes a batch any time after it was published, or learns that it is lost.
    """
    round_, queue = Balance(), list[int]()
    published = reached = missed = 0
    for at, (event, value) in enumerate([("worker reports", None), *events]):
        if event == "publish":
            queue.append(int(value or 0))
            published += queue[-1]
        elif event == "deliver" and queue:
            size = queue.pop(0)
            reached, missed = reached + size, missed + (size if value else 0)
        elif event == "worker reports":
            round_.add_report("ingest.1", BOOT, float(at), worker(published))
        elif event == "forwarder reports":
            round_.add_report("forwarder.1", 1, float(at), forwarder(reached, missed))
    round_.add_report("forwarder.1", 1, len(events) + 1.0, forwarder(published + invented, missed))
    round_.add_report("ingest.1", BOOT, len(events) + 2.0, worker(published))
    assert [sentence.split()[2] for sentence in round_.discrepancies()] == ([str(invented)] if invented else [])
    assert round_.settled

"""Copies that another node may have sent too, of collectors that this one leaves and that come back to it."""

from collections import Counter

from shared.bus.bodies.nodes_message import Node
from shared.fanout.sending.perhaps_twice import LOOK_SECONDS, LOOKS, PerhapsTwice
from shared.ledger.counters import PERHAPS_TWICE, SENT

COPIES = 10
"""Those sent to a served collector between two looks."""
SIEM = "siem"


class Sender:
    """A sender of copies to one collector, and another node that it hears, until that is `silent`."""

    def __init__(self) -> None:
        self.account: Counter[str] = Counter({SENT: 1000})
        self._now = 0.0
        self._missed = 0
        self._counts = PerhapsTwice(lambda: self._now)

    def pass_time(self, looks: int, *, served: bool = True, may_return: bool = True, silent: bool = False) -> None:
        """Let time pass, while the collector is served or not."""
        for _ in range(looks):
            self._now += LOOK_SECONDS
            self.account[SENT] += COPIES * served
            there = Node("there", "silent" if silent else "live", 9000 * silent, missed=self._missed)
            accounts, returning = ({SIEM: self.account}, ()) if served else ({}, (SIEM,) if may_return else ())
            self._counts.note([Node("here", "live"), there], accounts, returning)

    def is_missed(self, *, served: bool = True) -> None:
        """Let the other node tell that it has served without this one."""
        self._missed += 1
        self.pass_time(1, served=served)

    @property
    def counted(self) -> tuple[int, int]:
        """The copies that the collector's account has, and that the service's own has."""
        return self.account[PERHAPS_TWICE], self._counts.left


def test_copies_to_a_collector_that_comes_back_are_in_one_account() -> None:
    """The node hears that it was missed after it has left a collector; that comes back to its account then."""
    sender = Sender()
    sender.pass_time(LOOKS + 1)
    sender.pass_time(7, silent=True)
    sender.pass_time(1, served=False, silent=True)
    sender.is_missed(served=False)
    told = sender.counted
    assert told[0] == 0 < COPIES * 7 <= told[1] <= COPIES * (7 + LOOKS)
    sender.pass_time(LOOKS + 1)
    assert sender.counted == told
    sender.is_missed()
    assert sender.counted == (COPIES * LOOKS, told[1])


def test_a_collector_that_comes_back_to_its_account_is_counted_from_there() -> None:
    """It was away for longer than looks go back: what it got before it left is not counted."""
    sender = Sender()
    sender.pass_time(LOOKS + 1)
    sender.pass_time(LOOKS + 2, served=False)
    sender.pass_time(1)
    sender.is_missed()
    assert sender.counted == (COPIES * 2, 0)


def test_a_collector_whose_account_begins_anew_is_counted_from_its_begin() -> None:
    """It can't come back to its account, so another one begins: all that it has got since may be sent twice."""
    sender = Sender()
    sender.pass_time(LOOKS + 1)
    sender.pass_time(1, served=False, may_return=False)
    sender.account = Counter({SENT: 2000})
    sender.pass_time(1)
    sender.is_missed()
    assert sender.counted == (2000 + COPIES * 2, 0)


def test_a_collector_that_was_served_by_two_accounts_is_counted_by_both() -> None:
    """It has changed its address, which begins an account, has left and come back: its sum goes on."""
    sender = Sender()
    sender.pass_time(LOOKS + 1)
    sender.account = Counter()
    sender.pass_time(1, served=True)
    sender.pass_time(1, served=False)
    sender.pass_time(1)
    sender.is_missed()
    assert sender.counted == (COPIES * 4, 0)


def test_copies_that_were_counted_and_dropped_make_no_more_of_them() -> None:
    """Late copies are counted before they are sent: the sum that falls as they are dropped is no new account."""
    sender = Sender()
    sender.pass_time(LOOKS + 1)
    sender.account[PERHAPS_TWICE] += COPIES * LOOKS * 2
    sender.is_missed()
    assert sender.counted == (COPIES * LOOKS * 2, 0)

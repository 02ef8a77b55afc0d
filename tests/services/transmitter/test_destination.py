"""Copies that wait for a next hop: on links in namespaces of the test's own, with one that answers late or never."""

import time
from collections import Counter
from contextlib import ExitStack

import pytest

import services.transmitter.sender
import shared.fanout.sending.backlog
from services.transmitter.destination import HELD_BYTES, HELD_SECONDS
from shared.client import MOST_WAITING
from shared.datagrams.gathered import MAX_GATHERED_PAYLOAD, Gathered
from shared.datagrams.limits import MAX_DATAGRAM
from shared.datagrams.routing import ALL_ROWS
from shared.ledger.equations import discrepancies
from tests.builders import make_batch
from tests.capture import Collector
from tests.network import End, Host, veth
from tests.services.transmitter.site import EXPORTERS, SIEM4, SIEM6, Copied, Site, numbered, payloads
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
SOURCES = {SIEM4: EXPORTERS[:1], SIEM6: ("2001:db8::1",)}


class Clock:
    """The clock of what waits: it stands still unless moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of what waits and of who lets it wait."""
    clock = Clock()
    for module in (shared.fanout.sending.backlog, services.transmitter.sender):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def site(opened: ExitStack) -> Site:
    """A site whose collector's host does not answer."""
    site = Site(opened)
    answer(site, False)
    return site


def answer(site: Site, answers: bool) -> None:
    """Let the collector's host answer ARP for its link address, or not."""
    site.siem.run("ip", "link", "set", "dev", "eth", "arp", "on" if answers else "off")


@pytest.mark.parametrize("address", [SIEM4, SIEM6])
def test_what_comes_before_the_answer_arrives_in_order(site: Site, opened: ExitStack, address: str) -> None:
    """While the next hop is asked for datagrams wait; when it has answered all leave in order, newer ones behind."""
    site.destination = site.reach(address)
    copied = opened.enter_context(Copied(site.siem, "eth"))
    count = 0
    while site.account["sent"] == 0:
        site.send(*numbered(count, 20), sources=SOURCES[address])
        count += 20
        if count == 100:
            assert (site.account["held"], site.account["sent"]) == (100, 0)
            answer(site, True)
        elif count % 60 == 0:  # now what is new finds the next hop usable first, now the loop does
            site.turn()
        time.sleep(0.003)
    site.send(*numbered(count, 20), sources=SOURCES[address])
    assert payloads(copied.read(count + 20)) == numbered(0, count + 20)
    assert (site.account["sent"], site.account["held"]) == (count + 20, 0)


def test_what_waits_leaves_although_nothing_new_comes(site: Site, opened: ExitStack) -> None:
    """Datagrams of every size that wait leave as soon as the next hop answers, whole, whoever else has to wait."""
    copied = opened.enter_context(Copied(site.siem, "eth"))
    sizes = (0, 1, 100, 100, 100, 1472, 1473, 9000, MAX_DATAGRAM)
    sent = [bytes([number]) * size for number, size in enumerate(sizes)]
    site.send(*sent, sources=EXPORTERS[:1])
    answer(site, True)
    site.turn_until("sent", len(sent))
    assert payloads(copied.read(len(sent))) == sent


def test_nothing_waits_longer_than_a_second(site: Site, clock: Clock) -> None:
    """A datagram that has waited a second is dropped as `no_neighbour`, no earlier, and later ones wait on."""
    site.send(*numbered(0, 10))
    clock.now += HELD_SECONDS / 2
    site.send(*numbered(10, 20))
    clock.now += HELD_SECONDS / 2 - 0.001
    site.turn()
    assert site.account["held"] == 30
    clock.now += 0.001
    site.turn()
    assert (site.account["held"], site.account["dropped_no_neighbour"]) == (20, 10)
    clock.now += HELD_SECONDS / 2
    site.turn()
    assert (site.account["held"], site.account["dropped_no_neighbour"]) == (0, 30)
    assert not site.destination.held


def test_too_many_that_wait_push_out_the_oldest(site: Site, opened: ExitStack) -> None:
    """Beyond so many datagrams the oldest are dropped for new ones; the newest arrive, in order."""
    copied = opened.enter_context(Copied(site.siem, "eth"))
    most = MOST_WAITING["original"] // 100 * 100
    count = most + 1000
    for start in range(0, count, 100):
        site.send(*numbered(start, 100), sources=EXPORTERS[:1])
        assert site.account["held"] == min(start + 100, most)
    held = site.account["held"]
    assert site.account["dropped_no_neighbour"] == count - held
    answer(site, True)
    site.turn_until("sent", held)
    assert payloads(copied.read(held)) == numbered(count - held, held)


def test_too_many_bytes_that_wait_push_out_the_oldest(site: Site) -> None:
    """Memory that one collector's waiting datagrams take is bounded, also where it gets few of what came with them."""
    each = 8
    for number in range(HELD_BYTES // (each * MAX_DATAGRAM) + 5):
        site.send(*[bytes([number]) * MAX_DATAGRAM] * each)
        assert site.account["held"] * MAX_DATAGRAM <= HELD_BYTES
    held = site.account["held"]
    assert HELD_BYTES // MAX_DATAGRAM - 2 * each <= held
    assert site.account["dropped_no_neighbour"] == site.account["offered"] - held


def test_what_came_together_may_wait_together(site: Site) -> None:
    """The largest amount handled at once has room to wait: it is not dropped before anything else has come."""
    each = 8
    count = MAX_GATHERED_PAYLOAD // (each * MAX_DATAGRAM) + 1
    batch = Gathered([make_batch([bytes(MAX_DATAGRAM)] * each) for _ in range(count)])
    site.account["offered"] += len(batch)
    site.sender.send(batch, [(site.destination, ALL_ROWS)])
    site.check()
    assert site.account["held"] == count * each


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("route del 10.2.0.0/24 dev up", "dropped_no_route"),
        ("route replace blackhole 10.2.0.2/32", "dropped_no_route"),
    ],
)
def test_what_waits_is_dropped_when_its_way_goes(site: Site, clock: Clock, command: str, cause: str) -> None:
    """Without a way nothing waits for a next hop: it is dropped under the cause that there is now."""
    site.send(*numbered(0, 10))
    assert site.account["held"] == 10
    site.relay.run("ip", *command.split())
    site.turn_until(cause, 10)
    assert site.account["held"] == 0


def test_what_waits_is_dropped_when_the_link_goes_down(site: Site, clock: Clock) -> None:
    """The link went down before the next hop answered: `interface_down`."""
    site.send(*numbered(0, 10))
    site.siem.run("ip", "link", "set", "dev", "eth", "down")
    site.turn_until("dropped_interface_down", 10)
    assert site.account["held"] == 0


def test_what_waits_takes_another_way_when_the_route_changes(site: Site, opened: ExitStack) -> None:
    """A route that leads elsewhere before the next hop answers is taken by what waits."""
    other = opened.enter_context(Host())
    relays, theirs = End(site.relay, "other", "10.4.0.1/24"), End(other, "eth", "10.4.0.2/24")
    opened.enter_context(veth(relays, theirs))
    other.run("ip", "address", "add", f"{SIEM4}/32", "dev", "eth")
    copied = opened.enter_context(Collector(other, SIEM4, 9514))
    site.turn()
    site.send(*numbered(0, 10), sources=EXPORTERS[:1])
    site.relay.run("ip", "route", "add", f"{SIEM4}/32", "via", "10.4.0.2")
    site.turn_until("sent", 10)
    assert payloads(copied.read(10)) == numbered(0, 10)


def test_what_waits_when_the_collector_leaves_is_dropped(site: Site, opened: ExitStack) -> None:
    """One that leaves, or changes, gets nothing of what waited; it is counted, and never sent later."""
    copied = opened.enter_context(Copied(site.siem, "eth"))
    site.send(*numbered(0, 10))
    site.destination.close()
    site.check()
    assert (site.account["held"], site.account["dropped_no_neighbour"]) == (0, 10)
    answer(site, True)
    site.relay.neighbour(SIEM4, site.eth.link_address, "up")
    for _ in range(10):
        site.turn()
        time.sleep(0.01)
    copied.assert_quiet(0.1)


def test_collectors_wait_each_for_itself(site: Site, opened: ExitStack) -> None:
    """Behind one next hop some wait and then all leave; one whose next hop never answers loses its own alone."""
    copied = opened.enter_context(Copied(site.siem, "eth"))
    accounts = {name: Counter[str]() for name in ("one", "two", "never")}
    reached = []
    for name, address in (("one", SIEM4), ("two", SIEM4), ("never", "10.2.0.77")):
        site.account = accounts[name]
        reached.append(site.reach(address))
    batch = Gathered([make_batch(numbered(0, 50), EXPORTERS[:1])])
    site.sender.send(batch, [(copies, ALL_ROWS) for copies in reached])
    assert [account["held"] for account in accounts.values()] == [50, 50, 50]
    answer(site, True)

    def sent() -> bool:
        site.sender.work()
        for account in accounts.values():
            whole = {**account, "offered": 50, "expected": 50}
            assert list(discrepancies({"collector/c": whole})) == []
        return accounts["never"]["dropped_no_neighbour"] == 50

    wait_until(sent, "nothing waits any more")
    assert [account["sent"] for account in accounts.values()] == [50, 50, 0]
    assert sorted(payloads(copied.read(100))) == sorted(numbered(0, 50) * 2)

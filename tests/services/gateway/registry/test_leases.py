import math

import pytest

from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.expiry_pause import WINDOW_SECONDS
from services.gateway.registry.registry import RETURN_SECONDS
from shared.client import Client
from tests.services.gateway.table import ELSEWHERE, HERE, Disk, Table, error_of


@pytest.fixture
def registry() -> Table:
    """An empty registry at time 0."""
    return Table()


def test_lease_expires_unless_renewed(registry: Table) -> None:
    """An entry with a time to live is there so long after its last renewal; one without stays."""
    lasting, lease = registry.join("a"), registry.join("b", ttl=10)
    registry.now = 9
    assert registry.leases.expires_in(lasting) is None
    assert registry.leases.expires_in(lease) == 1
    registry.renew_as("b", lease.client.generation, HERE)
    registry.now = 18.9
    registry.expire()
    assert registry.present == ["a", "b"]
    registry.now = 19
    registry.expire()
    assert registry.present == ["a"]
    assert not registry.leases.active


def test_expiry_that_is_not_kept_comes_later() -> None:
    """An entry whose time is up, or whose connection is gone, stays while that can't be written; then it goes."""
    disk = Disk()
    registry = Table(keep=disk.keep)
    registry.join("a", ttl=1)
    registry.join("b", hold=True)
    disk.full, registry.now = True, 2
    registry.expire()
    registry.release_held(HERE)
    assert registry.present == ["a", "b"]
    disk.full, registry.now = False, 3
    registry.expire()
    assert registry.present == []


def lease(registry: Table, count: int) -> list[Entry]:
    """Make a number of entries with a lease, each of another holder."""
    peers = [Peer(number, "192.0.2.7", 4000, Rights(f"h{number}")) for number in range(count)]
    return [registry.join(f"n{number}", peer, ttl=10) for number, peer in enumerate(peers)]


def test_many_missing_renewals_stop_expiry() -> None:
    """Nothing expires when over 15 % of the renewals due are missing, until they come or the time for that is over."""
    registry = Table(preserve_seconds=100)
    entries = lease(registry, 20)
    registry.now = 9
    for entry in entries[:16]:
        registry.renew(entry)
    registry.now = 10
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (True, 20)
    for entry in entries:
        registry.renew(entry)
    registry.now = 11
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (False, 20)
    registry.now = 11 + WINDOW_SECONDS
    registry.expire()
    assert registry.leases.preserving
    registry.now += 99
    registry.expire()
    assert registry.leases.preserving
    registry.now += 1
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (False, 0)


@pytest.mark.parametrize(("count", "renewing"), [(20, 17), (9, 0), (1, 0)])
def test_few_missing_renewals_expire(count: int, renewing: int) -> None:
    """Losing 15 % of the leases or less, or of only a few leases however many, is no reason to stop expiring."""
    registry = Table(preserve_seconds=100)
    entries = lease(registry, count)
    registry.now = 9
    for entry in entries[:renewing]:
        registry.renew(entry)
    registry.now = 10
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (False, renewing)


def test_holder_does_not_stop_the_others_expiry() -> None:
    """One holder that lets many leases lapse holds up no other's expiry; many holders at once suspend all."""
    registry = Table(preserve_seconds=100)
    holders = [Peer(number, "192.0.2.7", 4000, Rights(f"h{number}")) for number in range(20)]
    for number in range(30):
        registry.join(f"lapse{number}", holders[0], ttl=1)
    for peer in holders[1:]:
        registry.join(peer.rights.holder, peer, ttl=10)
    registry.now = 1
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (False, 19)
    registry.now = 9
    for entry in list(registry.entries())[:17]:
        registry.renew(entry)
    registry.now = 10
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (False, 17)
    registry.now = 19
    for entry in list(registry.entries())[:3]:
        registry.renew(entry)
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (True, 17)


def test_leases_of_this_host_expire_however_many_lapse() -> None:
    """No network is between a client here and the gateway: its lease ends in time, even while others are preserved."""
    registry = Table(preserve_seconds=100)
    for number in range(30):
        registry.join(f"here{number}", ttl=5)
    registry.now = 5
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (False, 0)
    lease(registry, 20)
    registry.join("here", ttl=12)
    registry.now = 15
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (True, 21)
    registry.now = 17
    registry.expire()
    assert (registry.leases.preserving, len(registry)) == (True, 20)


def test_leases_begin_anew_after_a_restart(registry: Table) -> None:
    """An entry of an earlier start has its whole lease again, however little was left of it."""
    earlier = Peer(0, HERE.address, 4000)
    kept = Entry(Client("a", 1, HERE.address, 9), Origin.JSON, earlier, 5.0, math.inf, 0, False, 0.0)
    registry.now = 100.0
    registry.restore([kept], 7)
    registry.now = 104.9
    registry.expire()
    assert registry.present == ["a"]
    registry.now = 105.0
    registry.expire()
    assert registry.present == []


def test_held_entry_outlives_a_restart_for_a_while(registry: Table) -> None:
    """An entry that a connection held may be signed up again from the same address after a restart, or it goes."""
    earlier = Peer(0, HERE.address, 4000)
    kept = [Entry(Client(name, 1, HERE.address, 9), Origin.JSON, earlier, 0.0, math.inf, 0, True, 0.0) for name in "ab"]
    registry.restore(kept, 7)
    assert error_of(registry.join, "a", ELSEWHERE) == "name_taken"
    assert error_of(registry.join, "a", HERE, Origin.NAMES) == "name_taken"
    assert registry.join("a", HERE, hold=True).revision == 8
    registry.now = RETURN_SECONDS
    registry.expire()
    assert registry.present == ["a"]

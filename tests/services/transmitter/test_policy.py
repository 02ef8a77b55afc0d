import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.transmitter.policy import AUDIT_SECONDS, Audit, Policy, Verdicts
from shared.datagrams.gathered import Gathered
from shared.fanout.sending.route_scope import RouteScope
from shared.settings.tables import Transmitter
from tests.builders import make_batch

V4, V6 = "192.0.2.1", "2001:db8::1"
ANY = ("0.0.0.0/0", "::/0")


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def gathered(*sources: str) -> Gathered:
    """A datagram of each source."""
    return Gathered([make_batch([b"x"] * len(sources), sources)])


def admitted(
    policy: Transmitter,
    sources: tuple[str, ...],
    version: int,
    *,
    scope: RouteScope = RouteScope.ROUTED,
    rows: list[int] | None = None,
) -> tuple[list[int], int, int]:
    """Rows that may go to a collector, and how many may not: of another family, refused."""
    batch = gathered(*sources)
    chosen = None if rows is None else np.array(rows)
    found = Verdicts(Policy(policy, Clock()), batch).admit(chosen, version, scope)
    indices = range(len(batch)) if found.rows is None else found.rows.tolist()
    return list(indices), found.other_family, found.refused


@pytest.mark.parametrize(
    ("destinations", "address", "allowed"),
    [
        (Transmitter().destinations, "10.1.2.3", True),
        (Transmitter().destinations, "127.0.0.1", True),
        (Transmitter().destinations, "fd00::1", True),
        (Transmitter().destinations, "192.0.2.1", False),
        (Transmitter().destinations, "2001:db8::1", False),
        (ANY, "192.0.2.1", True),
        (("0.0.0.0/0",), "2001:db8::1", False),
        (("::/0",), "192.0.2.1", False),
        ((), "10.1.2.3", False),
    ],
)
def test_copies_go_only_to_the_destinations_of_the_settings(
    destinations: tuple[str, ...], address: str, allowed: bool
) -> None:
    """An address is allowed when a prefix of its own family covers it; without prefixes none is."""
    assert Policy(Transmitter(destinations=destinations), Clock()).allows_destination(address) == allowed


def test_an_address_of_the_other_family_is_not_claimed() -> None:
    """IPv4 sources go to IPv4 collectors, IPv6 sources to IPv6 ones, the others are counted."""
    sources = (V4, V6, V4, V6)
    assert admitted(Transmitter(), sources, 4) == ([0, 2], 2, 0)
    assert admitted(Transmitter(), sources, 6) == ([1, 3], 2, 0)
    assert admitted(Transmitter(), sources, 6, rows=[0, 1]) == ([1], 1, 0)


@pytest.mark.parametrize("source", ["0.1.2.3", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"])
def test_sources_that_are_nobodys_are_refused(source: str) -> None:
    """No copy claims to come from this network, a group, or a reserved address, on this host neither."""
    for scope in RouteScope:
        assert admitted(Transmitter(), (V4, source), 4, scope=scope) == ([0], 0, 1)


@pytest.mark.parametrize("source", ["::", "ff02::1"])
def test_sources_that_are_nobodys_are_refused_over_ipv6(source: str) -> None:
    """No copy claims the unspecified address or a group of IPv6."""
    assert admitted(Transmitter(), (V6, source), 6) == ([0], 0, 1)


def test_loopback_is_claimed_on_this_host_alone() -> None:
    """A source on loopback is true only for a collector on this host."""
    for version, sources in ((4, ("127.0.0.1", V4)), (6, ("::1", V6))):
        assert admitted(Transmitter(), sources, version, scope=RouteScope.HOST) == ([0, 1], 0, 0)
        for scope in (RouteScope.LINK, RouteScope.ROUTED):
            assert admitted(Transmitter(), sources, version, scope=scope) == ([1], 0, 1)


@pytest.mark.parametrize("source", ["169.254.0.1", "169.254.255.255", "fe80::1", "fe80:1::1", "febf:ffff::1"])
def test_a_link_local_source_is_not_claimed_beyond_a_router(source: str) -> None:
    """Routers drop link-local sources: they are claimed towards collectors on a link of ours and on this host alone."""
    version, other = (6, V6) if ":" in source else (4, V4)
    for scope in (RouteScope.HOST, RouteScope.LINK):
        assert admitted(Transmitter(), (source, other), version, scope=scope) == ([0, 1], 0, 0)
    assert admitted(Transmitter(), (source, other), version, scope=RouteScope.ROUTED) == ([1], 0, 1)


@pytest.mark.parametrize("source", ["169.253.255.255", "169.255.0.1", "fe7f::1", "fec0::1", "::fe80:1", "fd00:fe80::1"])
def test_what_only_looks_link_local_is_claimed(source: str) -> None:
    """Addresses beside the link-local ones, the former site-local ones among them, pass routers."""
    assert admitted(Transmitter(), (source,), 6 if ":" in source else 4) == ([0], 0, 0)


def test_only_sources_of_the_settings_are_claimed() -> None:
    """With `sources` set, a datagram from anywhere else is not copied."""
    policy = Transmitter(sources=("192.0.2.0/24", "2001:db8::/32"))
    assert admitted(policy, (V4, "198.51.100.1", V6, "fd00::1"), 4) == ([0], 2, 1)
    assert admitted(policy, (V4, "198.51.100.1", V6, "fd00::1"), 6) == ([2], 2, 1)


EACH = [V4, V6, "127.0.0.1", "::1", "224.0.0.1", "ff02::1", "169.254.1.1", "fe80::1"]


@given(st.lists(st.sampled_from(EACH), min_size=1), st.sampled_from(RouteScope))
def test_every_row_is_admitted_or_counted(sources: list[str], scope: RouteScope) -> None:
    """The rows that may go and those that may not add up to all rows, for either family."""
    for version in (4, 6):
        rows, other_family, refused = admitted(Transmitter(), tuple(sources), version, scope=scope)
        assert len(rows) + other_family + refused == len(sources)
        assert all((":" in sources[row]) == (version == 6) for row in rows)


def test_frames_are_limited_to_so_many_a_second() -> None:
    """A tenth of a second's allowance may leave at once, and it fills with time; without a limit all may leave."""
    clock = Clock()
    policy = Policy(Transmitter(frames_per_second=100), clock)
    assert [policy.grant(6), policy.grant(6), policy.grant(1)] == [6, 4, 0]
    clock.now += 0.0555
    assert policy.grant(100) == 5
    clock.now += 60
    assert policy.grant(100) == 10
    assert Policy(Transmitter(), clock).grant(10**9) == 10**9


def test_limit_of_one_frame_a_second_lets_one_leave_each_second() -> None:
    """Whole frames leave, however small the limit."""
    clock = Clock()
    policy = Policy(Transmitter(frames_per_second=1), clock)
    left = 0
    for _ in range(100):
        clock.now += 0.1
        left += policy.grant(5)
    assert 9 <= left <= 11


def test_a_refusal_is_told_once_a_minute_for_each_cause() -> None:
    """The audit counts every refusal, and tells of a cause at once and then once a minute, with the count since."""
    clock, told = Clock(), list[tuple[str, int]]()
    audit = Audit(lambda _event, cause, count, **_facts: told.append((cause, count)), clock)
    for _ in range(100):
        audit.refuse("source", 2)
        audit.refuse("rate", 1)
        clock.now += AUDIT_SECONDS / 60
    assert audit.counters == {"source": 200, "rate": 100}
    assert told == [("source", 2), ("rate", 1), ("source", 120), ("rate", 60)]

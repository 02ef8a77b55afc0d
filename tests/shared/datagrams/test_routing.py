import ipaddress
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.client import Client
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.prefix_set import Prefixes, halves_of
from shared.datagrams.routing import Router, Selection
from tests.builders import make_batch, make_client

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

nearby = st.sampled_from([0, 1, 2, 255, 256, 2**16, 2**31, 2**32 - 1])
v4 = st.builds(lambda base, off: str(ipaddress.IPv4Address((base + off) % 2**32)), st.just(0xC0000200), nearby)
v6 = st.builds(
    lambda base, off, shift: str(ipaddress.IPv6Address((base + (off << shift)) % 2**128)),
    st.sampled_from([0x20010DB8 << 96, 0]),
    nearby,
    st.sampled_from([0, 40, 64, 90]),
)
sources = v4 | v6
networks = st.builds(
    lambda source, bits: str(ipaddress.ip_network((source, bits % (129 if ":" in source else 33)), strict=False)),
    sources,
    st.sampled_from([0, 1, 8, 24, 31, 32, 64, 65, 127, 128]) | st.integers(0, 128),
)
clients = st.builds(
    lambda number, streams, prefixes, sample, group: make_client(
        f"c{number}", streams=streams, prefixes=tuple(prefixes), sample=sample, group=group
    ),
    st.integers(0, 99),
    st.sampled_from([("messages",), ("traps",), ("*",), ("traps", "messages")]),
    st.lists(networks, max_size=3),
    st.sampled_from([1, 1, 1, 2, 3, 7]),
    st.sampled_from(["", "", "g", "h"]),
)
registries = st.lists(clients, max_size=8, unique_by=lambda client: client.name)
batches = st.lists(sources, max_size=20).map(lambda found: make_batch([b"x"] * len(found), found or ["::"]))


def rows_of(selection: Selection, batch: DatagramBatch) -> list[int]:
    """The rows that a selection takes."""
    return list(range(len(batch))) if selection.indices is None else selection.indices.tolist()


def route(router: Router, batch: DatagramBatch) -> dict[str, tuple[Client, Selection]]:
    """Return a router's selections, by the collector's name."""
    found = router.route(batch)
    assert len({client.name for client, _ in found}) == len(found)
    nothing = Selection(np.empty(0, np.intp), filtered=len(batch))
    routed = {client.name: (client, nothing) for client in router.clients(batch.stream)}
    return routed | {client.name: (client, selection) for client, selection in found}


MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def unmapped(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """A network, as IPv4 where it is written as IPv4 mapped into IPv6."""
    network = ipaddress.ip_network(text)
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(MAPPED):
        return ipaddress.IPv4Network((network.network_address.packed[12:], network.prefixlen - 96))
    return network


def wants(client: Client, source: str) -> bool:
    """Return whether a source is in one of the prefixes, by the standard library: each family for itself."""
    address: Address = ipaddress.ip_address(source)
    address = getattr(address, "ipv4_mapped", None) or address
    return not client.prefixes or any(address in network for network in map(unmapped, client.prefixes))


@settings(max_examples=75)
@given(registries, st.lists(batches, min_size=1, max_size=3))
def test_rows_are_those_of_a_model_that_looks_at_each_datagram(
    registry: list[Client], several: list[DatagramBatch]
) -> None:
    """Streams, prefixes, groups and sampling pick the rows that a loop over datagrams picks, and the counts add up."""
    router = Router()
    router.replace(registry)
    passed: Counter[str] = Counter()
    for batch in several:
        routed = route(router, batch)
        assert set(routed) <= {client.name for client in registry if client.wants("messages")}
        rows: dict[str, list[int]] = {client.name: [] for client in registry}
        rows |= {name: rows_of(selection, batch) for name, (_, selection) in routed.items()}
        datagrams = list(batch.datagrams())
        for client in registry:
            if not client.wants("messages"):
                continue
            wanted = [row for row, (source, _, _) in enumerate(datagrams) if wants(client, source)]
            if len(batch):
                check_counts(routed[client.name][1], len(batch), len(wanted))
            if not client.group:
                sampled = [row for number, row in enumerate(wanted, passed[client.name]) if number % client.sample == 0]
                assert rows[client.name] == sampled
                passed[client.name] += len(wanted)
            else:
                assert set(rows[client.name]) <= set(wanted)
                assert rows[client.name] == sorted(rows[client.name])


def check_counts(selection: Selection, size: int, wanted: int) -> None:
    """The counts of a selection say where every row went."""
    taken = size if selection.indices is None else len(selection.indices)
    assert selection.filtered == size - wanted
    assert selection.filtered + selection.shared_out + selection.sampled_out + taken == size
    assert min(selection.filtered, selection.shared_out, selection.sampled_out) >= 0


@settings(max_examples=100)
@given(registries, st.lists(sources, min_size=1, max_size=20))
def test_row_of_a_group_goes_to_one_member_that_wants_it(registry: list[Client], found: list[str]) -> None:
    """Each row goes to exactly one of the members that want it, every row of a source to the same, always."""
    members = [unsampled(client) for client in registry if client.group and client.wants("messages")]
    router = Router()
    router.replace(members)
    batch = make_batch([b"x"] * 2 * len(found), found * 2)
    routed = route(router, batch)
    for group in {member.group for member in members}:
        names = [member.name for member in members if member.group == group]
        taken = {name: rows_of(routed[name][1], batch) for name in names}
        for row, source in enumerate(found * 2):
            getters = [name for name in names if row in taken[name]]
            wanting = [member.name for member in members if member.group == group and wants(member, source)]
            assert len(getters) == min(1, len(wanting))
            assert set(getters) <= set(wanting)
            assert all(row % len(found) in taken[name] for name in getters)


def unsampled(client: Client) -> Client:
    """The same collector, getting every row it wants."""
    return make_client(client.name, streams=client.streams, prefixes=client.prefixes, group=client.group)


def shares(names: Iterable[str], found: list[str], group: str = "g") -> dict[str, str]:
    """Return the member of a group that takes each source."""
    router = Router()
    router.replace(make_client(name, group=group) for name in names)
    routed = route(router, make_batch([b""] * len(found), found))
    batch = make_batch([b""] * len(found), found)
    return {found[row]: name for name, (_, selection) in routed.items() for row in rows_of(selection, batch)}


MANY = [f"192.0.{number // 256}.{number % 256}" for number in range(128)] + [f"2001:db8::{n:x}" for n in range(128)]


@settings(max_examples=50)
@given(st.sets(st.text("abcdef0123456789-", min_size=1, max_size=12), min_size=2, max_size=8), st.data())
def test_member_that_leaves_moves_only_its_own_share(names: set[str], data: st.DataObject) -> None:
    """A source changes its member only when that member leaves; in the other direction, only to the one that joins."""
    gone = data.draw(st.sampled_from(sorted(names)))
    before, after = shares(sorted(names), MANY), shares(sorted(names - {gone}, reverse=True), MANY)
    assert before.keys() == after.keys() == set(MANY)
    assert all(after[source] == member for source, member in before.items() if member != gone)


def test_group_decides_who_takes_a_source() -> None:
    """Names that take a source in one group say nothing of another: who does not know its identifier can't find one."""
    names = [f"n{number}" for number in range(64)]
    chosen = [set(shares(names, ["192.0.2.1"], f"group {number}").values()) for number in range(64)]
    assert len(set.union(*chosen)) > 16


def test_group_shares_sources_about_evenly() -> None:
    """Neighbouring addresses spread over members of similar names: nobody gets twice, or half, of an even share."""
    found = [f"10.0.{number // 256}.{number % 256}" for number in range(256)]
    for count in (2, 4, 8):
        taken: Counter[str] = Counter()
        for net in range(16):
            taken.update(shares([f"c{n}" for n in range(count)], [f"10.{net}{s[4:]}" for s in found]).values())
        even = 16 * 256 / count
        assert all(even / 2 < taken[f"c{number}"] < even * 2 for number in range(count)), taken


@settings(max_examples=50)
@given(st.integers(1, 1000), st.lists(st.integers(0, 256), max_size=20))
def test_one_in_n_over_many_batches(sample: int, sizes: list[int]) -> None:
    """1-in-N delivers exactly the first of every N, rounded up, however datagrams fall into batches."""
    router = Router()
    router.replace([make_client("a", sample=sample)])
    matching, positions = 0, []
    for size in sizes:
        for _, selection in router.route(make_batch([b""] * size)):
            assert selection.indices is not None or sample == 1 or not size
            positions += [matching + row for row in rows_of(selection, make_batch([b""] * size))]
        matching += size
    assert positions == list(range(0, matching, sample))


def test_sampling_goes_on_when_others_come_and_go() -> None:
    """A collector that did not change keeps its place in its sampling; one that did begins anew."""
    router = Router()
    kept: dict[str, Any] = {"sample": 10}
    router.replace([make_client("a", **kept)])
    router.route(make_batch([b""] * 9))
    router.replace([make_client("a", **kept), make_client("b")])
    assert route(router, make_batch([b""] * 3))["a"][1].indices is not None
    assert rows_of(route(router, make_batch([b""] * 9))["a"][1], make_batch([b""] * 9)) == [8]
    router.replace([make_client("a", 10, **kept)])
    assert rows_of(route(router, make_batch([b""] * 9))["a"][1], make_batch([b""] * 9)) == [0]


def test_collectors_of_everything_share_one_selection() -> None:
    """Those that want every row get the same object, so that what is made of it can be shared."""
    router = Router()
    router.replace([make_client("a"), make_client("b"), make_client("c", streams=("traps",))])
    (_, first), (_, second) = router.route(make_batch([b"x"]))
    assert first is second
    assert first.indices is None


def test_collector_that_left_gets_nothing_more() -> None:
    """After `replace` nothing is routed to who is no longer there, and at once to who came."""
    router = Router()
    router.replace([make_client("a")])
    assert set(route(router, make_batch([b"x"]))) == {"a"}
    router.replace([make_client("b")])
    assert set(route(router, make_batch([b"x"]))) == {"b"}
    router.replace([])
    assert router.route(make_batch([b"x"])) == []


def test_mapped_prefix_and_plain_prefix_are_the_same() -> None:
    """An IPv4 source is matched by its plain prefix and by the mapped one; `::/0` is every IPv6 source."""
    halves = halves_of(make_batch([b""] * 2, ["192.0.2.7", "2001:db8::7"]))
    for text, expected in (
        ("192.0.2.0/24", [True, False]),
        ("::ffff:192.0.2.0/120", [True, False]),
        ("0.0.0.0/0", [True, False]),
        ("::/0", [False, True]),
        ("2001:db8::/32", [False, True]),
    ):
        assert np.array_equal(Prefixes([text]).match(halves), expected), text

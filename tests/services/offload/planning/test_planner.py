import ipaddress
import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.offload.applying.policy import Policy
from services.offload.channel import Request
from services.offload.kernel_plan import (
    MAX_LISTENERS,
    MAX_STREAMS,
    NO_COPIES,
    Copy,
    KernelPlan,
    Listener,
    buckets_of,
)
from services.offload.planning import planner
from services.offload.planning.planner import (
    COPY_BYTES,
    Facts,
    Limits,
    Planned,
    Way,
    kernel_plan,
    make_plan,
)
from services.offload.source_classes import TooManyError, divide
from shared.bus.bodies.packing import pack, unpack
from shared.client import Client, Resume, Withheld
from shared.datagrams.limits import BUCKETS
from shared.datagrams.routing import shares_of
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.tables import Offload
from tests.builders import make_client
from tests.services.offload.site import packed, prefix

WAY = Way(3, b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2", 1500)
PORTS = {"netflow": 2055, "syslog": 514}
RELAYS = {("10.2.0.1", 9): ("10.2.0.254", 4000), ("fd02::1", 9): ("fd02::ff", 4001)}
FACTS = Facts(
    {"netflow": {("10.1.0.1", 2055), ("fd01::1", 2055)}, "syslog": {("10.1.0.1", 514)}, "messages": set()},
    {"eth0": 1500},
    lambda *_: WAY,
    RELAYS,
)
WITHOUT_LISTENER = "its streams have no udp:// listener for other hosts over IPv{}, or offload = false"
LIMITS = Limits(("10.0.0.0/8", "fd00::/8"), ("10.2.0.0/16", "fd02::/16"))


def client(name: str = "siem", address: str = "10.2.0.1", **fields: Any) -> Client:
    """A collector that is served unless its fields say otherwise."""
    return make_client(name, address=address, **{"streams": ("netflow",), "source": "original", **fields})


def plan(*clients: Client, facts: Facts = FACTS, limits: Limits = LIMITS) -> Planned:
    """The plan for some clients."""
    numbers: dict[str, int] = {}
    return make_plan(clients, facts, limits, lambda what: numbers.setdefault(what, len(numbers)))


def test_copy_has_the_terms_of_its_collector() -> None:
    """Address, port, hop limit, DSCP, prefixes of its own IP version, sample; a relay's has the forwarder's address."""
    asked = client(prefixes=("10.1.0.0/24", "fd01::/64"), sample=4, hop_limit=7, dscp=10)
    (served,) = plan(asked).served[4]
    expected = Copy("siem", 0, 3, WAY.next_hop, WAY.link_address, bytes((10, 2, 0, 1)), 9)
    some = {"hop_limit": 7, "dscp": 10, "prefixes": (prefix("10.1.0.0/24"),), "sample": 4}
    assert served.copy == msgspec.structs.replace(expected, **some)
    (relayed,) = plan(client(source="relay")).served[4]
    assert (relayed.copy.source, relayed.copy.source_port) == (bytes((10, 2, 0, 254)), 4000)
    (six,) = plan(client(address="fd02::1", source="relay", streams=("*",))).served[6]
    assert (six.streams, six.copy.source) == (("netflow",), ipaddress.ip_address("fd02::ff").packed)


def test_streams_have_their_listeners_and_copies() -> None:
    """Each stream has its listeners of one IP version, and the copies of the collectors that want it."""
    planned = plan(client("a", streams=("*",)), client("b"), client("c", address="fd02::1"))
    made = kernel_plan(planned, {4: 5, 6: 6})
    listener = Listener(bytes((10, 1, 0, 1)), 2055)
    assert [(each.name, each.generation, each.copies) for each in made.streams] == [
        ("netflow", 5, (0, 1)),
        ("syslog", 5, (0,)),
        ("netflow", 6, (2,)),
    ]
    assert made.streams[0].listeners == (listener,)
    assert [copy.name for copy in made.copies] == ["a", "b", "c"]
    assert made.interfaces == ("eth0",)
    assert kernel_plan(plan(), {}) == NO_COPIES
    assert plan().rules == Planned({}, {}).rules


def test_longer_datagrams_go_up_where_a_way_takes_less_than_arrives() -> None:
    """The shortest way bounds the stream's datagrams, unless none longer can arrive."""
    ways = {"10.2.0.1": WAY, "10.2.0.2": replace(WAY, mtu=1400)}
    narrow = replace(FACTS, way_to=lambda address, _: ways[address])
    assert [each.longest for each in plan(client(), facts=narrow).streams[4]] == [0]
    both = plan(client(), client("other", "10.2.0.2"), facts=narrow)
    assert [each.longest for each in both.streams[4]] == [1400]


def unseen(*clients: Client) -> list[tuple[str, int]]:
    """The streams, by IP version, whose datagrams end in the kernel where the settings let two of them."""
    planned = plan(*clients, limits=replace(LIMITS, unseen=("netflow", "syslog")))
    return [(each.name, version) for version, streams in planned.streams.items() for each in streams if each.unseen]


def test_stream_ends_in_the_kernel_where_all_are_served() -> None:
    """A collector left to a sender, or a relay's of the other IP version, has its datagrams go up for all."""
    four, six = client("four"), client("six", "fd02::1")
    relayed = client("siem", "fd02::1", source="relay", port=9)
    assert unseen(four, six) == [("netflow", 4), ("netflow", 6)]
    assert unseen(four, client("all", "10.2.0.2", streams=("*",))) == [("netflow", 4), ("syslog", 4)]
    assert unseen(four, client("g", "10.2.0.2", catch_up=True)) == []
    assert unseen(four, six, client("g", "fd02::2", catch_up=True)) == [("netflow", 4)]
    assert unseen(four, client("g", "10.2.0.2", catch_up=True, streams=("syslog",))) == [("netflow", 4)]
    assert plan(relayed).served[6]
    assert unseen(four, relayed) == [("netflow", 6)]
    assert not plan(four, six).streams[4][0].unseen


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"withheld": Withheld("", 0.0)}, "its copies are withheld"),
        ({"resume": Resume(1)}, "it catches up from the journal: the kernel does not know where it has got to"),
        ({"catch_up": True}, "it catches up from the journal: the kernel does not know where it has got to"),
        ({"address": "192.0.2.1"}, "its address is not in [offload] destinations"),
        ({"address": "10.3.0.1"}, "its address is not in [transmitter] destinations"),
        ({"streams": ("messages",)}, WITHOUT_LISTENER.format(4)),
        (
            {"address": "fd02::1", "streams": ("syslog",)},
            WITHOUT_LISTENER.format(6),
        ),
        ({"prefixes": ("fd00::/8",)}, "no prefix of it is of IPv4"),
        ({"source": "relay", "port": 10}, "the forwarder has no socket for it"),
    ],
)
def test_each_who_is_not_served_has_a_reason(fields: dict[str, Any], reason: str) -> None:
    """The reason is said for each collector that the kernel can't serve, or may not."""
    planned = plan(client("other", "10.2.0.1"), client(**fields))
    assert planned.reasons == {"siem": reason}
    assert [each.client.name for some in planned.served.values() for each in some] == ["other"]


def test_reasons_of_this_host_and_of_settings() -> None:
    """A trouble, no way, no interface, and a limit of frames a second are reasons too."""
    siem = client()
    troubled = replace(FACTS, troubled={("siem", siem.generation): "refusing"})
    assert plan(siem, facts=troubled).reasons == {"siem": "it is refusing"}
    lost = replace(FACTS, troubled={("siem", siem.generation): None})
    assert not plan(siem, facts=lost).reasons
    assert plan(siem, facts=replace(FACTS, way_to=lambda *_: "no way")).reasons == {"siem": "no way"}
    nowhere = replace(FACTS, interfaces={})
    assert plan(siem, facts=nowhere).reasons == {"siem": "no interface of [offload] interfaces is there"}
    limited = replace(LIMITS, rate_limited=True)
    assert plan(siem, limits=limited).reasons == {"siem": "[transmitter] frames_per_second limits its copies"}
    assert not plan(client(source="relay"), limits=limited).reasons
    assert not plan(make_client("name", streams=())).reasons


def test_overlapping_prefixes_are_bounded() -> None:
    """Collectors with prefixes are left to the senders when each source is wanted by another set of them."""
    drawn, nets = random.Random(1), [f"10.0.{number}.0/24" for number in range(256)]
    many = [client(f"c{number}", prefixes=tuple(drawn.sample(nets, 128))) for number in range(200)]
    planned = plan(client("all"), *many)
    assert [each.client.name for each in planned.served[4]] == ["all"]
    assert planned.reasons == {each.name: "the prefixes of too many collectors overlap" for each in many}


def test_members_of_a_group_have_the_shares_that_senders_find() -> None:
    """Each bucket is one member's, though another is not served; where members want different things, none is."""
    members = [client(name, f"10.2.0.{number}", group="g") for number, name in enumerate("abc", 1)]
    planned = plan(*members, client("other"), client("far", "192.0.2.1", group="g"))
    shares = shares_of([*members, client("far", group="g")])
    assert {each.client.name: each.copy.share for each in planned.served[4]} == {
        **{name: shares[name] for name in "abc"},
        "other": b"",
    }
    assert sorted(bucket for share in shares.values() for bucket in buckets_of(share)) == [*range(BUCKETS)]
    unlike = dict.fromkeys("abcd", "members of its group differ in streams or prefixes")
    assert plan(*members, client("d", group="g", prefixes=("10.1.0.0/24",))).reasons == unlike
    assert plan(*members, client("d", group="g", streams=("*",))).reasons == unlike


def test_groups_are_bounded() -> None:
    """Each group has a map in the kernel: many are left to the senders."""
    many = [client(f"c{number}", group=f"g{number}") for number in range(129)]
    planned = plan(client("all"), *many)
    assert planned.reasons == {each.name: "there are too many groups" for each in many}
    assert not plan(client("all"), *many[1:]).reasons


def packed_size(made: KernelPlan) -> int:
    """The bytes of a plan's request, which the applier must be able to read."""
    data = pack(Request("apply", 1 << 62, made))
    assert unpack(data, Request).plan == made
    return len(data)


def test_who_does_not_fit_into_a_plan_is_left_to_the_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the whole decides, and the number: those who come first are served by a plan that can be read."""
    nets = tuple(f"2001:db8:{number:x}::/48" for number in range(256))
    many = [client(f"{number:0>255}", "fd02::1", prefixes=nets, source="relay") for number in range(9)]
    few = [client(f"c{number}") for number in range(9)]
    monkeypatch.setattr(planner, "COPIES_BYTES", 30_000)
    planned = plan(*many, *few)
    assert len(planned.served[6]) == 4
    too_many = "there are too many collectors, with their prefixes, for one plan"
    assert planned.reasons == {each.name: too_many for each in many[4:]}
    assert packed_size(kernel_plan(planned, {4: 1, 6: 2})) <= 30_000 + 4096
    monkeypatch.setattr(planner, "MAX_COPIES", 6)
    assert plan(*few, *many).reasons == {each.name: too_many for each in (*few[6:], *many)}


def test_streams_with_too_many_listeners_are_left_to_the_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses and ports of a stream are bounded, those of all streams, and the streams; each IP version by itself."""
    places = {(f"10.1.{number >> 8}.{number & 255}", 2055) for number in range(MAX_LISTENERS + 1)}
    listeners = {"many": {*places, ("fd01::1", 2055)}, "most": {*list(places)[1:]}, **FACTS.listeners}
    more = {f"s{number}": {("fd01::1", number + 1)} for number in range(MAX_STREAMS)}
    four, six = client("four", streams=("many",)), client("six", "fd02::1", streams=("*",))
    assert len(plan(six, facts=replace(FACTS, listeners=more)).streams[6]) == MAX_STREAMS // 2
    monkeypatch.setattr(planner, "STREAMS_BYTES", 50_000)
    facts = replace(FACTS, listeners=listeners | more)
    planned = plan(four, client("some", streams=("many", "most")), six, facts=facts)
    assert planned.reasons == {"four": "its streams have too many addresses and ports together"}
    assert [each.name for each in planned.streams[4]] == ["most"]
    assert [each.name for each in planned.streams[6]][:3] == ["many", "netflow", "s0"]
    assert packed_size(kernel_plan(planned, {4: 1, 6: 2})) <= 60_000


addresses = st.sampled_from(["10.2.0.1", "10.2.0.2", "10.3.0.1", "192.0.2.1", "fd02::1", "fd03::1", "127.0.0.1"])
prefixes = st.lists(st.sampled_from(["10.1.0.0/24", "10.1.0.0/16", "fd01::/64", "0.0.0.0/0", "::/0"]), max_size=3)
clients = st.builds(
    client,
    name=st.sampled_from("abcdefgh"),
    address=addresses,
    port=st.sampled_from([9, 10]),
    streams=st.sampled_from([("*",), ("netflow",), ("syslog", "messages"), ()]),
    source=st.sampled_from(["relay", "original"]),
    prefixes=prefixes.map(tuple),
    sample=st.integers(1, 3),
    group=st.sampled_from(["", "", "g"]),
)


@given(st.lists(clients, max_size=8, unique_by=lambda each: each.name), st.booleans())
def test_every_collector_is_served_or_has_a_reason_and_the_policy_agrees(some: list[Client], limited: bool) -> None:
    """Nobody is forgotten, or served twice; and the applier's own policy refuses no plan that a planner makes."""
    planned = plan(*some, limits=replace(LIMITS, rate_limited=limited))
    served = [each.client.name for version in planned.served.values() for each in version]
    assert sorted([*served, *planned.reasons]) == sorted(each.name for each in some if each.streams)
    made = kernel_plan(planned, {4: 1, 6: 2})
    assert packed_size(made) <= COPY_BYTES * len(made.copies) + 4096
    for stream in made.streams:
        length = len(stream.listeners[0].address)
        assert {len(made.copies[place].address) for place in stream.copies} == {length}
        assert stream.generation == (1 if length == 4 else 2)
    streams = [Stream(name=name, listen=(f"udp://0.0.0.0:{port}",)) for name, port in PORTS.items()]
    offload = Offload(interfaces=("eth0",), destinations=LIMITS.destinations)
    ours = {packed(address) for address, _ in (*RELAYS.values(), *FACTS.listeners["netflow"])}
    frame = WAY.link_index, WAY.next_hop, WAY.link_address
    settings = Settings(streams=tuple(streams), offload=offload)
    Policy(settings, ours.intersection, lambda pairs: dict.fromkeys(pairs, frame)).check(made)


networks = st.builds(
    lambda address, length: prefix(f"10.0.{address >> 4}.{address & 15}/{length}"),
    st.integers(0, 255),
    st.integers(20, 32),
)


@given(st.dictionaries(st.integers(0, 5), st.lists(networks, max_size=4), max_size=4), st.integers(0, 0xFFFF))
def test_ranges_tell_of_each_source_whose_it_is(copies: dict[int, list[Any]], source: int) -> None:
    """The range that an address is in has exactly the copies with a prefix that covers it."""
    at = (10 << 24) + source
    found = [places for start, places in divide(copies, 32) if start <= at][-1]
    expected = {
        place
        for place, each in copies.items()
        if any(at >> 32 - net.length == int.from_bytes(net.address) >> 32 - net.length for net in each)
    }
    assert found == expected
    starts = [start for start, _ in divide(copies, 32)]
    assert starts == sorted(set(starts))


def test_ranges_of_many_prefixes_that_overlap_take_little() -> None:
    """Ranges that have the same copies share one set, and the bound ends the division early."""
    wide = {place: [prefix("10.0.0.0/8")] for place in range(140)}
    cut = {200 + place: [prefix(f"10.{net}.{place}.0/24") for net in range(200)] for place in range(100)}
    found = divide(wide | cut, 32)
    assert len(found) > 20_000
    assert len({id(places) for _, places in found}) == len({places for _, places in found}) < 200
    with pytest.raises(TooManyError):
        divide(wide | cut, 32, 1000)

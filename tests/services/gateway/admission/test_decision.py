"""The order in which a client hears of what is against its request, and that every way in is asked the same."""

import errno
from typing import Any

import msgspec
import pytest

from services.gateway.admission.address_proof import AddressProofs
from services.gateway.admission.decision import Admission, Grant, decide_configured
from services.gateway.admission.destinations import Destinations
from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import NOBODY, Rights
from services.gateway.protocol.requests import (
    Confirm,
    Leave,
    Octets,
    Register,
    Renew,
    RequestError,
    SignUp,
    Transmit,
    Withhold,
)
from services.gateway.registry.entry import Origin
from shared.client import CHALLENGE_PREFIX, Source, Withheld
from shared.settings.entries import Collector
from shared.settings.own_listeners import OwnListeners
from shared.settings.tables import Gateway
from tests.services.gateway.table import Table

SIEM = Rights("siem", frozenset({"collect", "list"}), streams=("syslog",), names=True)
THERE = Peer(7, "192.0.2.7", 4000, SIEM)


class Site:
    """All that a decision depends on: one entry may be had, streams `syslog` and `netflow`, a listener at port 514."""

    def __init__(self, **settings: Any) -> None:
        self.table = Table()
        self.challenges: list[tuple[bytes, str, int]] = []
        self.transmitter = False
        self.destinations = Destinations(
            ["syslog", "netflow"], OwnListeners([("192.0.2.1", 514)]), lambda _: False, {"192.0.2.255"}.__contains__
        )
        self.admission = self.admit(max_clients=1, **settings)

    def admit(self, **settings: Any) -> Admission:
        """An admission by these settings."""
        proofs = AddressProofs(lambda *datagram: self.challenges.append(datagram), lambda: 0.0)
        limits = Gateway(lease_seconds=30, **settings)
        return Admission(limits, self.table, self.destinations, proofs, self._sends_copies, lambda: self.transmitter)

    def _sends_copies(self, source: Source) -> bool:
        return source == "relay" or self.transmitter

    def error(self, request: SignUp | Register | Confirm, peer: Peer = THERE) -> str:
        """The word that a request is refused with."""
        with pytest.raises(RequestError) as refused:
            self.admission.decide(request, peer)
        return refused.value.error

    def enter(self, granted: Grant, peer: Peer = THERE) -> None:
        """Enter what was granted."""
        client, origin, ttl, hold, proven, *_ = granted
        self.table.grant(client, peer, origin, ttl=ttl, hold=hold, proven=proven)


@pytest.fixture
def site() -> Site:
    """Nobody is signed up, no transmitter is there."""
    return Site()


def test_reasons_have_an_order(site: Site) -> None:
    """With everything against it a request is refused for its rights; mended one by one, for each next reason."""
    site.table.join("other", Peer(1, "127.0.0.1", 1))
    wrong: dict[str, Any] = {"streams": ("*", "nothing"), "address": "192.0.2.255", "source": "original"}
    mended: list[tuple[str, dict[str, Any], Peer]] = [
        ("not_permitted", {}, Peer(7, "192.0.2.7", 4000, NOBODY)),
        ("unknown_stream", {}, THERE),
        ("not_permitted", {"streams": ("netflow",)}, THERE),
        ("bad_request", {"streams": ("syslog",)}, THERE),  # no port
        ("bad_request", {"port": 514}, THERE),  # a broadcast address address
        ("loop", {"address": "192.0.2.1"}, THERE),
        ("bad_request", {"port": 9514, "prefixes": ("10.0.0.1/8",)}, THERE),
        ("unproven_address", {"prefixes": ()}, THERE),
        ("no_transmitter", {"address": None}, THERE),
        ("registry_full", {"source": "relay"}, THERE),
    ]
    for expected, change, peer in mended:
        wrong |= change
        assert site.error(Register("c", **wrong), peer) == expected
    assert site.error(Register("other", **wrong)) == "name_taken"
    assert len(site.challenges) == 1


def test_confirmed_register_is_decided_anew(site: Site) -> None:
    """The nonce replaces the proof alone: everything else is asked again, by the rights of the peer that sends it."""
    asked = Register("c", streams=("syslog",), port=9, address="192.0.2.9", ttl=60.0, hold=True, source="original")
    assert site.error(asked) == "unproven_address"
    site.transmitter = True
    nonce = site.challenges[0][0].removeprefix(CHALLENGE_PREFIX).decode()
    confirm = Confirm(name="c", nonce=nonce)
    assert site.error(confirm, Peer(8, "192.0.2.8", 1, NOBODY)) == "not_permitted"
    assert site.error(Confirm(name="c", nonce="x")) == "unproven_address"
    granted = site.admission.decide(confirm, THERE)
    assert (granted.client.address, granted.ttl, granted.hold) == ("192.0.2.9", 60.0, True)
    assert (granted.origin, granted.replaced) == (Origin.JSON, None)
    site.enter(granted)
    again = site.admission.decide(asked, THERE)  # to the same place, on behalf of the same client and host
    assert again.replaced is site.table.find("c")
    assert site.error(asked, Peer(9, "192.0.2.10", 1, SIEM)) == "unproven_address"
    other = Peer(9, THERE.address, 1, Rights("other", frozenset({"collect", "admin"})))
    assert site.error(msgspec.structs.replace(asked, take_over=True), other) == "unproven_address"


def test_name_is_a_register_without_wishes(site: Site) -> None:
    """By the names protocol a client gets what `register` with its name alone would, and the lease of the settings."""
    named, registered = site.admission.decide(SignUp("c"), THERE), site.admission.decide(Register("c"), THERE)
    assert named.client == registered.client
    assert (named.client.address, named.client.port) == ("192.0.2.7", 4000)
    assert (named.origin, named.ttl, registered.origin, registered.ttl) == (Origin.NAMES, 30.0, Origin.JSON, 0.0)
    site.enter(registered)
    assert site.error(SignUp("c"), Peer(8, "192.0.2.8", 1, SIEM)) == "name_taken"
    assert site.error(SignUp("d")) == "registry_full"


def test_group_has_one_source() -> None:
    """A client joins no group of the other source; its only member may change, and groups of other holders differ."""
    site = Site()
    site.transmitter = True
    site.admission = site.admit(max_clients=9)
    relay = Register("a", streams=("syslog",), port=9, group="g")
    original = Register("b", streams=("syslog",), port=10, group="g", source="original")
    site.enter(site.admission.decide(relay, THERE))
    assert site.error(original) == "bad_request"
    other = Peer(9, "192.0.2.9", 1, Rights("other", frozenset({"collect"})))
    site.enter(site.admission.decide(original, other), other)
    site.enter(site.admission.decide(msgspec.structs.replace(relay, source="original"), THERE))
    site.enter(site.admission.decide(msgspec.structs.replace(original, name="c"), THERE))
    assert site.error(relay) == "bad_request"
    site.table.expel([entry for entry in site.table.entries() if entry.client.name == "c"])
    site.enter(site.admission.decide(relay, THERE))
    members = [Collector("a", ("syslog",), "192.0.2.9", 9, group="g"), Collector("b", ("*",), "192.0.2.9", 8)]
    assert len(decide_configured(site.destinations, [*members, Collector("c", ("*",), "192.0.2.9", 7)])) == 3
    mixed = Collector("c", ("*",), "192.0.2.9", 7, group="g", source="original")
    with pytest.raises(ValueError, match='"c": group: \'g\' has members with source "relay"'):
        decide_configured(site.destinations, [*members, mixed])


def test_address_and_port_get_each_datagram_once() -> None:
    """An entry that would bring a datagram twice to one address and port is refused, whoever else has the first.

    Another port, source, other streams or exporters, the same group and its own name are no reason; 64 entries are.
    """
    site = Site()
    site.admission = site.admit(max_clients=99)
    site.transmitter = True
    first = Register("a", streams=("syslog",), port=9, prefixes=("10.0.0.0/8",), group="g")
    site.enter(site.admission.decide(first, THERE))
    second = msgspec.structs.replace(first, name="b", group="")
    neighbour = Peer(9, THERE.address, 1, Rights("other", frozenset({"collect"})))
    same: list[dict[str, Any]] = [
        {}, {"streams": ("syslog", "netflow")}, {"streams": ("*",)}, {"prefixes": ("10.1.0.0/16", "::/0")},
        {"prefixes": ()}, {"group": "h"}, {"sample": 2},
    ]  # fmt: skip
    for change in same:
        assert site.error(msgspec.structs.replace(second, **change), neighbour) == "address_taken"
    assert site.error(second) == "address_taken"
    assert site.error(msgspec.structs.replace(second, group="g"), neighbour) == "address_taken"
    apart: list[dict[str, Any]] = [
        {"name": "a"}, {"port": 10}, {"source": "original"}, {"group": "g"}, {"prefixes": ("11.0.0.0/8", "::/0")},
    ]  # fmt: skip
    for change in apart:
        site.admission.decide(msgspec.structs.replace(second, **change), THERE)
    site.admission.decide(msgspec.structs.replace(second, streams=("netflow",)), neighbour)
    site.admission.decide(msgspec.structs.replace(second, streams=()), THERE)
    for number in range(63):
        site.enter(site.admission.decide(msgspec.structs.replace(first, name=f"m{number}"), THERE))
    assert site.error(msgspec.structs.replace(first, name="b")) == "address_taken"
    site.admission.decide(first, THERE)


def test_configured_collectors_have_the_same_destinations(site: Site) -> None:
    """A collector of the settings is refused a loop and an address that is no host's, by name; it needs no proof."""
    fine = Collector("a", ("syslog",), "192.0.2.9", 9)
    (client,) = decide_configured(site.destinations, [fine])
    assert (client.name, client.address, client.streams) == ("a", "192.0.2.9", ("syslog",))
    for address, port, why in (("192.0.2.1", 514, "loop|own listeners"), ("192.0.2.255", 9, "a broadcast address")):
        with pytest.raises(ValueError, match=rf'"b": .*({why})'):
            decide_configured(site.destinations, [fine, Collector("b", ("*",), address, port)])


def test_kernel_that_can_not_tell_is_no_refusal() -> None:
    """An error of the kernel when it can't be asked comes through; for a collector of the settings with its name."""

    def fail(_address: str) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    site = Site()
    site.destinations = site.admission.destinations = Destinations(["syslog"], OwnListeners(()), fail, fail)
    with pytest.raises(OSError, match="Too many"):
        site.admission.decide(Register("c", streams=("syslog",), port=9), THERE)
    with pytest.raises(ValueError, match=r'"a": Too many open files'):
        decide_configured(site.destinations, [Collector("a", ("syslog",), "192.0.2.9", 9)])


def test_change_of_an_entry_is_decided(site: Site) -> None:
    """To renew or leave takes the scope, the generation and the holder."""
    site.enter(site.admission.decide(Register("c"), THERE))
    entry = site.table.find("c")
    assert entry is not None
    generation = entry.client.generation
    for kind in (Renew, Leave):
        assert site.admission.decide_change(kind(name="c", generation=generation), THERE) is entry
        for given, peer, expected in (
            (generation, Peer(8, "192.0.2.7", 1, NOBODY), "not_permitted"),
            (generation, Peer(8, "192.0.2.7", 1, Rights("other", frozenset({"collect"}))), "not_permitted"),
            (generation + 1, THERE, "stale_generation"),
        ):
            with pytest.raises(RequestError) as refused:
                site.admission.decide_change(kind(name="c", generation=given), peer)
            assert refused.value.error == expected


@pytest.mark.parametrize(
    ("allowed", "transmitter", "scopes", "expected"),
    [
        (True, True, {"transmit"}, ""),
        (True, False, {"transmit"}, "no_transmitter"),
        (False, True, {"transmit"}, "not_permitted"),
        (True, True, {"collect"}, "not_permitted"),
    ],
)
def test_frames_take_the_setting_a_scope_and_a_transmitter(
    allowed: bool, transmitter: bool, scopes: set[Any], expected: str
) -> None:
    """Frames are sent for clients that may have them sent, where the settings allow it and somebody can."""
    site = Site(allow_transmit=allowed)
    site.transmitter = transmitter
    request, peer = (
        Transmit(interface="eth0", frame=Octets(bytes(14))),
        Peer(1, "::1", 1, Rights("a", frozenset(scopes))),
    )
    if not expected:
        site.admission.decide_transmit(request, peer)
        return
    with pytest.raises(RequestError) as refused:
        site.admission.decide_transmit(request, peer)
    assert refused.value.error == expected


def test_no_more_names_are_withheld_than_there_may_be_clients(site: Site) -> None:
    """An order outlasts its collector, so their number has a limit; one that is there already may be given anew."""
    boss = Peer(8, "127.0.0.1", 4001)
    site.table.collect("siem")
    site.table.withheld["gone"] = Withheld("", 1.0)
    with pytest.raises(RequestError, match="1 names are withheld already; release some first") as refused:
        site.admission.decide_withhold(Withhold(name="siem"), boss)
    assert refused.value.error == "registry_full"
    site.table.withheld = {"siem": Withheld("", 1.0)}
    assert site.admission.decide_withhold(Withhold(name="siem"), boss).client.name == "siem"
    with pytest.raises(RequestError, match=r"signed up as 'other'; op list \(`fanwire clients`\) shows all"):
        site.admission.decide_withhold(Withhold(name="other"), boss)

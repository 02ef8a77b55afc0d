from ipaddress import ip_network

import pytest

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.protocol.requests import Register, RequestError
from shared.settings.entries import Collector
from shared.settings.own_listeners import OwnListeners

LOCAL = {"127.0.0.1", "127.9.9.9", "::1", "192.0.2.1"}
LISTENERS = [("127.0.0.1", 6667), ("::1", 6667), ("0.0.0.0", 514), ("::", 2055)]
rules = Destinations(["messages", "netflow"], OwnListeners(LISTENERS), LOCAL.__contains__, {"192.0.2.255"}.__contains__)


def destination(
    address: str | None = None, port: int | None = 9000, peer: str = "127.0.0.1", streams: tuple[str, ...] = ("*",)
) -> tuple[str, int]:
    """Return the destination of copies for this request."""
    request = Register(name="c", streams=streams, address=address, port=port)
    client = rules.resolve(request, Peer(1, peer, 40_000))
    return client.address, client.port


def error_of(*arguments: object, **options: object) -> str:
    """The error word that `destination` is refused with."""
    with pytest.raises(RequestError) as caught:
        destination(*arguments, **options)  # type: ignore[arg-type]
    return caught.value.error


def test_address_is_the_visitors_own_by_default() -> None:
    """Copies go to where the request came from unless it says otherwise; a name alone keeps its TCP port."""
    assert destination(peer="192.0.2.9") == ("192.0.2.9", 9000)
    assert destination(port=None, streams=()) == ("127.0.0.1", 40_000)


def test_address_is_written_one_way() -> None:
    """An address is normalised, and IPv4 mapped into IPv6 is IPv4."""
    assert destination("2001:DB8:0:0::9", peer="2001:db8::9") == ("2001:db8::9", 9000)
    assert destination("::ffff:127.0.0.1") == ("127.0.0.1", 9000)


def test_loopback_may_name_any_loopback_address() -> None:
    """On this host one loopback address is as good as another."""
    assert destination("127.0.0.7") == ("127.0.0.7", 9000)
    assert destination("::1") == ("::1", 9000)


@pytest.mark.parametrize(
    ("address", "peer", "proven"),
    [
        (None, "192.0.2.9", True),
        ("192.0.2.9", "192.0.2.9", True),
        ("::ffff:192.0.2.9", "192.0.2.9", True),
        ("127.0.0.7", "127.0.0.1", True),
        ("::1", "127.0.0.1", True),
        ("192.0.2.8", "192.0.2.9", False),
        ("10.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "192.0.2.9", False),
    ],
)
def test_address_of_somebody_else(address: str | None, peer: str, proven: bool) -> None:
    """An address that the request does not come from has to be proven: copies would be aimed at others."""
    request = Register(name="c", streams=("*",), address=address, port=9000)
    assert rules.need_proof(request, Peer(1, peer, 40_000)) is not proven


@pytest.mark.parametrize(
    ("address", "proven"),
    [("10.2.0.9", True), ("::ffff:10.2.0.9", True), ("10.9.0.9", True), ("fd00::9", True), ("10.3.0.9", False)],
)
def test_address_that_the_operator_allows(address: str, proven: bool) -> None:
    """To networks of the settings and of the peer's token copies go without proof."""
    destinations = ["10.2.0.0/24", "fd00::/8"]
    listed = Destinations(["messages"], OwnListeners(LISTENERS), LOCAL.__contains__, LOCAL.__contains__, destinations)
    rights = Rights("siem", frozenset({"collect"}), destinations=(ip_network("10.9.0.0/16"),))
    request = Register(name="c", streams=("*",), address=address, port=9000)
    assert listed.need_proof(request, Peer(1, "192.0.2.9", 40_000, rights)) is not proven


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "224.0.0.1", "240.0.0.1", "255.255.255.255", "169.254.1.1"),
        *("192.0.2.255", "::ffff:0.0.0.0", "::ffff:224.0.0.1", "::ffff:255.255.255.255", "::ffff:192.0.2.255"),
        *("::", "ff02::1", "fe80::1", "fe80::1%lo", "localhost", "127.1", ""),
    ],
)
def test_address_that_is_no_hosts(address: str) -> None:
    """A destination that is not the unicast address of one host is refused."""
    assert error_of(address) == "bad_request"


def test_link_local_address_is_named() -> None:
    """A link-local address is one of a host, so the refusal says what else is wrong with it."""
    with pytest.raises(RequestError, match="expected a unicast address, and no link-local one"):
        destination("169.254.1.1")


@pytest.mark.parametrize(
    ("address", "port", "peer"),
    [
        (None, 6667, "127.0.0.1"),
        ("::1", 6667, "127.0.0.1"),
        ("127.9.9.9", 514, "127.0.0.1"),
        (None, 2055, "192.0.2.1"),
        (None, 2055, "::1"),
    ],
)
def test_own_listener_is_a_loop(address: str | None, port: int, peer: str) -> None:
    """Copies never go to a listener of our own; one on every address covers all of this host's."""
    assert error_of(address, port, peer) == "loop"


def test_same_port_elsewhere_is_no_loop() -> None:
    """The port alone is no loop."""
    assert destination("127.0.0.2", 6667) == ("127.0.0.2", 6667)
    assert destination(port=514, peer="192.0.2.9") == ("192.0.2.9", 514)
    assert destination(port=514, peer="::1") == ("::1", 514)


def test_streams_must_be_there() -> None:
    """A stream is one of the settings, or all of them; to receive takes a port."""
    assert error_of(streams=("nothing",)) == "unknown_stream"
    assert error_of(port=None) == "bad_request"


def test_what_was_asked_of_the_copies_is_entered() -> None:
    """Source, hop limit and DSCP are the entry's, from a request and from the settings; else those of most copies."""
    register = Register(name="c", streams=("*",), port=9, source="original", hop_limit=3, dscp=46)
    collector = Collector(
        name="c", streams=("*",), address="127.0.0.1", port=9, source="original", hop_limit=3, dscp=46
    )
    plain = Register(name="c", streams=("*",), port=9)
    here = Peer(1, "127.0.0.1", 1)
    admitted = [rules.resolve(register, here), rules.resolve_configured(collector), rules.resolve(plain, here)]
    assert admitted[0] == admitted[1]
    assert [(each.source, each.hop_limit, each.dscp) for each in admitted[1:]] == [
        ("original", 3, 46),
        ("relay", 64, 0),
    ]


@pytest.mark.parametrize("prefix", ["x", "10.0.0.1/8", "10.0.0.0/33", ""])
def test_prefixes_are_networks(prefix: str) -> None:
    """`from` takes networks in CIDR notation only."""
    with pytest.raises(RequestError, match="from: "):
        rules.resolve(Register(name="c", prefixes=(prefix,)), Peer(1, "127.0.0.1", 1))


def test_configured_collector_needs_no_proof_but_no_loop() -> None:
    """The operator may send copies anywhere but to ourselves."""
    admitted = rules.resolve_configured(Collector(name="s", streams=("*",), address="10.0.0.1", port=9))
    assert (admitted.address, admitted.port) == ("10.0.0.1", 9)
    with pytest.raises(RequestError, match="fanwire's own listeners"):
        rules.resolve_configured(Collector(name="s", streams=("*",), address="127.0.0.1", port=6667))

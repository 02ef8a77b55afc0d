import doctest
import ipaddress
import socket
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shared.net.addresses
from shared.net.addresses import (
    Endpoint,
    pack_address,
    pack_network,
    parse_endpoint,
    resolve,
    unpack_address,
)

SCHEMES = ("udp", "tcp", "unixgram", "unix")


def test_examples_in_the_docstrings_hold() -> None:
    """The module's own examples give what they say."""
    failed, tried = doctest.testmod(shared.net.addresses)
    assert tried >= 4
    assert failed == 0


@given(st.ip_addresses())
def test_packed_address_comes_back(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    """An address is 16 bytes on the bus and comes back as it was; a mapped one comes back as IPv4."""
    packed = pack_address(str(address))
    assert len(packed) == 16
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    assert ipaddress.ip_address(unpack_address(packed)) == (mapped or address)


@pytest.mark.parametrize("text", ["", "localhost", "192.0.2", "192.0.2.256", "2001:db8:::1", "192.0.2.1/24", "1" * 50])
def test_what_is_no_address_is_refused(text: str) -> None:
    """ValueError when a text is not an address."""
    with pytest.raises(ValueError, match="does not appear to be"):
        pack_address(text)


@pytest.mark.parametrize(
    ("text", "first", "bits"),
    [
        ("0.0.0.0/0", "0.0.0.0", 96),
        ("192.0.2.0/24", "192.0.2.0", 120),
        ("192.0.2.7", "192.0.2.7", 128),
        ("::/0", "::", 0),
        ("2001:db8::/32", "2001:db8::", 32),
    ],
)
def test_network_is_counted_out_of_128_bits(text: str, first: str, bits: int) -> None:
    """An IPv4 prefix is 96 bits longer on the bus, where addresses are mapped."""
    packed, length = pack_network(text)
    assert (unpack_address(packed), length) == (first, bits)


@pytest.mark.parametrize("text", ["192.0.2.1/24", "192.0.2.0/33", "2001:db8::/129", "any", ""])
def test_what_is_no_network_is_refused(text: str) -> None:
    """ValueError when a text is not a prefix, or has bits beyond it."""
    with pytest.raises(ValueError, match=r"has host bits set|does not appear to be|is not permitted"):
        pack_network(text)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("udp://localhost:6667", Endpoint("udp", "localhost", 6667)),
        ("udp://0.0.0.0:1", Endpoint("udp", "0.0.0.0", 1)),
        ("tcp://[::1]:65535", Endpoint("tcp", "::1", 65535)),
        ("unixgram:///run/fanwire/in.sock", Endpoint("unixgram", path="/run/fanwire/in.sock")),
        ("unix:///" + "x" * 106, Endpoint("unix", path="/" + "x" * 106)),
    ],
)
def test_endpoint_is_read_and_written(text: str, endpoint: Endpoint) -> None:
    """An endpoint is read from the text that it is written as."""
    assert parse_endpoint(text, SCHEMES) == endpoint
    assert str(endpoint) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost:6667", r"does not begin with udp:// or tcp:// or"),
        ("http://localhost:6667", r"does not begin with udp:// or tcp:// or"),
        ("udp://localhost", r"expected udp://HOST:PORT with a port from 1 to 65535"),
        ("udp://:6667", r"expected udp://HOST:PORT"),
        ("udp://localhost:", r"a port from 1 to 65535"),
        ("udp://localhost:0", r"a port from 1 to 65535"),
        ("udp://localhost:65536", r"a port from 1 to 65535"),
        ("udp://localhost:-1", r"a port from 1 to 65535"),
        ("udp://localhost:\u0661", r"a port from 1 to 65535"),
        ("udp://localhost:" + "9" * 5000, r"a port from 1 to 65535"),
        ("udp://::1:6667", r"an IPv6 address goes in brackets, as in udp://\[::1\]:6667"),
        ("unix://run/x.sock", r"expected an absolute path of at most 107 bytes after unix://"),
        ("unix:///" + "x" * 107, r"expected an absolute path of at most 107 bytes after unix://"),
    ],
)
def test_wrong_endpoint_says_what_was_expected(text: str, expected: str) -> None:
    """ValueError says which form an endpoint has."""
    with pytest.raises(ValueError, match=expected):
        parse_endpoint(text, SCHEMES)


@given(st.text() | st.tuples(st.sampled_from(SCHEMES), st.text()).map("://".join))
def test_any_endpoint_comes_back_or_is_refused(text: str) -> None:
    """A text is refused by ValueError, or read and then written as something that reads the same."""
    try:
        endpoint = parse_endpoint(text, SCHEMES)
    except ValueError:
        return
    assert parse_endpoint(str(endpoint), SCHEMES) == endpoint


def test_literal_address_resolves_to_itself() -> None:
    """A literal address is one address, of its own family."""
    assert resolve("127.0.0.1", 9, socket.SOCK_DGRAM) == [(socket.AF_INET, ("127.0.0.1", 9))]
    assert resolve("::1", 9, socket.SOCK_DGRAM) == [(socket.AF_INET6, ("::1", 9, 0, 0))]


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64, "x\0y", "a..b"])
def test_host_that_is_not_known_is_an_os_error(lab: None, host: str) -> None:
    """OSError for a name that nobody knows, and for one that can't be a name at all."""
    with pytest.raises(OSError, match=r"."):
        resolve(host, 9, socket.SOCK_DGRAM)


def test_a_resolver_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without an answer in time is an OSError that says so."""
    let_go = Event()

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        let_go.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(socket.gaierror, match="no answer within"):
        resolve("slow.example", 9, socket.SOCK_DGRAM, 0.01)
    let_go.set()


@pytest.mark.parametrize("text", ["fe80::1%eth0", "fe80::1%1"])
def test_an_address_with_a_scope_is_refused(text: str) -> None:
    """Sixteen bytes have no room for a scope, so an address that needs one is not taken."""
    with pytest.raises(ValueError, match="scope"):
        pack_address(text)

import socket
from contextlib import closing

import pytest

from shared.net.bpf import refuse_mapped_sources
from shared.net.sockets import kernel_drops
from tests.forging import forging


@pytest.mark.parametrize("only_ipv6", [False, True])
def test_an_ipv4_source_comes_by_ipv4_alone(lab: None, only_ipv6: bool) -> None:
    """A datagram that claims an IPv4 source in an IPv6 header is dropped and counted; all others are received whole."""
    with closing(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as sock, forging() as forger:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
        refuse_mapped_sources(sock)
        sock.bind(("::", 0))
        sock.settimeout(60)
        port = sock.getsockname()[1]
        sources = [
            "::1",
            "2001:db8::1",
            "::",
            "::ffff:0:c000:201",
            "::2:c000:201",
            "1::ffff:c000:201",
            "0:1::ffff:c000:201",
        ]
        for number, source in enumerate(sources):
            for claimed in ("192.0.2.1", "127.0.0.1", "0.0.0.0"):
                forger.send((f"::ffff:{claimed}", 514), ("::1", port), b"not this")
            forger.send((source, 514), ("::1", port), bytes([number]) * 3000 if number % 2 else b"")
            payload, came = sock.recvfrom(65_535)
            assert (payload, came[0]) == (bytes([number]) * 3000 if number % 2 else b"", source)
        assert kernel_drops(sock) == 3 * len(sources)
        if not only_ipv6:
            forger.send(("127.0.0.9", 514), ("127.0.0.1", port), b"by IPv4")
            assert sock.recvfrom(100)[0] == b"by IPv4"

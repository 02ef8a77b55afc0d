import errno
import socket

import pytest

from services.gateway.transport.listeners import is_local, listening
from shared.net import sockets
from shared.net.addresses import parse_endpoint
from shared.net.sockets import KEEPALIVE
from tests.network import End, Host, veth

NOBODY = "02:00:00:00:00:99"


@pytest.mark.parametrize("unacknowledged", [False, True])
def test_peer_that_has_vanished(lab: None, monkeypatch: pytest.MonkeyPatch, unacknowledged: bool) -> None:
    """A connection ends when its peer has gone without a word, be it idle or with something still on its way there."""
    quick = {socket.TCP_USER_TIMEOUT: 2000}
    monkeypatch.setattr(sockets, "KEEPALIVE", [(option, quick.get(option, 1)) for option, _ in KEEPALIVE])
    with (
        Host() as relay,
        Host() as siem,
        veth(End(relay, "eth", "10.2.0.1/24"), End(siem, "eth", "10.2.0.2/24")),
        siem.socket(socket.AF_INET, socket.SOCK_STREAM) as client,
        relay.entered(),
        listening([parse_endpoint("tcp://10.2.0.1:5000", ("tcp",))]) as [listener],
    ):
        listener.sock.listen()
        client.connect(("10.2.0.1", 5000))
        with listener.sock.accept()[0] as connection:
            connection.settimeout(60)
            relay.neighbour("10.2.0.2", NOBODY, "eth")
            if unacknowledged:
                connection.send(b"an event")
            with pytest.raises(OSError, match="timed out") as caught:
                connection.recv(100)
            assert caught.value.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("anything_may_be_bound", [0, 1])
def test_addresses_of_this_host(lab: None, anything_may_be_bound: int) -> None:
    """Datagrams to this host's own addresses stay here, and no others do, even where any address may be bound."""
    with (
        Host() as relay,
        Host() as siem,
        veth(End(relay, "eth", "10.2.0.1/24 fd00:2::1/64"), End(siem, "eth", "10.2.0.2/24")),
        relay.entered(),
    ):
        relay.sysctl("net.ipv4.ip_nonlocal_bind", anything_may_be_bound)
        relay.sysctl("net.ipv6.ip_nonlocal_bind", anything_may_be_bound)
        relay.run("ip", "address", "add", "10.2.0.77/24", "dev", "eth")
        for ours in ("127.0.0.1", "127.9.9.9", "::1", "10.2.0.1", "10.2.0.77", "fd00:2::1"):
            assert is_local(ours), ours
        for other in ("10.2.0.2", "10.2.0.255", "fd00:2::2", "198.51.100.1", "2001:db8::1", "255.255.255.255"):
            assert not is_local(other), other

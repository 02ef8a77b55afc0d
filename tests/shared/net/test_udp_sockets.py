import socket
import struct
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from shared.net.udp_sockets import UdpSocket, parse_answer, udp_sockets


def test_lists_what_is_open(lab: None) -> None:
    """A socket is listed with its address, the buffer that it asked for, and what the kernel has dropped there."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as receiver, socket.socket(family, socket.SOCK_DGRAM) as sender:
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5000)
            receiver.bind((host, 0))
            port = receiver.getsockname()[1]
            (found,) = [each for each in udp_sockets() if each.port == port]
            assert found == UdpSocket(host, port, "::" if ":" in host else "0.0.0.0", 0, 5000, 0)
            for _ in range(100):
                sender.sendto(bytes(1000), (host, port))
            (full,) = [each for each in udp_sockets() if each.port == port]
            assert 0 < full.dropped < 100


@given(st.binary(max_size=300), st.sampled_from([socket.AF_INET, socket.AF_INET6]))
def test_any_answer_is_read_or_refused(data: bytes, family: int) -> None:
    """An answer of the kernel is a socket, none, or `struct.error`, whatever its bytes."""
    with suppress(struct.error):
        assert all(isinstance(each, UdpSocket) for each in parse_answer(family, data))

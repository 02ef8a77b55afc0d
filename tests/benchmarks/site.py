"""Three hosts in a row: exporters, the relay, and collectors, with cables between them and no way out.

The exporters are one packet socket: it puts every exporter's frames on the cable by the same system call, so offering
costs little beside relaying. Their UDP checksums are left to the device, as a NIC's would be. Collectors are sockets
that the kernel counts and empties by itself, at the very end of a datagram's way.
"""

import ctypes
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import numpy as np

from services.transmitter.packet_socket import PACKET_VNET_HDR, SOCKADDR_LL, SOL_PACKET
from services.transmitter.packets.headers import ETHERTYPE_IPV4, GSO_UDP_L4, HEADERS4, LINK_SIZE, NEEDS_CSUM, UDP, fold
from shared.datagrams.mmsg import IOVEC, MMSGHDR, UDP_GRO, addresses_of, send
from shared.net.sockets import MEMINFO, SO_MEMINFO, enlarge_receive_buffer, enlarge_send_buffer
from tests.benchmarks.workloads import MARK_SIZE, PROBE, Workload, exporter_address
from tests.network import End, Host, veth

RELAY: Final = "10.81.255.254"
PORT: Final = 7000
"""The port that exporters send to."""
COLLECTOR_PORT: Final = 9100
COLLECTOR_HOSTS: Final = 64
SINK_BUFFER: Final = 1 << 29
SO_ATTACH_FILTER: Final = 26
HEX_DIGITS: Final = np.frombuffer(b"0123456789abcdef", np.uint8)
SO_DETACH_FILTER: Final = 27
PROBES_ALONE: Final = (
    (0x80, 0, 0, 0),  # A = length
    (0x14, 0, 0, 1),  # A = A - 1
    (0x07, 0, 0, 0),  # X = A
    (0x50, 0, 0, 0),  # A = byte at X
    (0x15, 0, 1, PROBE),  # if A is PROBE:
    (0x06, 0, 0, 0xFFFF),  # take it
    (0x06, 0, 0, 0),  # else drop it, and count
)
"""Classic BPF (linux/filter.h) that lets the last byte decide."""


def collector_address(number: int) -> str:
    """The address of a collector; when there are more than 64, some share it."""
    return f"10.82.0.{10 + number % COLLECTOR_HOSTS}"


def collector_port(number: int) -> int:
    """The port of a collector."""
    return COLLECTOR_PORT + number // COLLECTOR_HOSTS


class Offer:
    """A workload as frames for sendmmsg(2), ready to leave again and again."""

    def __init__(self, workload: Workload, sock: socket.socket, link_index: int, ethernet: bytes) -> None:
        self.workload = workload
        self._socket = sock
        payloads = workload.payloads()
        self.count = count = len(payloads)
        self._together = together = workload.burst if workload.trains else 1
        self._payload = np.frombuffer(bytearray(b"".join(payloads)), np.uint8)
        lengths = np.array([len(payload) for payload in payloads])
        exporters = np.array([workload.exporter(number) for number in range(count)])
        self._headers = headers = np.zeros(count, HEADERS4)
        headers["flags"], headers["csum_start"], headers["csum_offset"] = NEEDS_CSUM, 34, 6
        headers["ethernet"] = np.frombuffer(ethernet + ETHERTYPE_IPV4.to_bytes(2), "V14")
        headers["version"], headers["hop_limit"], headers["protocol"] = 0x45, 64, UDP
        sizes = lengths * together
        headers["length"], headers["udp_length"] = sizes + 28, sizes + 8
        if workload.trains:
            headers["gso_type"], headers["gso_size"], headers["header_length"] = GSO_UDP_L4, lengths, 42
        sources = b"".join(exporter_address(each).packed for each in range(workload.exporters))
        headers["source"] = np.frombuffer(sources, "V4")[exporters]
        headers["destination"] = np.frombuffer(socket.inet_aton(RELAY), "V4")
        headers["source_port"], headers["port"] = 20_000 + exporters, PORT + exporters % workload.streams
        words = headers.view(np.uint8).reshape(count, -1)
        addresses = words[:, LINK_SIZE + 12 : LINK_SIZE + 20].copy().view(">u2").sum(axis=1, dtype=np.uint32)
        headers["udp_checksum"] = fold(addresses + UDP + headers["udp_length"])
        ip = words[:, LINK_SIZE : LINK_SIZE + 20].copy().view(">u2").sum(axis=1, dtype=np.uint32)
        headers["checksum"] = fold(ip) ^ 0xFFFF
        self._pieces = pieces = np.zeros((count, 2), IOVEC)
        pieces["base"][:, 0], pieces["len"][:, 0] = addresses_of(headers, HEADERS4.itemsize, count), HEADERS4.itemsize
        start = self._payload.ctypes.data
        self._ends = np.cumsum(lengths)
        pieces["base"][:, 1], pieces["len"][:, 1] = start + np.cumsum(lengths) - lengths, sizes
        name = SOCKADDR_LL.pack(socket.AF_PACKET, socket.htons(ETHERTYPE_IPV4), link_index, 0, 0, 6, ethernet[:6])
        self._name = np.frombuffer(name, np.uint8)
        messages = np.zeros(count, MMSGHDR)
        messages["name"], messages["namelen"] = self._name.ctypes.data, len(name)
        messages["iov"], messages["iovlen"] = addresses_of(pieces, 2 * IOVEC.itemsize, count), 2
        self._messages = messages[::together].copy()

    def number_from(self, first: int, start: int, stop: int) -> None:
        """Give datagrams `start` to `stop` other numbers in their marks, counted from `first`."""
        numbers = np.arange(first, first + stop - start)[:, None] >> np.arange(28, -4, -4)
        self._payload[self._ends[start:stop, None] + np.arange(-9, -1)] = HEX_DIGITS[numbers & 15]

    def send(self, start: int, stop: int) -> None:
        """Put datagrams `start` to `stop` on the cable, and whole trains."""
        start, stop = start // self._together, -(-stop // self._together)
        while start < stop:
            taken, _ = send(self._socket.fileno(), self._messages, start, stop)
            start += taken

    def send_all(self) -> None:
        """Put the whole workload on the cable."""
        self.send(0, self.count)


class Sink:
    """A collector's socket; with `whole` it takes pieces of so many bytes a datagram (UDP_GRO, udp(7))."""

    def __init__(self, sock: socket.socket, whole: int = 0) -> None:
        self.socket = sock
        self.whole = whole
        if whole:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)

    def discard(self) -> None:
        """From now on queue probes alone; the others are dropped by a filter, and counted."""
        program = b"".join(struct.pack("=HBBI", *each) for each in PROBES_ALONE)
        room = ctypes.create_string_buffer(program)
        self.socket.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(PROBES_ALONE), ctypes.addressof(room))
        )

    def read(self) -> list[bytes]:
        """Take out the marks of all that lies in the buffer."""
        marks = []
        while True:
            try:
                piece = self.socket.recv(65536)
                ends = range(self.whole, len(piece) + 1, self.whole) if self.whole else (len(piece),)
                marks += [piece[end - MARK_SIZE : end] for end in ends]
            except BlockingIOError:
                return marks

    @property
    def dropped(self) -> int:
        """Datagrams that were discarded so far; 32 bits."""
        return int(self._memory()[-1])

    @property
    def moved(self) -> int:
        """Grows with every datagram that arrives."""
        queued, *_, dropped = self._memory()
        return int(queued + dropped)

    def _memory(self) -> tuple[int, ...]:
        return MEMINFO.unpack(self.socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))


class Site:
    """The hosts and what stands in them."""

    def __init__(self, opened: ExitStack, mtu: int) -> None:
        self.exporters, self.relay, self.collectors = (opened.enter_context(Host()) for _ in range(3))
        self.exporters_end = End(self.exporters, "out", "10.81.255.253/16")
        self._in = End(self.relay, "in", f"{RELAY}/16")
        self._up = End(self.relay, "up", "10.82.0.1/24")
        self._eth = End(
            self.collectors, "eth", " ".join(f"{collector_address(number)}/24" for number in range(COLLECTOR_HOSTS))
        )
        opened.enter_context(veth(self.exporters_end, self._in, mtu, checksum_offload=True))
        opened.enter_context(veth(self._up, self._eth, mtu, checksum_offload=True))
        self.collectors.route("10.81.0.0/16", "10.82.0.1")
        self._sender = opened.enter_context(self.exporters.socket(socket.AF_PACKET, socket.SOCK_RAW))
        self._sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        enlarge_send_buffer(self._sender, 1 << 24)

    @property
    def in_name(self) -> str:
        """The name of the relay's link to the exporters."""
        return self._in.name

    @property
    def up_name(self) -> str:
        """The name of the relay's link to the collectors."""
        return self._up.name

    @property
    def up_index(self) -> int:
        """The number of the link to the collectors."""
        return int(self.relay.link(self._up.name)["ifindex"])

    @property
    def ethernet_to_collectors(self) -> bytes:
        """Destination and source of frames to them, 12 bytes."""
        return bytes.fromhex((self._eth.link_address + self._up.link_address).replace(":", ""))

    def offer(self, workload: Workload) -> Offer:
        """A workload, ready to be sent to the relay."""
        ethernet = bytes.fromhex((self._in.link_address + self.exporters_end.link_address).replace(":", ""))
        index = int(self.exporters.link(self.exporters_end.name)["ifindex"])
        return Offer(workload, self._sender, index, ethernet)

    @contextmanager
    def sinks(self, fan_out: int, whole: int = 0, first: int = 0) -> Iterator[list[Sink]]:
        """Start a number of collectors, from number `first` on; see `Sink` for `whole`."""
        with ExitStack() as opened:
            found = []
            for number in range(first, first + fan_out):
                sock = opened.enter_context(self.collectors.socket(socket.AF_INET, socket.SOCK_DGRAM))
                enlarge_receive_buffer(sock, SINK_BUFFER)
                sock.bind((collector_address(number), collector_port(number)))
                sock.setblocking(False)
                found.append(Sink(sock, whole))
            yield found


@contextmanager
def site(mtu: int) -> Iterator[Site]:
    """Build the hosts; nothing of them is left afterwards."""
    with ExitStack() as opened:
        yield Site(opened, mtu)

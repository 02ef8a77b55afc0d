"""The tables that are there once, such as `[gateway]`: each setting's type, default and constraints."""

import os
from functools import partial
from pathlib import Path
from string import Template
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from shared.net.addresses import Endpoint, is_name, pack_network, parse_endpoint
from shared.settings.values import (
    MAX_PORT,
    Bytes,
    Ceiling,
    Count,
    Ethertype,
    FullPath,
    Seconds,
    check_each,
    leave_room,
    parse_ethertype,
)

BUS_SCHEMES: Final = ("tcp",)
REGISTRY_SCHEMES: Final = ("tcp", "unix", "tls")
CONSOLE_SCHEMES: Final = ("http", "https", "unix")
CLIENT_BYTES: Final = 4096
"""Bytes that an entry of the registry takes in the gateway."""
LEAST_GENERATIONS: Final = 0xFF
MOST_GENERATIONS: Final = 0xFFFF
"""`shared.bus.bodies.offload_messages.MAX_GENERATION`."""
CONNECTION_BYTES: Final = 98_304
"""Bytes that a TCP connection to ingest may take: the longest message, unfinished, and one more read."""


class Bus(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bus, at which the processes meet."""

    directory: FullPath = "$XDG_RUNTIME_DIR/fanwire"
    """Holds the ipc sockets; without XDG_RUNTIME_DIR a directory of this user under /tmp."""
    high_water_mark: Annotated[int, Meta(ge=1, le=65_536)] = 2048
    """Messages a queue of the bus holds before it drops. One counts once more for each 64 KiB that it has."""
    pool: Annotated[int, Meta(ge=0, le=1 << 30)] = 67_108_864
    """Bytes of memory that a worker may lend a stream's payloads in; 0: all go through the bus."""
    listen: tuple[str, ...] = ()
    """tcp://HOST:PORT where the broker takes connections besides ipc, publishers at PORT, subscribers at PORT + 1."""
    connect: str = ""
    """tcp://HOST:PORT of a broker on another host; "": the one in the directory."""
    keys: str = ""
    """Directory of the services' keys, made by `fanwire keys`; "": any process that may enter the bus directory is
    trusted."""

    def __post_init__(self) -> None:
        check_each("listen", self._check_endpoint, self.listen)
        check_each("connect", self._check_endpoint, [self.connect] if self.connect else [])

    def _check_endpoint(self, text: str) -> None:
        endpoint = parse_endpoint(text, BUS_SCHEMES)
        if endpoint.port == MAX_PORT:
            raise ValueError(f"{text!r}: expected a port up to {MAX_PORT - 1}: subscribers have the next one")
        if not self.keys:  # on loopback too: every local user could publish a registry, or play the broker
            raise ValueError(
                f"{text!r} is open to every user, so the bus needs keys; set [bus] keys = DIRECTORY, and make them "
                "with `fanwire keys DIRECTORY`"
            )

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """`listen`, parsed."""
        return tuple(parse_endpoint(text, BUS_SCHEMES) for text in self.listen)

    @property
    def broker(self) -> Endpoint | None:
        """`connect`, parsed."""
        return parse_endpoint(self.connect, BUS_SCHEMES) if self.connect else None

    @property
    def name_hint(self) -> str:
        """Advice for a broker that does not answer, where `connect` has a host name; else empty."""
        if self.broker is None or not is_name(self.broker.host):
            return ""
        return f"; `getent hosts {self.broker.host}` says whether its name has an address here"

    @property
    def key_directory(self) -> Path | None:
        """`keys` with variables filled in."""
        return Path(os.path.expandvars(self.keys)) if self.keys else None

    @property
    def lent(self) -> int:
        """Bytes that a worker may lend: memory can't be lent to another host."""
        return 0 if self.connect else self.pool

    @property
    def path(self) -> Path:
        """The directory with variables filled in: systemd's RUNTIME_DIRECTORY, XDG_RUNTIME_DIR, or /tmp."""
        if self.directory == Bus().directory and (runtime := os.environ.get("RUNTIME_DIRECTORY")):
            return Path(runtime.partition(":")[0])
        given = {name: value for name, value in os.environ.items() if value}  # an empty one is none (XDG)
        text = Template(self.directory).safe_substitute(given)
        return Path(f"/tmp/fanwire-{os.geteuid()}") if "$" in text else Path(text)


class Broker(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The broker, which passes messages between the services."""

    memory: Ceiling = 805_306_368
    """Bytes that the process may take; from half of it on subscribers that read nothing are cut off."""


class Gateway(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The client registry."""

    listen: Annotated[tuple[str, ...], Meta(min_length=1)] = ("tcp://127.0.0.1:5000",)
    """tcp://HOST:PORT on loopback, unix:///PATH, or tls://HOST:PORT."""
    certificate: str = ""
    """A PEM file: what tls:// listeners show, and the certificates of its issuers. Variables as in `database`."""
    key: str = ""
    """A PEM file: the certificate's private key."""
    client_authorities: str = ""
    """A PEM file: clients may show a certificate that one of these has signed; "": none is asked for."""
    tokens: str = ""
    """A file with more [[token]], readable by its owner only; "": none."""
    names_beyond_loopback: bool = False
    """Allow the names protocol to clients with a certificate on a listener that is not loopback."""
    destinations: tuple[str, ...] = ()
    """Networks to which any client that may sign up may have copies sent without proof."""
    max_clients: Count = 10_000
    max_clients_per_holder: Count = 1000
    """Clients signed up with one token or certificate."""
    max_connections: Count = 4096
    """Open at once; one more is answered `unavailable` and closed."""
    max_connections_per_address: Count = 2048
    """Likewise from one address, /64 prefix of IPv6, or by AF_UNIX; many may share one behind NAT or on this host."""
    requests_per_second: Count = 2000
    """Requests from one such address. A burst of 10 s worth is taken; further ones are answered at this rate."""
    request_seconds: Seconds = 5.0
    """From a request's first byte to its last, and for a client to take its answer."""
    idle_seconds: Seconds = 120.0
    """A connection that sends nothing is closed after this; one that holds a lease is not."""
    lease_seconds: Annotated[float, Meta(ge=0, le=31_536_000)] = 0.0
    """Lifetime of an entry made by the names protocol; 0: until it is replaced or removed."""
    output_buffer: Bytes = 1_048_576
    """Bytes that may wait for a client that watches; one that reads more slowly than the list changes is cut off."""
    database: str = "$STATE_DIRECTORY/registry.sqlite"
    """File that keeps the registry over a restart; without STATE_DIRECTORY (systemd) in the bus directory; "": none."""
    preserve_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 900.0
    """The longest time in which no client of another host expires while over 15 % of their renewals are missing; 0:
    none."""
    resolve_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 60.0
    """Time after which the host name of a [[collector]] is looked up again."""
    serve_seconds: Seconds = 0.5
    """Time that an answer to `register` waits for forwarder or transmitter to say that copies flow."""
    allow_transmit: bool = False
    """Allow clients to send raw frames by the transmitter, with `transmit`; its own policy applies besides."""
    memory: Ceiling = 402_653_184
    """Bytes that the process may take; near it, connections with most data waiting are cut off."""

    def __post_init__(self) -> None:
        leave_room("max_clients", self.max_clients * CLIENT_BYTES, self.memory)
        check_each("listen", partial(parse_endpoint, schemes=REGISTRY_SCHEMES), self.listen)
        check_each("destinations", pack_network, self.destinations)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """`listen`, parsed."""
        return tuple(parse_endpoint(text, REGISTRY_SCHEMES) for text in self.listen)

    @property
    def near(self) -> Endpoint | None:
        """The first listener that this host's own clients reach without TLS; None: there is none."""
        return next((endpoint for endpoint in self.endpoints if endpoint.scheme != "tls"), None)


Spread = Literal["flow", "source", "datagram"]
"""Basis of the choice of worker: addresses and ports, the source address alone, or nothing: any worker."""


class Ingest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The workers that take datagrams in."""

    fill_ms: Annotated[float, Meta(ge=0, le=100)] = 3.5
    """The longest that a datagram may wait for others under steady load, in milliseconds; 0: it never waits."""
    spread: Spread = "flow"
    """Basis on which a worker is chosen for a datagram; by `datagram`, those of an exporter may change order."""
    share_ports: bool = False
    """Listen also where workers of another bus do: each then gets a part of what comes."""
    tcp_connections: Count = 1024
    """Open TCP connections a worker; further ones are closed at once."""
    tcp_connections_per_address: Count = 512
    """Open TCP connections a worker from one address, or one /64 of IPv6."""
    tcp_idle_seconds: Seconds = 600.0
    """A TCP connection that sends nothing for this long is closed."""
    memory: Annotated[int, Meta(ge=268_435_456, le=1 << 40)] = 805_306_368
    """Bytes that a worker may take; near it new datagrams are dropped. Half of what is beyond 128 MiB may be lent."""

    def __post_init__(self) -> None:
        leave_room("tcp_connections", self.tcp_connections * CONNECTION_BYTES, self.memory)


class Forwarder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sends copies from this host's own address."""

    send_buffer: Bytes = 65_536
    """Bytes asked of the kernel for each collector's socket, which takes twice that. It is small so that the kernel
    does not silently drop what waits in it for a next hop that does not answer (unres_qlen_bytes, arp(7))."""
    queue_seconds: Annotated[float, Meta(ge=0, le=60)] = 1.0
    """Time that datagrams wait for room in a collector's send buffer; 0: they are dropped at once."""
    queue_bytes: Bytes = 16_777_216
    """Bytes of batches that may wait for one collector."""
    held_memory: Bytes = 268_435_456
    """Bytes of batches that may wait for all collectors together."""
    segmentation: bool = True
    """Send runs of equal length by UDP_SEGMENT where the kernel can."""
    withhold: bool = False
    """Give a collector whose port is closed one datagram a second, until one is not refused."""
    memory: Ceiling = 1_073_741_824
    """Bytes that the process may take; near it the oldest waiting batches are dropped."""

    def __post_init__(self) -> None:
        leave_room("held_memory", self.held_memory, self.memory)


class Transmitter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies from the exporter's own address, and raw frames: these settings, not the clients, say what it may do."""

    user: Annotated[str, Meta(min_length=1, max_length=64)] = "nobody"
    """User that it becomes once its sockets are open, when it was started as root."""
    interfaces: tuple[Annotated[str, Meta(min_length=1, max_length=15)], ...] = ()
    """Raw frames leave by these only; empty: by none."""
    ethertypes: tuple[Ethertype, ...] = ()
    """Raw frames carry these only, as numbers such as 0x0801, behind whatever VLAN tags they have; empty: none."""
    vlans: tuple[Annotated[int, Meta(ge=0, le=4095)], ...] = ()
    """Raw frames are tagged with these VLANs only, by each of their tags; empty: they have no tags."""
    destinations: tuple[str, ...] = (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "fc00::/7", "::1/128",
    )  # fmt: skip
    """Source-preserving copies go nowhere else."""
    sources: tuple[str, ...] = ()
    """Prefixes of the sources that copies may claim; empty: any address that a datagram came from."""
    frames_per_second: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0
    """Of copies and raw frames together; 0: no limit."""
    held_memory: Bytes = 268_435_456
    """Bytes of batches that may wait for next hops to tell their link addresses, for all collectors together."""
    segmentation: bool = True
    """Hand the kernel runs of equal length as one frame (UDP_L4 GSO) where it can."""
    memory: Ceiling = 805_306_368
    """Bytes that the process may take; near it the oldest waiting batches are dropped."""

    def __post_init__(self) -> None:
        leave_room("held_memory", self.held_memory, self.memory)
        check_each("destinations", pack_network, self.destinations)
        check_each("sources", pack_network, self.sources)
        check_each("ethertypes", parse_ethertype, self.ethertypes)

    @property
    def ethertype_numbers(self) -> frozenset[int]:
        """`ethertypes` as numbers."""
        return frozenset(map(parse_ethertype, self.ethertypes))


class Offload(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies that the kernel makes by itself, by rules that follow the registry."""

    interfaces: tuple[Annotated[str, Meta(min_length=1, max_length=15)], ...] = ()
    """Interfaces where datagrams arrive that the kernel may copy; empty: none, and all copies are made by fanwire."""
    destinations: tuple[str, ...] = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
    """Copies by the kernel go nowhere else."""
    mark_mask: Annotated[int, Meta(ge=1, le=0xFFFFFFFF)] = 0xFFF00000
    """The bits of a datagram's mark by which ingest is told which rules have copied it; other bits are left alone."""
    unseen: tuple[str, ...] = ()
    """Streams whose datagrams end in the kernel once it has copied them for all: ingest does not see them."""
    user: Annotated[str, Meta(min_length=1, max_length=64)] = "nobody"
    """User that both its processes become, when it was started as root."""
    memory: Ceiling = 268_435_456
    """Bytes that the planner may take."""

    def __post_init__(self) -> None:
        check_each("destinations", pack_network, self.destinations)
        if self.generations & (self.generations + 1) or not LEAST_GENERATIONS <= self.generations <= MOST_GENERATIONS:
            raise ValueError(f"mark_mask: {self.mark_mask:#010x} is not 8 to 16 bits side by side, as 0xfff00000 is")

    @property
    def mark_shift(self) -> int:
        """Bits of a mark below those of the mask."""
        return (self.mark_mask & -self.mark_mask).bit_length() - 1

    @property
    def generations(self) -> int:
        """The highest generation that a mark has room for."""
        return self.mark_mask >> self.mark_shift


class Journal(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The journal, which keeps what comes in streams with `journal = true`."""

    directory: FullPath = "$STATE_DIRECTORY/journal"
    """Directory of the segments; without STATE_DIRECTORY (systemd) one of this user's under XDG_STATE_HOME."""
    bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 50)] = 10_737_418_240
    """The most that segments take; the oldest go first."""
    age_seconds: Annotated[float, Meta(ge=0, le=3_153_600_000)] = 604_800.0
    """The longest that a segment is kept; 0: as long as there is room."""
    min_free: Annotated[int, Meta(ge=0, le=1 << 50)] = 1_073_741_824
    """Bytes that stay free on the disk, half of it at most, whoever takes them: the oldest segments go; 0: none."""
    sync_seconds: Annotated[float, Meta(ge=0.01, le=3600)] = 0.5
    """A power cut takes at most what was written in this time; a killed process loses nothing of that."""
    catch_up_per_second: Annotated[int, Meta(ge=100, le=10_000_000)] = 50_000
    """Datagrams a second that the collectors of one sender that catch up get together."""
    memory: Ceiling = 402_653_184
    """Bytes that the process may take; near it nobody gets to read in the journal."""

    @property
    def path(self) -> Path:
        """The directory with variables filled in."""
        state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0] or str(_user_state())
        return Path(os.path.expandvars(self.directory.replace("$STATE_DIRECTORY", state)))


def _user_state() -> Path:
    """Return the directory in which programs of this user keep their state (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "fanwire"


class Console(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The live page, and the metrics for Prometheus."""

    listen: Annotated[tuple[str, ...], Meta(min_length=1)] = ("http://127.0.0.1:8080",)
    """http://HOST:PORT on loopback, unix:///PATH, or https://HOST:PORT with the gateway's certificate and tokens."""
    hosts: tuple[str, ...] = ()
    """Names, besides the addresses that it listens on, by which browsers and Prometheus may call it."""
    memory: Ceiling = 268_435_456
    """Bytes that the process may take; near it the past of exporters is forgotten."""

    def __post_init__(self) -> None:
        check_each("listen", partial(parse_endpoint, schemes=CONSOLE_SCHEMES), self.listen)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """`listen`, parsed."""
        return tuple(parse_endpoint(text, CONSOLE_SCHEMES) for text in self.listen)


class Log(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The log of every service, on standard error."""

    format: Literal["auto", "text", "json"] = "auto"
    """Lines for people, or a JSON object each; `auto`: for people on a terminal, also by way of `fanwire run`."""

"""The table `[uplink]`: the NATS servers by which sites exchange streams, and which streams leave and come."""

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from shared.net.addresses import Endpoint, parse_endpoint
from shared.settings.values import Ceiling, check_each

SERVER_SCHEMES: Final = ("tls", "nats")
SITE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
SITE_FORM: Final = "up to 32 letters, digits, and behind the first also _ and -"
STREAM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}|\*")
ALL: Final = "*"


class Uplink(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The exchange of streams with other sites, by NATS JetStream."""

    servers: tuple[str, ...] = ()
    """tls://HOST:PORT of the servers of one NATS cluster, nats://HOST:PORT on loopback; empty: no other site."""
    site: str = ""
    """The name of this site among the others."""
    send: tuple[str, ...] = ()
    """Streams of this host that other sites may have; `["*"]`: all."""
    receive: tuple[str, ...] = ()
    """SITE/STREAM: streams of other sites that appear here under the same name; SITE/*: all that this host has."""
    registry: str = ""
    """The registry that this node shares with others: all that name the same one have the same clients; "": its own."""
    nodes: tuple[str, ...] = ()
    """Sites that share one list of collectors, this one among them, so that each collector is served by one of them;
    empty: this site serves all that it knows. Nodes send all their streams, and receive those of each other."""
    minority: Literal["serve", "hold"] = "serve"
    """The behaviour of a node that does not hear most of the nodes: it serves its collectors as before, or none."""
    credentials: str = ""
    """A file of NATS credentials (.creds), readable by its owner only; "": none."""
    nkey: str = ""
    """A file with the seed of an nkey, readable by its owner only; "": none."""
    authority: str = ""
    """A PEM file: who signs the servers' certificates; "": whom this host trusts."""
    certificate: str = ""
    """A PEM file: the certificate that is shown to the servers; "": none."""
    key: str = ""
    """A PEM file: the certificate's private key."""
    plain_beyond_loopback: bool = False
    """Allow nats:// to other hosts: whoever is on the way reads and changes what is sent."""
    create: bool = True
    """Make this site's stream in JetStream where it is missing; one that is there stays as it is."""
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    """Servers that keep a copy of it: 3 where there are three servers."""
    keep_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 50)] = 10_737_418_240
    """Bytes of it that JetStream keeps; the oldest go first."""
    keep_seconds: Annotated[float, Meta(ge=60, le=31_536_000)] = 86_400.0
    """Time that JetStream keeps it."""
    in_flight: Annotated[int, Meta(ge=1, le=1024)] = 32
    """Messages, each up to 450 kB, that may wait for JetStream's acknowledgement."""
    fill_ms: Annotated[float, Meta(ge=0, le=1000)] = 5.0
    """The longest that batches wait for others to share a message with, in milliseconds."""
    memory: Ceiling = 402_653_184
    """Bytes that the process may take; what waits for the servers may take a third of it."""

    def __post_init__(self) -> None:
        check_each("servers", self._check_server, self.servers)
        if (self.servers or self.site) and not SITE.fullmatch(self.site):
            raise ValueError(f"site: expected {SITE_FORM}")
        check_each("send", _check_stream, self.send)
        check_each("receive", self._check_received, self.receive)
        if self.registry and not SITE.fullmatch(self.registry):
            raise ValueError(f"registry: expected {SITE_FORM}")
        if self.registry and not self.servers:
            raise ValueError("registry: needs servers, which keep it")
        check_each("nodes", _check_node, self.nodes)
        if self.nodes and (self.site not in self.nodes or len(set(self.nodes)) < len(self.nodes)):
            raise ValueError("nodes: expected each site once, and this one among them")
        if bool(self.certificate) != bool(self.key):
            raise ValueError("certificate: expected both a certificate and its key, or neither")
        if self.credentials and self.nkey:
            raise ValueError("nkey: expected this or credentials, and not both")

    def _check_server(self, text: str) -> None:
        if "@" in text:
            raise ValueError("a name or password does not go into the address; use credentials or nkey")
        endpoint = parse_endpoint(text, SERVER_SCHEMES)
        if endpoint.scheme == "nats" and not (endpoint.is_loopback or self.plain_beyond_loopback):
            raise ValueError(f"{text!r} leaves this host without TLS; use tls://, or set plain_beyond_loopback")

    def _check_received(self, text: str) -> None:
        site, _, stream = text.partition("/")
        if not SITE.fullmatch(site) or not STREAM.fullmatch(stream):
            raise ValueError(f"{text!r}: expected SITE/STREAM or SITE/*")
        if site == self.site:
            raise ValueError(f"{text!r} is this site's own")

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """`servers`, parsed."""
        return tuple(map(partial(parse_endpoint, schemes=SERVER_SCHEMES), self.servers))

    def sent(self, streams: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of this host's streams that it sends."""
        return tuple(name for name in streams if self.nodes or ALL in self.send or name in self.send)

    def received(self, streams: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Return the streams that it receives, by site."""
        wanted = [text.partition("/")[::2] for text in self.receive]
        wanted += [(node, ALL) for node in self.nodes if node != self.site]
        return {
            site: tuple(name for name in streams if (site, ALL) in wanted or (site, name) in wanted)
            for site, _ in dict(wanted).items()
        }


def _check_node(text: str) -> None:
    if not SITE.fullmatch(text):
        raise ValueError(f"{text!r}: expected the name of a site")


def _check_stream(text: str) -> None:
    if not STREAM.fullmatch(text):
        raise ValueError(f"{text!r}: expected the name of a [[stream]], or *")


def expanded(text: str) -> Path | None:
    """Return the path of a file in settings, with variables filled in; None: none is named."""
    return Path(os.path.expandvars(text)) if text else None

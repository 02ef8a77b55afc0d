"""All settings, as a service gets them: `tables`, and lists of `entries`. `shared/settings/file` reads them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct, field

from shared.client import ALL_STREAMS
from shared.settings.entries import Collector, Stream, Token
from shared.settings.explain import did_you_mean
from shared.settings.tables import (
    Broker,
    Bus,
    Console,
    Forwarder,
    Gateway,
    Ingest,
    Journal,
    Log,
    Offload,
    Transmitter,
)
from shared.settings.uplink import ALL, Uplink

DEFAULT_STREAM: Final = Stream(
    name="messages", listen=("udp://localhost:6667", "tcp://localhost:6667"), reply="Got your message!"
)


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings, as a service gets them."""

    bus: Bus = Bus()
    broker: Broker = Broker()
    gateway: Gateway = Gateway()
    ingest: Ingest = Ingest()
    forwarder: Forwarder = Forwarder()
    transmitter: Transmitter = Transmitter()
    offload: Offload = Offload()
    journal: Journal = Journal()
    console: Console = Console()
    uplink: Uplink = Uplink()
    log: Log = Log()
    streams: tuple[Stream, ...] = field(default=(DEFAULT_STREAM,), name="stream")
    collectors: tuple[Collector, ...] = field(default=(), name="collector")
    tokens: tuple[Token, ...] = field(default=(), name="token")

    @property
    def journaled(self) -> tuple[str, ...]:
        """The streams that are kept in the journal."""
        return tuple(stream.name for stream in self.streams if stream.journal)

    @property
    def database(self) -> Path | None:
        """The registry's file with variables filled in; None: it is not kept."""
        if not self.gateway.database:
            return None
        text = os.path.expandvars(self.gateway.database)
        return self.bus.path / Path(text).name if "$" in text else Path(text)

    def __post_init__(self) -> None:
        names = [stream.name for stream in self.streams]
        for kind, all_names in (("stream", names), ("collector", [entry.name for entry in self.collectors])):
            if twice := {name for name in all_names if all_names.count(name) > 1}:
                raise ValueError(f'[[{kind}]] "{twice.pop()}" name: another one has it; give each its own')
        numbered = [stream.name for stream in self.streams if stream.protocol]
        if numbered and self.ingest.spread == "datagram":
            raise ValueError(
                f'[[stream]] "{numbered[0]}" protocol: with [ingest] spread = "datagram" no worker sees all that an '
                'exporter sends; set spread to "source" or "flow", or remove the protocol'
            )
        self._check_uplink(names)
        self._check_unseen(names)
        for collector in self.collectors:
            _check_streams(f'[[collector]] "{collector.name}"', collector.streams, names)
        self.check_tokens(self.tokens)

    def _check_uplink(self, names: Sequence[str]) -> None:
        """Raise ValueError where `[uplink]` names none of these streams, or where one can come from nowhere."""
        taken = [text.partition("/")[2] for text in self.uplink.receive]
        if self.uplink.nodes and not self.uplink.servers:
            raise ValueError("[uplink] nodes: expected servers too, by which the nodes hear each other")
        if self.uplink.nodes and self.offload.interfaces:
            raise ValueError("[offload] interfaces: the kernel's rules can't follow [uplink] nodes; remove one of them")
        _check_streams("[uplink]", self.uplink.send, names, "send")
        _check_streams("[uplink]", taken, names, "receive")
        taken += [ALL] if self.uplink.nodes else []
        for stream in self.streams:
            if not stream.listen and not (self.uplink.servers and {stream.name, ALL} & set(taken)):
                raise ValueError(f'[[stream]] "{stream.name}" listen: expected a listener, unless [uplink] receives it')

    def _check_unseen(self, names: Sequence[str]) -> None:
        """Raise ValueError where `[offload] unseen` names a stream that more than its collectors have to see."""
        _check_streams("[offload]", self.offload.unseen, names, "unseen")
        sent = {ALL, *names} & set(self.uplink.send) if self.uplink.servers else set()
        for stream in (stream for stream in self.streams if stream.name in self.offload.unseen):
            seers = {
                "journal": stream.journal,
                "protocol": bool(stream.protocol),
                "reply": stream.reply is not None,
                "[uplink] send": bool(sent & {stream.name, ALL}),
            }
            if seer := next((name for name, sees in seers.items() if sees), ""):
                raise ValueError(f'[offload] unseen: "{stream.name}" has {seer}, which sees all of it; leave one out')

    def check_tokens(self, tokens: Sequence[Token]) -> None:
        """Raise ValueError unless these can be told apart, and name streams that exist."""
        names = [stream.name for stream in self.streams]
        for key in ("name", "hash", "certificate"):
            values = [getattr(token, key) for token in tokens]
            for number, token in enumerate(tokens):
                if values[number] is not None and values[number] in values[:number]:
                    raise ValueError(f'[[token]] "{token.name}" {key}: another one has it; give each its own')
        for token in tokens:
            _check_streams(f'[[token]] "{token.name}"', token.streams, names)


def _check_streams(entry: str, wanted: Iterable[str], names: Sequence[str], key: str = "streams") -> None:
    """Raise ValueError, with the entry, when one of the streams that it names is not there."""
    for name in wanted:
        if name not in (*names, ALL_STREAMS):
            nearest = did_you_mean(name, names)
            raise ValueError(f"{entry} {key}: there is no stream {name!r}{nearest}; name a [[stream]]")

"""The part of a sender of copies that is its own: the way to a collector, and the sending."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Generic

from shared.bus.bodies.nodes_message import NODES_TOPIC
from shared.bus.messages import REGISTRY_TOPIC, Message, offload_topic, serve_topic
from shared.client import Client, Source
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.sending.backlog import BacklogMemory
from shared.fanout.served_collector import D
from shared.process.memory import Memory
from shared.settings.model import Settings
from shared.settings.tables import Forwarder, Transmitter


class CopySender(ABC, Generic[D]):
    """Sends copies to the collectors of one `source`; subclasses differ in `reach` and `send`."""

    source: ClassVar[Source]

    def __init__(self, name: str, settings: Settings, own: Forwarder | Transmitter) -> None:
        self.name = name
        self.settings = settings
        self.held = BacklogMemory(own.held_memory)
        """Rows that wait for any collector."""
        self.memory = Memory(own.memory, f"[{name.partition('.')[0]}] memory", borrows=True)

    @property
    def accounts_file(self) -> Path | None:
        """The file in which accounts outlive this process; None where it can serve nobody."""
        return self.settings.bus.path / f"accounts.{self.name.partition('.')[0]}"

    @abstractmethod
    def reach(self, client: Client, account: Counter[str]) -> D:
        """Return the destination of a collector; it counts what it sends and drops in `account`."""

    @abstractmethod
    def send(self, batch: Gathered, routed: list[tuple[D, Selection]]) -> None:
        """Give each collector its rows."""

    def topics(self) -> Iterable[str]:
        """Topics to subscribe to besides streams; the sender of a request sees by them what this service can do."""
        nodes = (NODES_TOPIC,) if self.settings.uplink.nodes else ()
        return (REGISTRY_TOPIC, serve_topic(self.source), offload_topic(self.source), *nodes)

    def descriptors(self) -> Iterable[int]:
        """Further descriptors that wake the loop when they become readable."""
        return ()

    def handle_message(self, message: Message) -> None:
        """Handle a message of a kind that is this service's alone."""

    def work(self) -> float:
        """Do what a descriptor or the time has brought; return the seconds until there may be more to do."""
        return math.inf

    def own_account(self) -> dict[str, int]:
        """Counters of the service itself."""
        return {}

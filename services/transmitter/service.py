"""The transmitter on the bus: the shared loop with a sender of copies, and the requested frames."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final, Self

from services.transmitter.destination import Destination
from services.transmitter.privileges import ACCOUNTS, RawSockets
from services.transmitter.raw_frames import RawFrames
from services.transmitter.sender import Sender
from shared.bus.messages import TRANSMIT_TOPIC, Message, TransmitRequest
from shared.client import Client, Source
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.service import CopyService
from shared.settings.model import Settings

FRAME_SOCKETS: Final = 2
"""AF_PACKET sockets kept for requested frames: as they are, and with a check sequence of their own."""


class TransmitterService(CopyService[Destination]):
    """Serves the collectors whose `source` is `original`, and clients that may ask for frames.

    `facts` are the entries about privilege in its status.
    """

    source: ClassVar[Source] = "original"

    def __init__(self, name: str, settings: Settings, sockets: RawSockets, facts: dict[str, int]) -> None:
        super().__init__(name, settings, settings.transmitter)
        self._sockets = sockets
        self._facts = facts

    def __enter__(self) -> Self:
        for_frames, for_copies = self._sockets.packet[:FRAME_SOCKETS], self._sockets.packet[FRAME_SOCKETS:]
        self._sender = sender = Sender(self.settings, replace(self._sockets, packet=for_copies), self.held)
        self._frames = RawFrames(for_frames, sender.next_hops, sender.policy, sender.audit, self.publish)
        return super().__enter__()

    @property
    def accounts_file(self) -> Path | None:
        """The file of the accounts, as handed on by the opener; none without sockets: another one may need it."""
        handed_on = os.environ.get(ACCOUNTS)
        return (Path(handed_on) if handed_on else super().accounts_file) if self._sockets else None

    def topics(self) -> Iterable[str]:
        """Topics to subscribe to; without sockets none, which shows others that no service is there for them."""
        return (*super().topics(), TRANSMIT_TOPIC) if self._sockets else ()

    def descriptors(self) -> Iterable[int]:
        """Return the descriptor that signals a change of a route, link or neighbour."""
        next_hops = self._sender.next_hops
        return () if next_hops.blind else (next_hops.fileno(),)

    def apply_settings(self, settings: Settings) -> None:
        """Use the streams of these settings, and send nothing to their listeners."""
        super().apply_settings(settings)
        self._sender.apply_settings(settings)

    def reach(self, client: Client, account: Counter[str]) -> Destination:
        """Find out whether a collector may be sent copies."""
        return self._sender.reach(client, account)

    def send(self, batch: Gathered, routed: list[tuple[Destination, Selection]]) -> None:
        """Give each collector its rows."""
        self._sender.send(batch, routed)

    def handle_message(self, message: Message) -> None:
        """Begin sending requested frames."""
        if isinstance(message.body, TransmitRequest) and message.topic == TRANSMIT_TOPIC:
            self._frames.accept_request(message.body)

    def work(self) -> float:
        """Apply changes of the network and of time, and send frames that are due."""
        return min(self._sender.work(), self._frames.work())

    def own_account(self) -> dict[str, int]:
        """Rights of the process, and the fate of frames and requests."""
        return {**self._facts, **self._frames.counters, **self._sender.audit.counters}

    def __exit__(self, *error: object) -> None:
        self._frames.close()
        super().__exit__(*error)
        self._sender.close()
        self._sockets.close()

"""Collectors as the forwarder has them, without a bus."""

import socket
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest

from services.forwarder.service import ForwarderService
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered
from shared.fanout.collectors import Collectors
from shared.fanout.kernel_copies import KernelRules
from shared.ledger.equations import discrepancies
from shared.settings.model import Settings
from shared.settings.tables import Forwarder


class Sent:
    """Collectors as the forwarder has them, given batches by the test."""

    def __init__(self, opened: ExitStack, *clients: Any, **settings: Any) -> None:
        self.published: Counter[str] = Counter()
        self._relay = ForwarderService("forwarder.1", Settings(forwarder=Forwarder(**settings)))
        self.collectors = Collectors(["messages"], self.published, self._relay.reach, KernelRules("relay"))
        opened.callback(self.collectors.close)
        opened.callback(self._relay.close)
        self.collectors.replace(clients)

    def send(self, batch: DatagramBatch) -> dict[str, dict[str, int]]:
        """Send a batch; return the accounts, which must add up."""
        self.published[batch.stream] += len(batch)
        gathered = Gathered([batch])
        self._relay.send(gathered, self.collectors.route(gathered))
        return self.accounts()

    def work(self) -> dict[str, dict[str, int]]:
        """Do what the loop does in time; return the accounts."""
        time.sleep(min(0.02, self._relay.work()))
        self._relay.work()
        return self.accounts()

    def refresh(self) -> None:
        """Do what the loop does twice a second."""
        self._relay.work()
        self.collectors.refresh()

    def trouble(self) -> str:
        """Return the trouble of the only collector now, after another look."""
        self.refresh()
        return next((symptom.trouble for _, symptom, _ in self.collectors.examine(time.monotonic()) if symptom), "")

    @property
    def memory_used(self) -> int:
        """Bytes of what waits."""
        return self._relay.held.used

    def accounts(self) -> dict[str, dict[str, int]]:
        """The accounts, which must add up."""
        accounts = self.collectors.accounts()
        assert list(discrepancies(accounts)) == []
        return accounts


def receive_all(sock: socket.socket, count: int) -> list[bytes]:
    """Return the next datagrams, and no more than those."""
    found = [sock.recv(1 << 16) for _ in range(count)]
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(1 << 16)
    sock.settimeout(60)
    return found

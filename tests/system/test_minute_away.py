"""A collector of a whole site is away for a minute: flows of 16 exporters and syslog of 500, by its own count."""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from shared.ledger.accounts import Accounts
from shared.ledger.equations import dropped
from shared.net.sockets import kernel_drops
from tests.background import Background
from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.services.ingest.flows import exported
from tests.services.ingest.flows.test_template_reader import a_template
from tests.stack import PATIENT, sign_up, wait_until
from tests.system.test_catch_up import Counted, entry, leave
from tests.traffic import pause

FLOW_EXPORTERS, SYSLOG_EXPORTERS = 16, 500
FLOWS_EACH = 30
"""Datagrams of a flow exporter in a round: half of all are flows, as an exporter of syslog sends one."""
NETFLOW, SYSLOG = 2055, 5514
SETTINGS = """
[[stream]]
name = "netflow"
listen = ["udp://127.0.0.1:2055"]
protocol = "netflow"
journal = true
[[stream]]
name = "syslog"
listen = ["udp://127.0.0.1:5514"]
journal = true
[journal]
directory = "{directory}"
min_free = 0
catch_up_per_second = 50000
"""
RECORDS = exported.a_set(256, bytes(range(8)) * 60)
TEXT = b" sshd[1234]: Accepted publickey for admin from 192.0.2.7 port 51234 ssh2" * 2


class SiteTraffic(Background):
    """All exporters, each with its own address; `sent` is how many datagrams each has sent.

    A flow exporter numbers datagrams from 1 on, behind a template, which it sends only once.
    """

    def __init__(self, per_second: int) -> None:
        super().__init__()
        self.sent = [0] * (FLOW_EXPORTERS + SYSLOG_EXPORTERS)
        self._per_second = per_second

    def run(self) -> None:
        """Send round after round, flows between the lines."""
        with ExitStack() as opened:
            sockets = []
            for number in range(len(self.sent)):
                sock = opened.enter_context(socket.socket(type=socket.SOCK_DGRAM))
                sock.bind((f"127.0.{1 + number // 200}.{1 + number % 200}", 0))
                sock.connect(("127.0.0.1", NETFLOW if number < FLOW_EXPORTERS else SYSLOG))
                sockets.append(sock)
            for number in range(FLOW_EXPORTERS):
                sockets[number].send(self._flows(number, a_template(9, 256, [4, 4])))
            turns = [turn for _ in range(FLOWS_EACH) for turn in range(FLOW_EXPORTERS)]
            turns += range(FLOW_EXPORTERS, len(self.sent))
            turns.sort(key=lambda turn: turn * 7919 % len(self.sent))
            began, count = time.monotonic(), 0
            while not self.stopping.is_set():
                for number in turns:
                    self.sent[number] += 1
                    sockets[number].send(
                        self._flows(number, RECORDS) if number < FLOW_EXPORTERS else self._line(number)
                    )
                    count += 1
                    if count % 64 == 0:
                        pause(max(0.0, began + count / self._per_second - time.monotonic()))

    def _flows(self, number: int, content: bytes) -> bytes:
        seconds = int(time.time())
        return struct.pack(">HHIIII", 9, 1, seconds & 0xFFFF, seconds, self.sent[number], number) + content

    def _line(self, number: int) -> bytes:
        return b"<38>%06d %010d" % (number, self.sent[number]) + TEXT[: 20 + number % 100]


class SiteCollector(Counted):
    """The collector's socket; `templates` counts datagrams with nothing but templates."""

    templates = 0

    def read(self, payload: bytes) -> tuple[int, int] | None:
        """Return exporter and number of a datagram that counts."""
        if payload.startswith(b"<38>"):
            return int(payload[4:10]), int(payload[11:21])
        if payload[20:22] == b"\0\0":
            self.templates += 1
            return None
        number, exporter = struct.unpack_from(">II", payload, 12)
        return exporter, number


@contextmanager
def running(stack: OpenStack) -> Iterator[None]:
    """All services, the journal among them."""
    stack.configure(PATIENT + SETTINGS.format(directory=stack.directory / "journal"))
    stack.start_all()
    for name in ("transmitter", "journal"):
        stack.start(name)
    with BusEnds(stack.bus) as ends:
        accounts_when(ends, "journal.1", lambda accounts: any(name.startswith("origin/") for name in accounts))
    yield


def register(source: str, **more: Any) -> dict[str, Any]:
    """Sign the collector up; return its entry."""
    return sign_up({"name": "siem", "streams": ["netflow", "syslog"], "port": 9514, "source": source, **more})


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", ["relay", "original"])
@pytest.mark.parametrize(("seconds", "per_second"), [(3, 2_000), (60, 20_000)])
def test_a_site_is_whole_after_a_minute_away(open_stack: OpenStack, source: str, seconds: int, per_second: int) -> None:
    """Stopped for a minute under load, it has every datagram once, in each exporter's order; templates come besides."""
    sender = "forwarder.1" if source == "relay" else "transmitter.1"
    with running(open_stack), closing(SiteCollector(9514)) as siem, BusEnds(open_stack.bus) as ends:
        siem.start()
        granted = register(source)
        load = SiteTraffic(per_second)
        load.start()
        wait_until(lambda: siem.count > 2 * per_second, "copies flow")
        leave("siem", granted)
        before = sum(load.sent)
        wait_until(lambda: sum(load.sent) > before + seconds * per_second, "time passes", 3 * seconds + 60)
        register(source, since="left")
        began = time.monotonic()
        wait_until(lambda: entry("siem") and "catching_up" not in entry("siem"), lambda: f"{entry('siem')}", 600)
        took, at = time.monotonic() - began, sum(load.sent)
        load.stop()
        sent = sum(load.sent)
        wait_until(
            lambda: siem.count >= sent, lambda: f"{siem.count} of {sent}, {kernel_drops(siem.socket)} dropped here"
        )
        print(source, "sent", sent, "level after", round(took, 1), "s, at", at, "templates", siem.templates)
        for number, count in enumerate(load.sent):
            assert siem.numbers[number] == list(range(1, count + 1)), f"exporter {number}"
            address = f"127.0.{1 + number // 200}.{1 + number % 200}"
            assert siem.sources[number] == {address if source == "original" else "127.0.0.1"}
        assert siem.templates >= 2 * FLOW_EXPORTERS

        def settled(accounts: Accounts) -> bool:
            account = accounts.get("collector/siem", {})
            return "sent" in account and not account.get("deferred")

        account = accounts_when(ends, sender, settled)["collector/siem"]
        assert (account["expected"], dropped(account)) == (account["sent"], 0)
        code, said, _ = open_stack.run("ledger")
        assert code == 0, said

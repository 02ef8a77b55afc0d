"""The applier before the kernel's own rules: it makes one table of what the settings allow, and nothing else."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from services.offload.applying.applier import UNFIT, Applier
from services.offload.channel import LENGTH, Answer, Request, receive, send
from services.offload.kernel_plan import KernelPlan
from shared.settings.file import load
from tests.capture import Collector
from tests.services.offload.applying.test_table import needs_nft
from tests.services.offload.site import PORT, RELAY, SIEMS, Listening, OffloadSite, exporters
from tests.stack import PATIENCE_SECONDS

pytestmark = pytest.mark.usefixtures("lab")
SETTINGS = f"""
[[stream]]
name = "netflow"
listen = ["udp://0.0.0.0:{PORT}"]
[offload]
interfaces = ["in"]
"""


class Served:
    """An applier on a relay, in a thread of the test, which is its planner."""

    def __init__(self, site: OffloadSite, config: Path) -> None:
        self.planner, channel = socket.socketpair()
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.planner.settimeout(PATIENCE_SECONDS)
        self.codes: list[int] = []
        with site.relay.entered():
            applier = Applier(channel, os.getpid(), load(config), config)

        def serve() -> None:
            with site.relay.entered(), channel:
                self.codes.append(applier.serve())
            applier.close()

        self._thread = threading.Thread(target=serve)
        self._thread.start()
        self._number = 0

    def ask(self, kind: str, plan: KernelPlan | None = None) -> Answer:
        """Make a request, and wait for its answer."""
        self._number += 1
        send(self.planner, msgspec.convert((kind, self._number, plan), Request))
        answer = receive(self.planner, Answer)
        assert answer.number == self._number
        return answer

    def end(self) -> int:
        """Wait for its end; return the exit code."""
        self._thread.join(20)
        return self.codes[0]


@contextmanager
def served(tmp_path: Path) -> Iterator[tuple[OffloadSite, Served, Path]]:
    """An applier on a relay, with these settings."""
    config = tmp_path / "offload.toml"
    config.write_text(SETTINGS)
    with OffloadSite() as site:
        for address in SIEMS[4]:
            site.relay.neighbour(address, site.siem_end.link_address, "out")
        applier = Served(site, config)
        try:
            yield site, applier, config
        finally:
            applier.planner.close()
            applier.end()


@needs_nft
def test_it_makes_one_table_of_what_is_allowed_and_counts(tmp_path: Path) -> None:
    """A plan within the settings becomes rules, one beyond them is refused and changes nothing; its end removes all."""
    with served(tmp_path) as (site, applier, _), exporters(site) as socks:
        plan = site.plan([site.copy(0, 9000)])
        with Collector(site.siem, SIEMS[4][0], 9000) as siem, Listening(site.relay, RELAY[4], PORT) as listener:
            assert applier.ask("apply", plan).error == ""
            beyond = msgspec.structs.replace(plan, interfaces=("in", "out"))
            with capture_logs() as log:
                assert applier.ask("apply", beyond).error == "refused: interface out is not in [offload] interfaces"
            assert [each["event"] for each in log] == ["plan refused"]
            socks[0].sendto(b"one", (RELAY[4], PORT))
            assert listener.read(1)[0].mark >> 20 == 7
            assert siem.read(1)
        assert applier.ask("count").counters == ((100, 1, 31), (4, 1, 31))
        ruleset = site.relay.run("nft", "list", "ruleset")
        (table,) = [line for line in ruleset.splitlines() if line.startswith("table")]
        assert table.startswith("table netdev fanwire {")
        assert ruleset.count("hook") == ruleset.count('hook ingress device "in"') == 1
        applier.planner.close()
        assert applier.end() == 0
        assert not site.relay.run("nft", "list", "ruleset")


def test_it_ends_at_what_no_planner_sends(tmp_path: Path) -> None:
    """After the first byte too many nothing more is read: the rules go with the applier."""
    with served(tmp_path) as (_, applier, _), capture_logs() as log:
        applier.planner.sendall(LENGTH.pack(1 << 30))
        assert applier.end() == UNFIT
    assert [each["event"] for each in log] == ["the applier ends: what came is from no planner"]


def test_it_follows_the_streams_of_its_own_settings(tmp_path: Path) -> None:
    """A port that the settings have not is refused until the file has it; a bad file keeps what was."""
    with served(tmp_path) as (site, applier, config):
        (stream,) = site.plan([site.copy(0, 9000)]).streams
        other = tuple(msgspec.structs.replace(each, port=PORT + 1) for each in stream.listeners)
        plan = site.plan([site.copy(0, 9000)])
        plan = msgspec.structs.replace(plan, streams=(msgspec.structs.replace(stream, listeners=other),))
        unlisted = f"port {PORT + 1} is not one of a udp:// listener of stream netflow"
        assert applier.ask("apply", plan).error == f"refused: {unlisted}"
        config.write_text("[offload")
        assert applier.ask("reload").error.startswith(f"refused: {config}: line 1: not TOML")
        config.write_text(SETTINGS.replace(f":{PORT}", f":{PORT + 1}"))
        assert applier.ask("reload").error == ""
        assert applier.ask("apply", plan).error == ""
        assert applier.ask("apply").error == ""

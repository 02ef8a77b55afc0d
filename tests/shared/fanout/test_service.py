from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.bus import zmq_sockets
from shared.bus.bodies.template_messages import Templates, templates_topic
from shared.bus.messages import Again, Message, Status, again_topic
from shared.datagrams.gathered import Gathered
from shared.fanout import service as module
from shared.fanout.resumption import HEEDED
from shared.settings.entries import Stream
from tests.builders import make_client, make_envelope
from tests.shared.fanout.catch_up.test_catch_up import A, Sender


def test_who_joins_is_not_owed_what_a_worker_has_lost_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's report tells of a loss before its templates have come: it is none of a collector that still joins."""
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)
    with Sender(tmp_path, [Stream(name=A, listen=("udp://127.0.0.1:2055",), protocol="netflow")]) as sender:
        collectors = sender.service._collectors
        sender.serve(make_client("one"))
        for reached in (5, 9):
            accounts = {f"stream/{A}": Counter(published=reached)}
            sender.take("status/", Status("ingest.1", 1, 1, 1, 0, 1, {**accounts}), "ingest.1")
            assert collectors.accounts()["collector/one"].get("missed", 0) == (reached - 5)
            assert collectors.accounts()["collector/one"]["expected"] == (reached - 5)
            sender.take(templates_topic(A), Templates(A, 0, 1, []), "ingest.1")


def test_batches_go_together_while_a_collector_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are not sent each batch alone meanwhile; what comes behind the templates goes apart from the rest."""
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)
    with Sender(tmp_path, [Stream(name=A, listen=("udp://127.0.0.1:2055",), protocol="netflow")]) as sender:
        sent: list[int] = []

        def note(batch: Gathered, _routed: Any) -> None:
            sent.append(len(batch))

        monkeypatch.setattr(sender.service, "send", note)
        sender.serve(make_client("one"))
        for _ in range(3):
            sender.publish(A, 5)
        sender.take(templates_topic(A), Templates(A, 0, 1, []), "ingest.1")
        for _ in range(2):
            sender.publish(A, 5)
        sender.service._send_all()
        assert sent == [15, 10]
        assert sender.service._collectors.accounts()["collector/one"]["expected"] == 10


@pytest.mark.parametrize("ended", [False, True])
def test_a_sender_that_ends_waits_for_workers_that_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """It takes what they publish until each one has told that it holds for the next process, however slow it is."""
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(module, "INPUT_SECONDS", 60.0)
    with Sender(tmp_path) as sender:
        sender.serve(make_client("one"))
        sender.take("status/", Status("ingest.1", 1, 1, 1, 0, 1, {}, ended=ended), "ingest.1")
        turns = 0

        def turn() -> int:
            nonlocal turns
            turns += 1
            if turns == 2:
                sender.publish(A, 5)
            elif turns == 3:
                topic = again_topic("ingest.1", f"forwarder.1.abc{HEEDED}")
                sender.service._resumption.order(Message(topic, make_envelope(0, 0), Again("end", 0)))
            return 0

        monkeypatch.setattr(sender.service, "_turn", turn)
        sender.service._drain()
        assert sender.service._collectors.accounts()["collector/one"].get("expected", 0) == (0 if ended else 5)

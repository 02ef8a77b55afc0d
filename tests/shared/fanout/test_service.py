from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.bus import zmq_sockets
from shared.bus.bodies.template_messages import Templates, templates_topic
from shared.bus.messages import Status
from shared.datagrams.gathered import Gathered
from shared.settings.entries import Stream
from tests.builders import make_client
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

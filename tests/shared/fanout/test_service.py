from pathlib import Path
from typing import Any

import pytest

from shared.bus import zmq_sockets
from shared.bus.bodies.template_messages import Templates, templates_topic
from shared.datagrams.gathered import Gathered
from shared.settings.entries import Stream
from tests.builders import make_client
from tests.shared.fanout.past.test_catch_up import A, Sender


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

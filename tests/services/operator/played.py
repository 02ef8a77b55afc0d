"""A gateway, and services on the bus, played by the test, so that it decides what they say and when they fail."""

import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zmq

from shared.bus.endpoint import ipc_endpoint
from shared.bus.messages import (
    TRANSMIT_TOPIC,
    Body,
    Datagrams,
    Status,
    TransmitReply,
    TransmitRequest,
    datagrams_topic,
    encode,
    status_topic,
)
from shared.bus.zmq_sockets import configure, new_context
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.net.addresses import pack_address
from tests.builders import BusEnds, take
from tests.stack import PATIENCE_SECONDS, Running, Stack, wait_until

Request = dict[str, Any]


class PlayedGateway:
    """A registry over JSON lines; `answers` replaces its answer to an operation."""

    def __init__(self, **answers: Callable[[Request], Request | str]) -> None:
        self.clients: dict[str, Request] = {}
        self.requests: list[Request] = []
        self.answers = answers
        self.connections: list[socket.socket] = []
        self._generation = 0
        played = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    answer = played._answer(json.loads(line))
                    text = answer if isinstance(answer, str) else json.dumps(answer)
                    self.wfile.write(text.encode(errors="surrogateescape") + b"\n")

        class Server(socketserver.ThreadingTCPServer):
            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                played.connections.append(connection)
                return connection, address

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"tcp://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def said(self, op: str) -> list[Request]:
        """The requests of one operation, so far."""
        return [request for request in self.requests if request["op"] == op]

    def _answer(self, request: Request) -> Request | str:
        self.requests.append(request)
        if answer := self.answers.get(request["op"]):
            return answer(request)
        if request["op"] == "register":
            self._generation += 1
            granted = {"address": "127.0.0.1", "port": 40000, "source": "relay", "streams": [], "from": []}
            granted |= {name: value for name, value in request.items() if name not in ("op", "ttl", "hold")}
            granted |= {"generation": self._generation, "expires_in": request.get("ttl"), "health": "ok"}
            self.clients[request["name"]] = granted
            return {"ok": True, "client": granted}
        if request["op"] == "leave":
            del self.clients[request["name"]]
        return {"ok": True, "clients": self.clients, "revision": 1, "expires_in": 30.0}

    def drop(self) -> None:
        """Close every connection, as a gateway that ends does."""
        while self.connections:
            with contextlib.suppress(OSError):  # its handler closes it at the same time, because the client has gone
                self.connections.pop().shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self.drop()
        self._server.server_close()


class PlayedService:
    """Publishes as any service would, with the numbers that the test wants."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.boot = 1
        self._context = new_context()
        self._socket = configure(self._context.socket(zmq.XPUB), 100)
        self._socket.connect(ipc_endpoint(directory, "publish"))
        self._subscriptions: set[bytes] = set()
        self._sequence = 0

    def wait_for_subscriber(self, prefix: str) -> None:
        """Wait until somebody has subscribed to `prefix`."""
        wait_until(lambda: self._subscribed(prefix.encode()), f"somebody subscribes to {prefix}")

    def _subscribed(self, prefix: bytes) -> bool:
        while self._socket.poll(0):
            self._subscriptions.add(self._socket.recv()[1:])
        return prefix in self._subscriptions

    def publish(self, payloads: list[bytes], total: int, source: str = "192.0.2.7", stream: str = "messages") -> None:
        """Publish datagrams from port 514 of `source`; `total` is what was published before."""
        rows = make_rows([len(payload) for payload in payloads], [pack_address(source)] * len(payloads), 514)
        batch = DatagramBatch(stream, 0, rows if payloads else np.empty(0, rows.dtype), b"".join(payloads))
        self._send(datagrams_topic(stream), Datagrams(stream, 0), total, batch)

    def report(self, accounts: Mapping[str, Mapping[str, int]]) -> None:
        """Publish status, in one piece."""
        kept = {name: dict(account) for name, account in accounts.items()}
        self._send(status_topic(self.name), Status(self.name, 1, 0, self._sequence, 0, 1, kept))

    def _send(self, topic: str, body: Body, total: int = 0, batch: DatagramBatch | None = None) -> None:
        sequence, self._sequence = self._sequence, self._sequence + 1
        parts = encode(topic, body, sender=self.name, boot=self.boot, sequence=sequence, total=total, batch=batch)
        self._socket.send_multipart(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()


class PlayedTransmitter:
    """Takes requests for raw frames, and answers them as the test wants."""

    def __init__(self, bus: BusEnds) -> None:
        self.publisher = bus.publisher("transmitter.1")
        self.subscriber = bus.subscriber(TRANSMIT_TOPIC)
        wait_until(lambda: (self.publisher.new_subscriptions(), self.publisher.ready)[1], "the broker is there")

    def take(self) -> TransmitRequest:
        """The next request, waited for."""
        body = take(self.subscriber).body
        assert isinstance(body, TransmitRequest)
        return body

    def answer(self, request: TransmitRequest, sent: int, error: str = "", message: str = "") -> None:
        """Answer at once, as the transmitter does: who asked has to be listening by then."""
        self.publisher.new_subscriptions()
        assert self.publisher.wanted(request.reply)
        self.publisher.publish(request.reply, TransmitReply(request.id, sent, error, message))


def finish(running: Running) -> tuple[int, str]:
    """Wait for a command to end; return its exit code and everything it printed."""
    return running.process.wait(PATIENCE_SECONDS), running.text


def run(stack: Stack, *arguments: str) -> tuple[int, str]:
    """Run an operator command to its end."""
    return finish(stack.operator(*arguments))

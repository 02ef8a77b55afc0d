"""What takes bytes from outside, a function each: whatever they are, they are taken, or refused as the docs say.

Anything else that is raised is a finding. The corpus of each, one input a line in hexadecimal, is in `corpus/`: inputs
that get somewhere, from which mutations start, and those that once found something.
"""

import os
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final
from unittest import mock

import shared.netlink
from services.gateway.admission import Admission
from services.gateway.entry import Visitor
from services.gateway.protocol import Decoder
from services.gateway.requests import Name, Register, RequestError
from services.ingest.framing import Framing
from shared.batch import MAX_DATAGRAM
from shared.gathering import Gathered
from shared.netlink import Netlink
from shared.segments import group
from shared.settings import SettingsError
from shared.settings_file import load, render
from shared.wire import WireError, decode
from tests.shared.test_netlink import PlayedKernel

CORPUS: Final = Path(__file__).with_name("corpus")
MAX_PARTS: Final = 7
_admission: Final = Admission(["messages"], [("127.0.0.1", 6667)], lambda _: False, lambda _: False)
_visitor: Final = Visitor(1, "192.0.2.1", 40_000)
_file: Final = Path(tempfile.gettempdir()) / f"fanwire-fuzz-{os.getpid()}.toml"


def join_parts(parts: list[bytes]) -> bytes:
    """A bus message as one input; `split_parts` is the way back."""
    return b"".join(len(part).to_bytes(2) + part for part in parts)


def split_parts(data: bytes) -> list[bytes]:
    """Parts with two bytes of length each; the last takes what is left."""
    parts: list[bytes] = []
    while data and len(parts) < MAX_PARTS:
        size = int.from_bytes(data[:2])
        parts.append(data[2 : 2 + size])
        data = data[2 + size :]
    return parts


def bus_message(data: bytes) -> None:
    """A message is decoded, and a batch holds what its rows say, or it is a WireError."""
    try:
        message = decode(split_parts(data))
    except WireError as error:
        assert error.cause
        return
    if message.batch is not None and len(message.batch):
        batch = Gathered([message.batch])
        assert sum(len(payload) for _, _, payload in message.batch.datagrams()) == int(batch.lengths.sum())
        assert group(batch.lengths, 1472)[0] == 0


def json_lines(data: bytes) -> None:
    """What a client says, in two reads, makes requests or refusals; what is asked for is admitted or refused."""
    decoder, at = Decoder(), data[0] if data else 0
    for read in (b"{" + data[1:at], data[at:]):
        if read:
            decoder.feed(read)
    decoder.end()
    refusals = 0
    while refusals <= len(data):
        try:
            request = decoder.next_request()
            if request is None:
                break
            if isinstance(request, Register):
                _admission.admit(request, _visitor)
        except RequestError as refused:
            assert refused.error
            assert str(refused)
            refusals += 1


def names(data: bytes) -> None:
    """A first read that is no JSON is one name or one refusal."""
    decoder = Decoder()
    decoder.feed(b"n" + data)
    try:
        request = decoder.next_request()
    except RequestError as refused:
        assert refused.closes
        return
    assert isinstance(request, Name)
    assert 1 <= len(request.name.encode()) <= 255
    assert request.name.isprintable() or not request.name.isascii()


def settings(data: bytes) -> None:
    """A settings file is read, and prints as one that is read to the same, or it is one line of SettingsError."""
    _file.write_bytes(data)
    try:
        found = load(_file, {})
        _file.write_text(render(found), "utf-8")
        assert load(_file, {}) == found
    except SettingsError as error:
        assert "\n" not in str(error)
    finally:
        _file.unlink()


def environment(data: bytes) -> None:
    """Variables, NAME=VALUE a line, override settings or are one line of SettingsError."""
    lines = [line.partition("=") for line in data.decode(errors="replace").splitlines()]
    try:
        load(None, {"FANWIRE_" + name: value for name, _, value in lines})
    except SettingsError as error:
        assert "\n" not in str(error)


def tcp_messages(data: bytes) -> None:
    """A TCP stream, in two reads, is cut into messages that a datagram can hold, none of them made up."""
    framing, at = Framing(), data[0] if data else 0
    messages = [*framing.feed(data[:at]), *framing.feed(data[at:]), *framing.finish()]
    assert all(1 <= len(message) <= MAX_DATAGRAM and message in data for message in messages)


def netlink(data: bytes) -> None:
    """Whatever the kernel says for an answer or an event, the answer is one or none, and nothing is raised."""
    kernel = PlayedKernel()
    with mock.patch.object(shared.netlink, "_open", return_value=kernel):
        asks: tuple[Callable[[Netlink], object], ...] = (
            Netlink.links,
            lambda netlink: netlink.route("10.2.0.2"),
            lambda netlink: netlink.neighbour(2, "10.2.0.2"),
            lambda netlink: list(netlink.events()),
        )
        for ask in asks:
            kernel.says = deque([data])
            ask(Netlink())


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target for target in (bus_message, environment, json_lines, names, netlink, settings, tcp_messages)
}


def read_corpus(name: str) -> list[bytes]:
    """The inputs kept for a target."""
    return [bytes.fromhex(line) for line in (CORPUS / f"{name}.hex").read_text().split()]


def write_corpus(name: str, inputs: list[bytes]) -> None:
    """Keep these inputs, shortest first."""
    (CORPUS / f"{name}.hex").write_text("".join(f"{data.hex()}\n" for data in sorted(set(inputs), key=_length_first)))


def _length_first(data: bytes) -> tuple[int, bytes]:
    return len(data), data

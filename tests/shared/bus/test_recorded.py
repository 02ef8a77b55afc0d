"""Messages of earlier releases: while one is upgraded, processes of both are on the bus."""

import json
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from shared.bus.bodies.packing import pack
from shared.bus.messages import KINDS, VERSION, decode, encode

RECORDED = {
    int(path.stem.rpartition("-")[2]): json.loads(path.read_text())
    for path in (Path(__file__).parent / "recorded").glob("wire-*.json")
}
"""By version and kind: the parts of a message, in hexadecimal, as they were sent."""


def parts_of(version: int, kind: str) -> list[bytes]:
    """The parts of a recorded message."""
    return [bytes.fromhex(part) for part in RECORDED[version][kind]]


def is_kept(then: Any, now: Any) -> bool:
    """Return whether the message was read as it was, apart from fields that have come since, behind or beside."""
    if isinstance(then, list):
        return len(then) <= len(now) and all(map(is_kept, then, now))
    if isinstance(then, dict):
        return then.keys() <= now.keys() and all(is_kept(value, now[key]) for key, value in then.items())
    return bool(then == now)


def test_this_version_and_the_one_before_are_recorded() -> None:
    """A change of the version keeps messages of the old one, and they can still be read."""
    assert RECORDED.keys() >= {version for version in (VERSION - 1, VERSION) if version > 0}


@pytest.mark.parametrize(("version", "kind"), [(version, kind) for version in RECORDED for kind in RECORDED[version]])
def test_recorded_messages_are_read(version: int, kind: str) -> None:
    """A message of each kind, sent by this version and the one before, is read today."""
    parts = parts_of(version, kind)
    message = decode(parts)
    assert message.envelope.version == version
    assert is_kept(msgpack.unpackb(parts[1]), msgspec.to_builtins(message.envelope))
    assert is_kept(msgpack.unpackb(parts[2]), msgspec.to_builtins(message.body, builtin_types=(bytes,)))
    if message.batch is not None:
        assert [len(payload) for *_, payload in message.batch.datagrams()] == [0, 3, 5]
        assert bytes(message.batch.payload) == parts[4]


@pytest.mark.parametrize("kind", ["datagrams", "again"])
def test_batch_that_the_kernel_has_not_copied_is_as_it_always_was(kind: str) -> None:
    """A batch without a generation is, to the byte, the message that releases before generations sent and read."""
    parts = parts_of(1, kind)
    message, sender = decode(parts), "ingest.1"
    numbers = {"boot": message.envelope.boot, "sequence": message.envelope.sequence, "total": message.envelope.total}
    assert encode(message.topic, message.body, sender=sender, **numbers, batch=message.batch)[:3] == parts[:3]


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_come_later_are_passed_over(kind: str) -> None:
    """A field that a later release puts behind those of today, in envelope or body, costs this one nothing."""
    topic, envelope, body, *arrays = parts_of(VERSION, kind)
    today = decode([topic, envelope, body, *arrays])
    later = [msgpack.packb([*msgpack.unpackb(pack(part)), {"new": [1, b"2"]}]) for part in (today.envelope, today.body)]
    assert decode([topic, *later, *arrays]).body == today.body


def test_field_of_a_client_that_comes_later_is_passed_over() -> None:
    """A registry whose clients have a field that this release does not know is read without it."""
    topic, envelope, body = parts_of(VERSION, "registry.snapshot")
    *before, clients = msgpack.unpackb(body)
    later = msgpack.packb([*before, [client | {"new": [1, b"2"]} for client in clients]])
    assert decode([topic, envelope, later]).body == decode([topic, envelope, body]).body

"""Datagrams as flow exporters send them, by the documents: Cisco's of v5, RFC 3954, RFC 7011, sflow.org's."""

import struct
from collections.abc import Sequence

from shared.net.addresses import pack_address


def netflow_v5(number: int, flows: int = 1, uptime: int = 0, engine: tuple[int, int] = (0, 0)) -> bytes:
    """NetFlow v5; `number` is how many flows the engine has told of before."""
    return struct.pack(">HHIIIIBBH", 5, flows, uptime, 0, 0, number, *engine, 0) + bytes(48 * flows)


def netflow_v9(number: int, uptime: int = 0, source_id: int = 0, rest: bytes = bytes(40)) -> bytes:
    """NetFlow v9; `number` counts datagrams."""
    return struct.pack(">HHIIII", 9, 1, uptime, 0, number, source_id) + rest


def sflow(number: int, uptime: int = 0, agent: str = "192.0.2.1", sub_agent: int = 0, rest: bytes = b"") -> bytes:
    """SFlow v5 without samples; `number` counts datagrams."""
    packed = pack_address(agent)
    address = struct.pack(">I", 2) + packed if ":" in agent else struct.pack(">I", 1) + packed[12:]
    return struct.pack(">I", 5) + address + struct.pack(">IIII", sub_agent, number, uptime, 0) + rest


def ipfix(number: int, *sets: bytes, domain: int = 0) -> bytes:
    """IPFIX; `number` is how many data records were sent before."""
    return struct.pack(">HHIII", 10, 16 + sum(map(len, sets)), 0, number, domain) + b"".join(sets)


def a_set(number: int, content: bytes) -> bytes:
    """A set of IPFIX: templates (2), options templates (3), or the data of a template."""
    return struct.pack(">HH", number, 4 + len(content)) + content


def template(number: int, lengths: Sequence[int], enterprise: bool = False) -> bytes:
    """A template with fields of these lengths; 65,535: it varies."""
    fields = b"".join(
        struct.pack(">HHI", 0x8000 | at, length, 9) if enterprise else struct.pack(">HH", at, length)
        for at, length in enumerate(lengths)
    )
    return struct.pack(">HH", number, len(lengths)) + fields


def options_template(number: int, lengths: Sequence[int]) -> bytes:
    """An options template whose first field is the scope."""
    fields = b"".join(struct.pack(">HH", at, length) for at, length in enumerate(lengths))
    return struct.pack(">HHH", number, len(lengths), 1) + fields

"""The header of a datagram in words: NetFlow, IPFIX, sFlow, syslog. No I/O.

It guesses by the first bytes, as the page says. Whatever the bytes, it only ever returns pairs of texts.
"""

import ipaddress
import re
import struct
from datetime import UTC, datetime
from typing import Final

Field = tuple[str, str]

PRIORITY: Final = re.compile(rb"<(\d{1,3})>(1 )?")
MAX_PRIORITY: Final = 191
FACILITIES: Final = (
    *("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"),
    *("ntp", "security", "console", "solaris-cron", *(f"local{number}" for number in range(8))),
)
SEVERITIES: Final = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
V5: Final = struct.Struct(">HHIIIIBBH")
V9: Final = struct.Struct(">HHIIII")
IPFIX: Final = struct.Struct(">HHIII")
SET: Final = struct.Struct(">HH")
MAX_SETS: Final = 8
STATSD: Final = re.compile(rb"[\w.\-/]+:[^|\n]{1,40}\|(c|g|ms|h|s|d)\b")


def dissect(payload: bytes) -> list[Field]:
    """Return names and values of the header's fields; none for a datagram of no known kind.

    >>> dissect(b"<34>1 2026-11-28T17:30:00Z relay su - - - failed")[:2]
    [('looks like', 'syslog, RFC 5424'), ('priority', '34: auth.crit')]
    """
    if found := PRIORITY.match(payload):
        priority = int(found[1])
        kind = "syslog, RFC 5424" if found[2] else "syslog, RFC 3164"
        if priority <= MAX_PRIORITY:
            name = f"{FACILITIES[priority >> 3]}.{SEVERITIES[priority & 7]}"
            return [("looks like", kind), ("priority", f"{priority}: {name}")]
    try:
        return _flow(payload) or _other(payload)
    except struct.error:  # cut short
        return []


def _flow(payload: bytes) -> list[Field]:
    (version,) = struct.unpack_from(">H", payload) if len(payload) >= 2 else (0,)
    if version == 5 and len(payload) >= V5.size:
        _, count, uptime, seconds, _, sequence, _, engine, sampling = V5.unpack_from(payload)
        fields = [("records", str(count)), ("sequence of flows", str(sequence)), ("engine", str(engine))]
        fields.append(("sampling", f"1 in {sampling & 0x3FFF}" if sampling & 0x3FFF else "none told"))
        return [("looks like", "NetFlow v5"), *fields, _uptime(uptime), _time(seconds)]
    if version == 9 and len(payload) >= V9.size:
        _, count, uptime, seconds, sequence, domain = V9.unpack_from(payload)
        fields = [("records", str(count)), ("sequence", str(sequence)), ("source id", str(domain))]
        return [("looks like", "NetFlow v9"), *fields, _uptime(uptime), _time(seconds), _sets(payload, V9.size, 0)]
    if version == 10 and len(payload) >= IPFIX.size:
        _, length, seconds, sequence, domain = IPFIX.unpack_from(payload)
        fields = [("length", str(length)), ("sequence of records", str(sequence)), ("domain", str(domain))]
        return [("looks like", "IPFIX"), *fields, _time(seconds), _sets(payload, IPFIX.size, 2)]
    if payload[:4] == b"\0\0\0\5" and len(payload) >= 28:
        family = struct.unpack_from(">I", payload, 4)[0]
        size = {1: 4, 2: 16}.get(family)
        if size is None:
            return []
        agent = ipaddress.ip_address(payload[8 : 8 + size])
        sub_agent, sequence, uptime, samples = struct.unpack_from(">IIII", payload, 8 + size)
        fields = [("agent", str(agent)), ("sub-agent", str(sub_agent)), ("sequence", str(sequence))]
        return [("looks like", "sFlow v5"), *fields, ("samples", str(samples)), _uptime(uptime)]
    return []


def _other(payload: bytes) -> list[Field]:
    if payload[:1] == b"\x30" and b"\x02\x01" in payload[:8]:
        return [("looks like", "SNMP")]
    if STATSD.match(payload):
        return [("looks like", "statsd")]
    return []


def _sets(payload: bytes, at: int, templates: int) -> Field:
    """Name the sets of a datagram; `templates` is the id of a set of templates, options templates have the next."""
    found: list[str] = []
    while at + SET.size <= len(payload) and len(found) < MAX_SETS:
        number, length = SET.unpack_from(payload, at)
        if length < SET.size:
            break
        kind = {templates: "templates", templates + 1: "options templates"}.get(number, f"data by template {number}")
        found.append(f"{kind}, {length} bytes")
        at += length
    return "sets", "; ".join(found) or "none"


def _uptime(milliseconds: int) -> Field:
    return "uptime", f"{milliseconds / 1000:,.3f} s"


def _time(seconds: int) -> Field:
    return "exporter's clock", datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

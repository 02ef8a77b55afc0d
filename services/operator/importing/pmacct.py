"""pmacct's `tee_receivers` file: a pool of receivers a line, as keys and values. No I/O."""

import re
from typing import Final

from services.operator.importing.receivers import ForeignReceiver, Line, Names, parse_number

DEFAULT_LISTEN: Final = "udp://[::]:2100"
KEYS: Final = ("id", "ip", "tag", "balance-alg", "src_port", "kafka_broker", "kafka_topic", "zmq_address")
ELSEWHERE: Final = ("kafka_broker", "kafka_topic", "zmq_address")
WORD: Final = re.compile(r"(?:'[^']*'|\S)+")
"""A word in single quotes may have spaces; the quotes are removed."""
HASHES: Final = ("hash-agent", "hash-crc32")


def parse_line(text: str, line: Line, names: Names) -> None:
    """Add a pool's receivers."""
    text = text.strip()
    if not text or text.startswith(("!", "#")):
        return
    keys = _parse_keys(text)
    pool = parse_number(keys.get("id", ""), 1, 4_294_967_295, "id")
    if reason := _beyond_us(keys):
        line.left_out.append(f"pool {pool}: {reason}")
        return
    if "ip" not in keys:
        raise ValueError("expected ip=HOST:PORT,...")
    line.receivers += [_parse_receiver(each, names) for each in map(str.strip, keys["ip"].split(",")) if each]
    if not line.receivers:
        raise ValueError("ip: expected at least one HOST:PORT")
    if balance := keys.get("balance-alg"):
        line.shared = True
        _tell_balance(balance, pool, line)
    if "src_port" in keys:
        line.left_out.append(f"pool {pool}: src_port; copies leave from a port that the kernel picks")


def _parse_keys(text: str) -> dict[str, str]:
    keys = {}
    for word in WORD.findall(text):
        key, equals, value = word.replace("'", "").partition("=")
        if not equals or not value:
            raise ValueError(f"expected KEY=VALUE without spaces, not {word!r}")
        if key in keys:
            raise ValueError(f"duplicate key {key}; pmacct takes each once a line")
        keys[key] = value
    return keys


def _beyond_us(keys: dict[str, str]) -> str:
    """Return the reason why no setting can stand for the pool; empty when one can."""
    if unknown := keys.keys() - set(KEYS):
        return f"{min(unknown)!r} is not a known key; pmacct ignores lines with keys that it does not know"
    if elsewhere := keys.keys() & set(ELSEWHERE):
        return f"{min(elsewhere)}; copies go out by UDP alone"
    if "tag" in keys:
        return f"tag={keys['tag']}; a pre_tag_map says which exporters have it: give the collector those in `from`"
    return ""


def _tell_balance(balance: str, pool: int, line: Line) -> None:
    if balance.startswith(HASHES):
        line.notes.append(
            f"pool {pool}: each exporter goes to one receiver, but probably not the one pmacct would choose"
        )
    elif balance.startswith(("rr", "hash-tag")):
        line.left_out.append(f"pool {pool}: balance-alg={balance}; receivers share by hash of source address instead")
    else:
        line.shared = False
        line.notes.append(
            f"pool {pool}: pmacct ignores balance-alg={balance}, every receiver gets everything; so with fanwire"
        )


def _parse_receiver(text: str, names: Names) -> ForeignReceiver:
    host, colon, port = text.rpartition(":")
    if not (colon and host):
        raise ValueError(f"{text!r}: expected HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return ForeignReceiver(names.receiver(host), names.port(port))

"""samplicator's configuration file, `SOURCE[/MASK]: RECEIVER[/PORT[/INTERVAL[,TTL]]] ...`, as samplicator reads it.

Every line that matches a datagram's source applies, not only the first; a source of 0.0.0.0 matches all. No I/O.
"""

import ipaddress
from typing import Final

from services.operator.importing.receivers import ForeignReceiver, Line, Names, parse_number

DEFAULT_PORT: Final = "2000"
DEFAULT_LISTEN: Final = "udp://[::]:2000"
DEFAULT_TTL: Final = 64
MAX_PORT: Final = 65_535


def parse_line(text: str, line: Line, names: Names) -> None:
    """Add a line's receivers."""
    text = text.partition("#")[0].strip()
    if not text:
        return
    colon = text.find(":", max(0, text.find("]")) if text.startswith("[") else 0)
    if colon < 0:
        raise ValueError(f"expected SOURCE/MASK: RECEIVER/PORT ..., and there is no colon in {text!r}")
    prefixes = _parse_source(text[:colon], line, names)
    receivers = [each for word in text[colon + 1 :].split() for each in _parse_receivers(word, line, names)]
    if prefixes is not None:
        line.receivers += [
            ForeignReceiver(address, port, prefixes, sample, hop_limit)
            for address, port, sample, hop_limit in receivers
        ]
    if not receivers:
        line.notes.append("it names no receiver")


def _parse_source(text: str, line: Line, names: Names) -> tuple[str, ...] | None:
    """Return the prefix, none for every source; None where no prefix can express it."""
    host, slash, mask = (part.strip() for part in text.partition("/"))
    if host.startswith("["):
        if not host.endswith("]"):
            raise ValueError(f"{host!r}: the bracket is not closed")
        host = host[1:-1]
    address = ipaddress.ip_address(names.address(host))
    bits: int = address.max_prefixlen
    if slash and address.version == 4 and "." in mask:
        wildcard = ~int(ipaddress.IPv4Address(mask)) & 0xFFFFFFFF
        if wildcard & (wildcard + 1) and int(address):
            line.left_out.append(f"the mask {mask} is not a prefix's; say the sources as prefixes, in `from`")
            return None
        bits -= wildcard.bit_length()
    elif slash:
        bits = parse_number(mask, 0, bits, "prefix length")
    if not int(address) if address.version == 4 else not bits:
        return ()
    if address.version == 6:
        line.notes.append("samplicator compares an IPv6 source's first byte alone; here the whole prefix counts")
    try:
        return (str(ipaddress.ip_network(f"{address}/{bits}")),)
    except ValueError:
        line.left_out.append(f"{address}/{bits} matches no source in samplicator: there are bits beyond the mask")
        return None


def _parse_receivers(word: str, line: Line, names: Names) -> list[tuple[str, int, int, int]]:
    """Return address, port, interval and time to live; one for each port of a range."""
    if word.startswith("["):
        host, bracket, rest = word[1:].partition("]")
        if not bracket:
            raise ValueError(f"{word!r}: the bracket is not closed")
        if rest and not rest.startswith("/"):
            line.notes.append(
                f"{word}: samplicator reads no port without a slash and sends to {DEFAULT_PORT}; so does fanwire"
            )
            rest = ""
        rest = rest[1:] if rest else DEFAULT_PORT
    else:
        host, slash, rest = word.partition("/")
        rest = rest if slash else DEFAULT_PORT
    ports, _, rest = rest.partition("/")
    interval, comma, ttl = rest.partition(",")
    sample = parse_number(interval, 1, 1_000_000, f"{word}: interval") if interval else 1
    hop_limit = parse_number(ttl, 1, 255, f"{word}: TTL") if comma else DEFAULT_TTL
    address = names.receiver(host)
    return [(address, port, sample, hop_limit) for port in _parse_ports(ports, names)]


def _parse_ports(text: str, names: Names) -> range:
    """Parse one port, a range `7000-7010`, or a number of ports from one on: `7000+10`."""
    for sign in "-+":
        first, found, last = text.partition(sign)
        if found and first.isdigit():
            begin = parse_number(first, 1, MAX_PORT, "port")
            largest = MAX_PORT if sign == "-" else MAX_PORT + 1 - begin
            end = parse_number(last, begin if sign == "-" else 1, largest, "port range")
            return range(begin, end + 1 if sign == "-" else begin + end)
    number = names.port(text)
    return range(number, number + 1)

"""The names everything is counted under, and what must add up.

A service keeps accounts: one a stream, an origin or a collector, each a table of counters that only grow. They are
counted per batch, never per datagram, and published with its status each second.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Final

# ingest, account `stream/NAME`
RECEIVED: Final = "received"
"""Datagrams taken from sockets."""
BYTES: Final = "bytes"
"""Payload bytes: of what was received (ingest), of what was delivered (forwarder)."""
PUBLISHED: Final = "published"
"""Datagrams handed to the bus."""
KERNEL_DROPPED: Final = "kernel_dropped"
"""Datagrams the kernel dropped before we saw them: full receive buffer (SO_MEMINFO). Not part of `received`."""
REPLIED: Final = "replied"
"""Replies sent to senders."""
REPLY_FAILED: Final = "reply_failed"
"""Replies the kernel refused, or not sent because the sender's port is 0 or the datagram was itself a reply."""
CONNECTIONS_REFUSED: Final = "connections_refused"
"""TCP connections closed at once because as many as allowed were open."""
CONNECTIONS_EXPIRED: Final = "connections_expired"
"""TCP connections closed because they sent nothing for too long."""
RECEIVE_ERRORS: Final = "receive_errors"
"""Receive calls that failed; nothing is known to be lost by one."""

# forwarder, account `origin/WORKER/BOOT/STREAM`
BASELINE: Final = "baseline"
"""The worker's running count when we began to follow it."""
TAKEN: Final = "taken"
"""Datagrams that came."""
MISSED: Final = "missed"
"""Datagrams the worker published that never came: dropped by the bus, or lost with a killed process."""
REACHED: Final = "reached"
"""The worker's running count as of the last message."""

# forwarder, account `collector/NAME`
EXPECTED: Final = "expected"
"""Datagrams that were published on its streams since it signed up, whether they came or not."""
OFFERED: Final = "offered"
"""Datagrams that came on its streams since it signed up."""
FILTERED: Final = "filtered"
"""Not from a prefix it wants."""
SAMPLED_OUT: Final = "sampled_out"
"""Passed over by 1-in-N sampling."""
SHARED_OUT: Final = "shared_out"
"""Went to another member of its group."""
DELIVERED: Final = "delivered"
"""Datagrams the kernel took for it."""
HELD: Final = "held"
"""Datagrams that wait, for room in the send buffer (forwarder) or for the next hop to tell its link address
(transmitter): the one counter that also falls."""
REFUSALS: Final = "refusals"
"""Port-unreachable answers seen: each means that at least one delivered datagram reached nobody (forwarder)."""
UNREACHABLES: Final = "unreachables"
"""The same for other ICMP errors, such as that the host did not answer for its address."""

# dropped on purpose, by cause
DROPPED: Final = "dropped_"
NO_SUBSCRIBER: Final = DROPPED + "no_subscriber"
"""Nobody wants the stream (ingest)."""
BUS_FULL: Final = DROPPED + "bus_full"
"""The bus took no more: its queue was at the high-water mark (ingest)."""
OVERSIZED: Final = DROPPED + "oversized"
"""Longer than 65,507 bytes, which an IPv4 datagram can't carry (ingest: TCP, AF_UNIX, and UDP over IPv6)."""
CUT_OFF: Final = DROPPED + "cut_off"
"""A TCP message that was not finished when its connection was reset or ended by us, or before its octet count."""
BUFFER_FULL: Final = DROPPED + "buffer_full"
"""The send buffer was full: the collector's own, for longer or by more than may wait (forwarder), or that of its
interface (transmitter)."""
REFUSED: Final = DROPPED + "refused"
"""The collector's port is closed (forwarder)."""
NOT_CONNECTED: Final = DROPPED + "not_connected"
"""There is no way to the collector's address: no route, or no such family here (forwarder)."""

QUEUE_FULL: Final = DROPPED + "queue_full"
"""The interface's own queue took no more, ENOBUFS (transmitter)."""
NO_ROUTE: Final = DROPPED + "no_route"
"""There is no route to the collector (transmitter)."""
NO_NEIGHBOUR: Final = DROPPED + "no_neighbour"
"""The next hop did not tell its link address in time: no ARP or neighbour discovery answer (transmitter)."""
INTERFACE_DOWN: Final = DROPPED + "interface_down"
"""The interface to the collector is down, without carrier, or gone (transmitter)."""
OTHER_FAMILY: Final = DROPPED + "other_family"
"""An IPv4 source can't be claimed towards an IPv6 collector, nor the other way round (transmitter)."""
DESTINATION_REFUSED: Final = DROPPED + "destination_refused"
"""The policy lets no copies go to the collector's address (transmitter)."""
SOURCE_REFUSED: Final = DROPPED + "source_refused"
"""The policy, or what the address is, does not allow to claim this source (transmitter)."""
RATE_LIMITED: Final = DROPPED + "rate_limited"
"""More than `frames_per_second` (transmitter)."""

ORIGIN: Final = re.compile(r"origin/([^/]+)/([0-9a-f]{1,16})/([^/]+)")
Accounts = dict[str, dict[str, int]]


def new_accounts() -> defaultdict[str, Counter[str]]:
    """Accounts that begin at zero when first named."""
    return defaultdict(Counter)


def dropped(account: Mapping[str, int]) -> int:
    """What was dropped, all causes together."""
    return sum(count for name, count in account.items() if name.startswith(DROPPED))


def discrepancies(accounts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield a sentence for every equation that does not hold within one service's accounts."""
    for name, account in accounts.items():
        for left, total, right in _equations(name, account):
            if left != right:
                yield f"{name}: {total} is {left}, its parts add up to {right}"


def _equations(name: str, account: Mapping[str, int]) -> Iterator[tuple[int, str, int]]:
    def parts(*names: str) -> int:
        return sum(account.get(part, 0) for part in names)

    if name.startswith("stream/"):
        yield parts(RECEIVED), RECEIVED, parts(PUBLISHED) + dropped(account)
    elif name.startswith("origin/"):
        yield parts(REACHED), REACHED, parts(BASELINE, TAKEN, MISSED)
    elif name.startswith("collector/"):
        yield parts(EXPECTED), EXPECTED, parts(OFFERED, MISSED)
        yield parts(OFFERED), OFFERED, parts(FILTERED, SAMPLED_OUT, SHARED_OUT, DELIVERED, HELD) + dropped(account)


def is_origin(name: str) -> bool:
    """Whether an account's name is one that `parse_origin` reads."""
    return ORIGIN.fullmatch(name) is not None


def parse_origin(name: str) -> tuple[str, int, str]:
    """Return worker, boot id and stream of an origin account's name; `unparse_origin` is the way back."""
    found = ORIGIN.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is not the name of an origin account")
    worker, boot, stream = found.groups()
    return worker, int(boot, 16), stream


def unparse_origin(worker: str, boot: int, stream: str) -> str:
    """Return the name of the account that follows a stream of a worker since its boot."""
    return f"origin/{worker}/{boot:x}/{stream}"

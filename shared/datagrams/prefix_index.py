"""Matches sources against many sets of networks: one search a prefix length, whatever the number of sets. No I/O."""

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import Indices, Rows
from shared.net.addresses import V4_MAPPED, pack_network

WHOLE: Final = (1 << 128) - 1
MAPPED: Final = int.from_bytes(V4_MAPPED)
Network = tuple[bool, int, bytes]
"""True for IPv4; the number of leading bits of 128 that count; and the first address, 16 bytes."""


def disjoint(texts: Iterable[str]) -> tuple[Network, ...]:
    """Return the networks of a set with none inside another, so that an address is found in one of them at most."""
    packed = [pack_network(text) for text in texts]
    four = [(network, bits) for network, bits in packed if network.startswith(V4_MAPPED) and bits >= 96]
    six = [each for each in packed if each not in four]
    kept4 = ipaddress.collapse_addresses(ipaddress.IPv4Network((each[12:], bits - 96)) for each, bits in four)
    kept6 = ipaddress.collapse_addresses(ipaddress.IPv6Network(each) for each in six)
    found = [(True, each.prefixlen + 96, V4_MAPPED + each.network_address.packed) for each in kept4]
    return (*found, *((False, each.prefixlen, each.network_address.packed) for each in kept6))


class _Table:
    """The networks of one prefix length: their first addresses, sorted, and the sets that each is in."""

    def __init__(self, ipv4: bool, bits: int, sets_of: dict[bytes, list[int]]) -> None:
        self.ipv4 = ipv4
        mask = (WHOLE << (128 - bits) & WHOLE).to_bytes(16)
        self._mask = np.frombuffer(mask[12:], ">u4").astype(np.uint32)[0] if ipv4 else np.frombuffer(mask, np.uint8)
        networks = sorted(sets_of)
        packed = b"".join(each[12:] if ipv4 else each for each in networks)
        self._networks = np.frombuffer(packed, ">u4").astype(np.uint32) if ipv4 else np.frombuffer(packed, "S16")
        self._sets = np.array([number for each in networks for number in sets_of[each]], np.int64)
        self._first = np.append(0, np.cumsum([len(sets_of[each]) for each in networks]))

    def match(self, addresses: npt.NDArray[np.uint8], rows: Indices) -> tuple[Indices, Indices]:
        """Return pairs of set and row for packed addresses, shape (n, 16), that stand in these rows."""
        if self.ipv4:
            keys = addresses[:, 12:].copy().view(">u4")[:, 0].astype(np.uint32) & self._mask
        else:
            keys = (addresses & self._mask).view("S16")[:, 0]
        at = np.searchsorted(self._networks, keys)
        at[at == len(self._networks)] = 0
        hit = np.flatnonzero(self._networks[at] == keys)
        first = self._first[at[hit]]
        counts = self._first[at[hit] + 1] - first
        ends = np.cumsum(counts)
        within = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - ends + counts, counts)
        return self._sets[within], np.repeat(rows[hit], counts)


class PrefixIndex:
    """Sets of networks, each as `disjoint` returns it; memory grows with the number of networks in all of them."""

    def __init__(self, sets: Sequence[Sequence[Network]]) -> None:
        lengths: dict[tuple[bool, int], dict[bytes, list[int]]] = {}
        for number, networks in enumerate(sets):
            for ipv4, bits, network in networks:
                lengths.setdefault((ipv4, bits), {}).setdefault(network, []).append(number)
        self._tables = [_Table(ipv4, bits, sets_of) for (ipv4, bits), sets_of in lengths.items()]

    def match(self, datagrams: Rows) -> list[tuple[int, Indices]]:
        """Return the sets that any source is in, by number, each with its rows in order, dtype `ROW`, shape (n,)."""
        packed = np.ascontiguousarray(datagrams["address"])
        words = packed.view(">u4")
        mapped = (words[:, 2] == 0xFFFF) & (words[:, 0] == 0) & (words[:, 1] == 0)
        rows = {ipv4: np.flatnonzero(mapped == ipv4) for ipv4 in (True, False)}
        addresses = {ipv4: packed[each] for ipv4, each in rows.items()}
        found = [each.match(addresses[each.ipv4], rows[each.ipv4]) for each in self._tables if len(rows[each.ipv4])]
        together = np.concatenate(
            [np.empty(0, np.int64), *(sets * len(datagrams) + matched for sets, matched in found)]
        )
        if not len(together):
            return []
        together.sort()
        sets, matched = np.divmod(together, len(datagrams))
        starts = np.flatnonzero(np.diff(sets, prepend=-1))
        return list(zip(sets[starts].tolist(), np.split(matched, starts[1:]), strict=True))

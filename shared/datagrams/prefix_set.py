"""A set of networks matched against a column of addresses; for many sets see `prefix_index`. No I/O."""

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered, Mask
from shared.net.addresses import V4_MAPPED, pack_network

Datagrams = DatagramBatch | Gathered
"""Datagrams of one stream."""
MAPPED_HALF: Final = np.uint64(0xFFFF)
"""Bytes 8 to 11 of a mapped address (RFC 4291)."""


class Prefixes:
    """A set of networks, to be matched against a column of addresses."""

    def __init__(self, texts: Iterable[str]) -> None:
        packed = [pack_network(text) for text in texts]
        masks = [((1 << bits) - 1) << (128 - bits) for _, bits in packed]
        self._mapped = np.array([network.startswith(V4_MAPPED) and bits >= 96 for network, bits in packed])
        self._networks = np.array([np.frombuffer(network, ">u8") for network, _ in packed], np.uint64)
        self._masks = np.array([(mask >> 64, mask & (2**64 - 1)) for mask in masks], np.uint64)

    def match(self, halves: npt.NDArray[np.uint64]) -> Mask:
        """Return the addresses, pairs of uint64, shape (n, 2), that are in any of the networks: bool, shape (n,)."""
        inside = ((halves[:, None, :] & self._masks) == self._networks).all(axis=2)
        # ::/0 and its like are IPv6 prefixes: IPv4 addresses, which are kept mapped into IPv6, do not match them.
        mapped = (halves[:, 0] == 0) & (halves[:, 1] >> np.uint64(32) == MAPPED_HALF)
        matched: Mask = (inside & (mapped[:, None] == self._mapped)).any(axis=1)
        return matched


def halves_of(batch: Datagrams) -> npt.NDArray[np.uint64]:
    """Return source addresses as pairs of uint64 in network order, shape (n, 2), for prefixes and hashes."""
    packed = np.ascontiguousarray(batch.rows["address"])
    return packed.view(">u8").astype(np.uint64)

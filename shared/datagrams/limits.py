"""Limits of datagrams and batches, also for processes that never see a batch and start without numpy."""

from typing import Final

MAX_DATAGRAM: Final = 65_507
"""Bytes: the largest UDP payload over IPv4 (65,535 less 20 and 8 bytes of header)."""
MAX_ROWS: Final = 1024
"""The most that one call of recvmmsg takes (UIO_MAXIOV). Only a full queue makes a batch this large; then four times as
many datagrams as with 256 share the cost of a batch, some 100 µs in each process that it passes."""
ROW_SIZE: Final = 20
"""Bytes of one datagram's columns."""
MAX_PAYLOAD: Final = 512 * 1024
"""Bytes in a bus message: below its limit of 1 MiB, with room for one more datagram and the headers."""
BUCKETS: Final = 1024
"""Parts of all sources, by hash. Members of a group take some each: one of eight 8 % more or less than an eighth."""

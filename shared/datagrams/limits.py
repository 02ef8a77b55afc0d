"""Limits of datagrams and batches, for processes too that never see a batch and start without its arrays."""

from typing import Final

MAX_DATAGRAM: Final = 65_507
"""Bytes: the largest UDP payload over IPv4 (65,535 less 20 and 8 bytes of header)."""
MAX_ROWS: Final = 1024
"""As many as one call of recvmmsg takes (UIO_MAXIOV). Only a full queue makes a batch so large; then what a batch
costs, some 100 µs in each process that it passes, is shared by four times as many datagrams as with 256."""
ROW_SIZE: Final = 20
"""Bytes of one datagram's columns."""
MAX_PAYLOAD: Final = 512 * 1024
"""Bytes in a bus message: keeps it under its limit of 1 MiB with room for one more datagram and the headers."""

"""The way to a collector: next hops, rows that wait, shares, threads that send, and what the kernel answers."""

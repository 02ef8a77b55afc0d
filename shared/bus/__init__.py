"""The bus: its messages, ZeroMQ sockets and keys, payloads lent in shared memory, gaps noticed, statuses published."""

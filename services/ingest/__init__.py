"""Ingest takes datagrams in and puts them on the bus as batches; run as many workers as there are cores to spare.

Sockets: UDP, TCP and AF_UNIX datagram listeners of every stream; ZeroMQ XPUB to the broker. Workers share UDP and TCP
ports by SO_REUSEPORT; a path or a multicast group can't be shared, so those listeners belong to the first worker.
Sockets that systemd passes are used in place of bound ones. Privilege: none; CAP_NET_ADMIN allows receive buffers
beyond net.core.rmem_max.
"""

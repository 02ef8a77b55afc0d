"""The operator commands: `fanwire clients`, `watch`, `ledger` and the rest, each run from a terminal and then gone.

Sockets: a ZeroMQ SUB on the bus (watch, ledger, ready), with an XPUB for requests (frame, wake), one connection to the
gateway (clients, register, leave, collect), and for collect a UDP socket of its own. Privilege: none, but the bus
directory is open to its owner alone; `frame --no-checksum-offload` needs CAP_NET_ADMIN.
"""

"""The operator commands: `fanwire clients`, `watch`, `ledger` and the rest; each runs from a terminal and ends.

Sockets: a ZeroMQ SUB on the bus (watch, ledger, ready), with an XPUB for requests (frame, wake), one connection to the
gateway (clients, register, leave, collect), and for collect a UDP socket of its own. Privilege: none, but only its
owner may enter the bus directory; `frame --no-checksum-offload` needs CAP_NET_ADMIN.
"""

"""The forwarder sends each collector its copies by plain UDP, from this host's own address.

Sockets: one connected, non-blocking UDP socket a collector; ZeroMQ SUB and XPUB to the broker; netlink. No privilege.
It serves the collectors whose `source` is `relay`; the transmitter serves those that want the exporter's address kept.
"""

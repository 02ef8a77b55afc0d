"""The transmitter sends collectors copies that carry the exporter's own address, and raw Ethernet frames.

Sockets: AF_PACKET and raw IP of both families, which can only send; ZeroMQ SUB and XPUB to the broker; netlink.
Privilege: CAP_NET_RAW until these sockets are open, then none. `opener` opens them before anything else is imported,
gives up every privilege and starts the program anew with the open sockets. The process that reads the bus never held a
capability, and proves it (`privileges`). Without CAP_NET_RAW it stays up, and says what is missing.
"""

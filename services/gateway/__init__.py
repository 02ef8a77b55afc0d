"""The gateway: the client registry, which collectors join by one line over TCP, and its announcement on the bus.

Sockets: TCP (127.0.0.1:5000) and AF_UNIX stream listeners for clients; a publisher (`registry/`, `serve/`, `transmit/`,
`status/`) and a subscriber (its own reply topic) on the bus. Privilege: none.
"""

"""The broker: every other process connects to it, and to nothing else.

Sockets: ZeroMQ XSUB (`publish`) and XPUB (`subscribe`) on ipc in the bus directory, mode 0700. Privilege: none.
"""

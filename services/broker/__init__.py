"""The broker: every other process connects to it, and to nothing else.

Sockets: ZeroMQ XSUB (`publish`) and XPUB (`subscribe`) on ipc in the bus directory, mode 0700. Privilege: none. Started
by root, it lets the group of `[transmitter] user` in, mode 0750: a transmitter that root starts becomes that user.
"""

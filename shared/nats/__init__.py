"""Connections to the NATS servers of `[uplink]`, for services that exchange something with other hosts.

Nothing here is imported where `[uplink] servers` is empty.
"""

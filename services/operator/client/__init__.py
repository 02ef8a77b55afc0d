"""Clients of the running services: the gateway's registry, the bus, the transmitter."""

"""Connections: listeners, TLS, the limits of each connection and of each address."""

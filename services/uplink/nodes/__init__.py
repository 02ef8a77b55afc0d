"""Nodes: sites that share one list of collectors. Who lives, and how far each has got with its copies.

A *node* tells the others twice a second that it lives, and which datagrams its senders have copied: a *beat*. They go
by NATS without JetStream, which would elect a new leader for some seconds just when a node has died.
"""

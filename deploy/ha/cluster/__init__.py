"""Three relays and three NATS servers on one machine, in network namespaces, to try and to kill: `make cluster`.

A *node* is a relay and a NATS server, in a network and among processes of its own. Nodes `a` and `b` share the address
that exporters send to; node `c` stands at another site. All of it is inside one namespace of processes, so that nothing
outlives it, and has no way out to any network of the host.
"""

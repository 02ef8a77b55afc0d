"""`fanwire doctor`: is this host fit for production? It gathers facts, judges them, and names a cure for each.

`host`, `listening`, `network_paths` and `services` judge (facts in, findings out, no I/O). `facts` and
`listening_facts` gather facts. `probe` sends a datagram through all of it, if asked to. Privilege: none; a finding
names facts that could not be seen.
"""

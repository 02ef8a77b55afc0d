"""Exchanges streams with other sites, by NATS JetStream.

A *site* is one or more relays under one name. The uplink takes *batches* of chosen streams from the bus, packs several
of a worker into one *message*, and publishes it on the site's own subjects. JetStream keeps it, and acknowledges. The
uplink of another site reads it there by a durable *consumer*, and publishes the batches on its bus as a worker,
`uplink.1`. Who sends copies takes them like those of any worker.

Sockets: one TCP connection to one NATS server of the cluster; nothing listens. It needs no privilege. Without
`[uplink] servers` it imports nothing of NATS, connects to nothing, and waits for its end.
"""

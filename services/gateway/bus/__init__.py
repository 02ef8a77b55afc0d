"""The gateway on the bus: announces the registry, asks senders what they serve, passes frame requests on."""

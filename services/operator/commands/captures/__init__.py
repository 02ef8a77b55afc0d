"""Commands that write captures of what passes the bus, and that play captures to a stream."""

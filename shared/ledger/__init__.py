"""The accounts that every service keeps: names of counters and accounts, and the equations that must hold.

There is an account a stream, an origin or a collector, each a table of counters that only grow. They are counted per
batch, never per datagram, and published with its status each second.
"""

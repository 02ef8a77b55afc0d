"""`fanwire doctor`: is this host fit for production? Facts are gathered, judged, and told with what cures them.

`host`, `ways` and `services` judge (facts in, findings out, no I/O); `gathering` and `udp_sockets` gather the facts;
`probe` sends a datagram through it all when asked to. Privilege: none; what can't be seen is told as that.
"""

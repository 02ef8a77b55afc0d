"""Keeps the datagrams of streams on disk, for collectors that were away and for people who look at the past.

It takes batches from the bus as any subscriber does, has no listener and no privilege, and writes below one directory,
which it locks. `shared.journal` has the form of the files, which any pcapng tool opens.

A *segment* is a file of one stream. It is *sealed* once nothing more is written to it. *Retention* removes the oldest
segments, whole. A *reader* asks on the bus for a stream's past, and gets a *portion* at a time.
"""

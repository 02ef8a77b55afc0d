"""The journal's files: pcapng that any tool opens, and that can be read back batch by batch. It knows no bus.

A *segment* is a file with the batches of one stream, in the order in which they were taken. A *record* is one batch in
it: a block a datagram, the first of which carries the batch's identity in an option. The *position* of a worker is the
place that a reader has reached in what the worker has published since its boot. All that there is to know is in the
segments and their names: there is no other file that has to agree.
"""

"""Batches of datagrams as columns: received, gathered, routed to collectors, cut into segments, sent."""

"""Duties of those who publish datagrams, ingest and uplink: totals for a successor, held batches, exporters."""

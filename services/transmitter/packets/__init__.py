"""Packets of copies, as columns: `headers` before a payload, a collector's `addressing` in them, and `fragments`."""

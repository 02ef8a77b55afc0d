"""Admission: may a request be granted? `decision` asks `rights`, `destinations`, `address_proof` and `ownership`.

A `peer` is the other end of a connection; its rights come from its address, or from `tokens`.
"""

"""Admission: who asks (`peer`, `tokens`), their `rights`, and where copies may go (`destinations`, `address_proof`)."""

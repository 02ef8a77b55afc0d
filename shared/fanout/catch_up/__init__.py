"""Collectors that catch up: what they are owed, read from the journal, until they are level with live copies."""

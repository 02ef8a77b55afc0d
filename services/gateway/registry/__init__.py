"""The registry: entries and their leases, the health of each collector, and the copy on disk."""

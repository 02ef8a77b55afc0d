"""The registry: entries and their leases, how each collector does, and the copy on disk."""

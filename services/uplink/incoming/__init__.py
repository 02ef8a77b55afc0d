"""The way in: messages of other sites, put in order, and their batches on this host's bus."""

"""The way out: batches of this host, packed into messages that wait until JetStream has acknowledged them."""

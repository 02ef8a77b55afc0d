"""Commands that run the services of this host, and say how they are."""

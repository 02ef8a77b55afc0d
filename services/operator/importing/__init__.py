"""`fanwire import`: receiver files of other replicators become settings."""

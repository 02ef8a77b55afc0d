"""The applier's side, with CAP_NET_ADMIN: the check of a plan, its rules, and the table in the kernel."""

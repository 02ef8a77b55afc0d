"""Offload: the kernel makes the copies that it can make, by rules that follow the registry.

Two processes, joined by a socket pair. The *planner* reads the bus and the kernel's routes, without any privilege, and
works out a *plan*: for each collector the frames that its copies are, or the reason why the kernel can't make them. The
*applier* holds CAP_NET_ADMIN and nothing else. It takes plans from its planner alone, checks them against the settings,
and makes rules of them in one table of nf_tables, which ends with it. A *generation* is the number that the rules of a
plan mark each datagram with that they have copied: the senders of copies leave out whom they serve.
"""

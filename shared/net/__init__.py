"""The network as the kernel shows it: addresses, sockets, socket filters, netlink."""

"""The part of nf_tables (linux/netfilter/nf_tables.h, nfnetlink.h) that offload needs, as bytes of netlink messages.

The rules are the kernel's own instructions, not the text that nft(8) takes: that has no way to keep an exporter's
address in a register while a copy carries another one, and it breaks the checksum of datagrams that have none.
"""

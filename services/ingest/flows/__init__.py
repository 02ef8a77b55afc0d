"""Flow exporters: the numbers in NetFlow, IPFIX and sFlow headers, and what is missing between them. No I/O.

`exporters` tells exporters apart by what `shared/datagrams/export_headers` reads; `sequence_gaps` follows the numbers
of each, and `stretches` compares them. IPFIX numbers data records: `ipfix_templates` counts those of a datagram,
`ipfix_numbering` finds where its number stands.

`sets` finds the sets of NetFlow v9 and IPFIX datagrams. `template_reader` reads those that define something, and
`template_cache` keeps them for collectors that join later.
"""

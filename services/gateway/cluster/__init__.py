"""The registry that several nodes share: one bucket of NATS JetStream, which every gateway follows in order.

A *node* is a relay, by the name of its site. The bucket is a *log*: each change is a *record* at the next *position*. A
gateway decides a change by the records that it has, and writes it on condition that no other record of the list has
come meanwhile. It makes the change when the record comes back, as every other gateway does. So all have the same list,
and an answer `ok` means that a majority of the servers has it.

An entry has a *home*: the node that measures its lease. A node has a *session*, which it writes each second; a
renewal is answered once a session was written behind it. Nothing here is imported without `[uplink] registry`.
"""

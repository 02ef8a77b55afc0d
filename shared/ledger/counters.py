"""The names of all counters, and what each counts."""

from typing import Final

# ingest: accounts `stream/NAME`, and where a socket can tell `listener/NAME/ENDPOINT`
RECEIVED: Final = "received"
"""Datagrams taken from sockets."""
BYTES: Final = "bytes"
"""Payload bytes: of what was received (ingest), of what was sent (the senders)."""
PUBLISHED: Final = "published"
"""Datagrams handed to the bus."""
KERNEL_DROPPED: Final = "kernel_dropped"
"""Datagrams that the kernel dropped before ingest saw them: full receive buffer (SO_MEMINFO). Not in `received`."""
TRUNCATED: Final = "truncated"
"""Datagrams of a listener that were cut on receipt (MSG_TRUNC) though UDP can carry them: always 0, all have room."""
REPLIED: Final = "replied"
"""Replies sent to senders."""
REPLY_FAILED: Final = "reply_failed"
"""Replies the kernel refused, or not sent because the sender's port is 0, or the datagram was itself a reply or came in
a train."""
CONNECTIONS_REFUSED: Final = "connections_refused"
"""TCP connections closed at once because as many as allowed were open."""
CONNECTIONS_EXPIRED: Final = "connections_expired"
"""TCP connections closed because they sent nothing for too long."""
RECEIVE_ERRORS: Final = "receive_errors"
"""Receive calls that failed; nothing is known to be lost by one."""
RECEIVE_ERRNO: Final = "receive_errno"
"""Errno of a listener's last receive call; 0 once one has succeeded: a gauge."""

# ingest, account `stream/NAME` of a stream with a `protocol`
EXPORTER_MISSED: Final = "exporter_missed"
"""Datagrams of NetFlow v9 and sFlow that their exporter numbered and that never came; those that the kernel dropped are
among them."""
EXPORTER_MISSED_FLOWS: Final = "exporter_missed_flows"
"""Likewise of NetFlow v5, which numbers flows."""
EXPORTER_MISSED_RECORDS: Final = "exporter_missed_records"
"""Likewise of IPFIX, which numbers data records."""
EXPORTER_RESTARTS: Final = "exporter_restarts"
"""Exporters that began their numbers anew, or skipped more than is ever lost."""
EXPORTER_REORDERED: Final = "exporter_reordered"
"""Datagrams that came after later ones of their exporter, or twice."""
EXPORTER_UNSURE: Final = "exporter_unsure"
"""IPFIX datagrams whose records could not be counted: a loss right behind one is not known. Also gaps that may be none:
another exporter behind the same address may have filled them, or sent what came behind them."""
EXPORTER_EVICTIONS: Final = "exporter_evictions"
"""Exporters no longer followed, because there were too many."""
EXPORTERS: Final = "exporters"
"""Exporters followed now: a gauge."""
NOT_FLOW: Final = "not_flow"
"""Datagrams that are not of the stream's protocol; they go on like all others."""

EXPORTER_UNREAD: Final = "exporter_unread"
"""Datagrams of receive calls that a fault of fanwire's own kept from being read: the stream's exporters were forgotten.
They go on like all others."""

# ingest, account `ended/BOOT/STREAM`: what a start of the worker had published and dropped when it ended
STARTED: Final = "started_ns"
"""The time at which it was started, in ns since 1970."""

# ingest, account `host`
CHECKSUM_ERRORS: Final = "checksum_errors"
"""UDP datagrams for any receiver that this host's kernel has dropped for a wrong checksum (InCsumErrors)."""

# ingest, account `ingest`, where the kernel may copy datagrams
MARK_SOCKETS: Final = "mark_sockets"
"""UDP sockets at which it reads which datagrams the kernel has copied already: a gauge."""
MARK_BLIND: Final = "mark_blind"
"""UDP sockets at which it can't: the kernel must copy nothing that arrives there. A gauge."""
MARKS_UNREAD: Final = "marks_unread"
"""Datagrams that came without their mark, though it was asked for: the kernel may have copied them."""

# ingest, account `stream/NAME`
MARKS_READ: Final = "marks_read"
"""Datagrams that came with a mark of rules; a train counts once. They are all that the rules have marked, but for those
that the kernel has dropped."""

# every service, account named like its kind
DISCREPANCIES: Final = "discrepancies"
"""Equations that did not hold when checked, each second; one that stays broken by the same amount counts once."""

FILES_RESTORED: Final = "files_restored"
"""Files of the bus (broker) or of the registry (gateway) that others have removed, and that were made anew."""

MEMORY: Final = "memory"
"""Bytes of memory that the process takes now: a gauge."""
MEMORY_MOST: Final = "memory_most"
"""The most bytes that it has been found to take."""
MEMORY_CEILING: Final = "memory_ceiling"
"""The most bytes that it may take, `memory` in the settings of its kind."""

# forwarder, account `origin/WORKER/BOOT/STREAM`
BASELINE: Final = "baseline"
"""The worker's running count when this service began to follow it, before a restart of the service or after."""
TAKEN: Final = "taken"
"""Datagrams that came."""
MISSED: Final = "missed"
"""Datagrams that the worker published and that never came: dropped by the bus, or lost with a killed process."""
REACHED: Final = "reached"
"""The worker's running count as of the last message."""

# own account of forwarder, transmitter, journal and uplink
BUS_MISSED: Final = "bus_missed"
"""Datagrams counted as `missed` since this process was started. A sum over origins falls when one is forgotten."""

# forwarder, account `collector/NAME`
EXPECTED: Final = "expected"
"""Datagrams published on the collector's streams since it signed up, whether they came or not."""
OFFERED: Final = "offered"
"""Datagrams that came on the collector's streams since it signed up."""
FILTERED: Final = "filtered"
"""Datagrams that are not from one of its prefixes."""
SAMPLED_OUT: Final = "sampled_out"
"""Datagrams passed over by 1-in-N sampling."""
SHARED_OUT: Final = "shared_out"
"""Datagrams that went to another member of its group."""
SENT: Final = "sent"
"""Copies for the collector that the kernel took. Only `AFTER_SENDING` tells of some that did not arrive."""
HELD: Final = "held"
"""Datagrams that wait: for room in the send buffer (forwarder), until the next hop tells its link address
(transmitter), or for JetStream (uplink). Only this, `deferred`, `templates_held`, `connected`, `exporters`, `memory`
and `receive_errno` ever fall."""
DEFERRED: Final = "deferred"
"""Datagrams that wait in the journal for a collector that was away, or that catches up: a gauge."""
OWED: Final = "owed"
"""Datagrams of a stream that a collector which catches up has still to get, as far as is known: a gauge (account
`owed/STREAM/COLLECTOR`)."""
OWED_FROM: Final = "owed_from_ns"
"""The time at which the last one that it got was received, in ns since 1970: a gauge."""
LEFT_BEHIND: Final = "left_behind"
"""Datagrams that were deferred when the collector left, or signed up anew, or that did not reach it while it was away
and caught up by itself. They are owed to its name, and are no loss of this account."""
WITHHELD: Final = "withheld"
"""Datagrams not sent because the collector's port is closed, `[forwarder] withhold` (forwarder)."""
WITHHELD_BY_ADMIN: Final = "withheld_by_admin"
"""Datagrams not sent because an admin withholds the collector's copies. They are no loss: nobody was to get them."""
BY_KERNEL: Final = "by_kernel"
"""Datagrams that came, and of which the kernel had sent the copy already, by rules of offload."""
TEMPLATES: Final = "templates"
"""Datagrams with templates of flow exporters that were made for the collector, beside its copies: when it joins, and
where it gets only some of an exporter's datagrams."""
TEMPLATES_SENT: Final = "templates_sent"
"""Those of them that the kernel took."""
TEMPLATES_HELD: Final = "templates_held"
"""Those of them that wait, as in `held`."""
TEMPLATES_LOST: Final = "templates_lost"
"""Those of them that were dropped or withheld, under whatever cause."""
TEMPLATE_COUNTERS: Final = (TEMPLATES, TEMPLATES_SENT, TEMPLATES_HELD, TEMPLATES_LOST)
BY_KERNEL_UNSEEN: Final = "by_kernel_unseen"
"""Datagrams among `missed` and `dropped_unserved` that came while the kernel served the collector: it has got those
that rules had marked, and how many these were is not known. So at most this many of its losses are none."""
REFUSALS: Final = "refusals"
"""Port-unreachable answers: each means that at least one copy among `sent` reached nobody (forwarder)."""
UNREACHABLES: Final = "unreachables"
"""Other ICMP errors, such as that the host did not answer for its address."""
PROHIBITED: Final = "prohibited"
"""Those of them by which a firewall or router prohibits copies, EACCES; over IPv6 alone, since the kernel makes
EHOSTUNREACH of the same over IPv4 (forwarder)."""

# forwarder and transmitter, own account
BY_KERNEL_LATE: Final = "by_kernel_late"
"""Copies that the kernel sent by rules that had not followed yet: to a collector that had left or moved, or of what it
wanted no more."""

# journal, account `journal/STREAM`; what came to it is in its accounts `origin/WORKER/BOOT/STREAM`
WRITTEN: Final = "written"
"""Datagrams that were written to the journal, of those `taken`."""
EXPIRED: Final = "expired"
"""Datagrams that retention has removed, or another program."""
READ: Final = "read"
"""Datagrams that were handed to readers, such as a sender of copies whose collector was away."""
READERS_REFUSED: Final = "readers_refused"
"""Requests of readers that were answered with an error (account `journal`)."""
SEGMENTS: Final = "segments"
"""Segments that are there: a gauge."""
KEPT_BYTES: Final = "kept_bytes"
"""Bytes that they take: a gauge."""
OLDEST: Final = "oldest_ns"
"""The time since which there is something, in ns since 1970; 0: there is nothing: a gauge."""
NEWEST: Final = "newest_ns"
"""The time of the last datagram that this journal has written; 0: there is none: a gauge."""
KEPT_LIMIT: Final = "kept_limit_bytes"
"""Bytes that all streams may take together (account `journal`)."""
CUT_BYTES: Final = "cut_bytes"
"""Bytes at the ends of segments that were not whole when the journal began, after a power cut."""
DAMAGED_BYTES: Final = "damaged_bytes"
"""Bytes in which readers found no whole batch."""
SET_ASIDE: Final = "segments_set_aside"
"""Segments in which nothing could be read."""
WRITE_ERRNO: Final = "write_errno"
"""Errno of the last write; 0 once one has succeeded: a gauge."""

# uplink, account `sending/STREAM`: what other sites are to have. `taken`, `held` and causes are as elsewhere
ACKNOWLEDGED: Final = "acknowledged"
"""Datagrams that JetStream has said it keeps."""

# uplink, account `arriving/SITE/WORKER/BOOT/STREAM`: what another site's worker has published, as `origin/` here
REPEATED: Final = "repeated"
"""Datagrams that came again, and were dropped: they are none of `taken`."""

# uplink, account `receiving/SITE`: how far this host is behind another site
WAITING_MESSAGES: Final = "waiting_messages"
"""Messages of the site that were still in JetStream when the last one came: a gauge."""
LATE_MS: Final = "late_ms"
"""Milliseconds from receipt of the last datagrams at the site, by its clock, until they were on this bus: a gauge."""

# uplink, account `uplink`
CONNECTED: Final = "connected"
"""1 while there is a connection to a NATS server: a gauge."""
SERVER_FAULTS: Final = "server_faults"
"""Faults that were found with the NATS server, or with this site's stream there, at the last connection: a gauge."""
SERVER_CONNECTIONS: Final = "server_connections"
"""Connections to NATS servers that were made."""
MESSAGES_REFUSED: Final = "messages_refused"
"""Messages that the server refused: this site may not publish there, or JetStream takes no more."""
MESSAGES_UNREADABLE: Final = "messages_unreadable"
"""Messages from other sites that were none of fanwire's, or said another origin than their subject."""
NOT_AWAITED: Final = "messages_not_awaited"
"""Messages of other nodes that were still to come when this one began to serve, as they did not become fewer."""

# dropped on purpose, by cause
DROPPED: Final = "dropped_"
NO_SUBSCRIBER: Final = DROPPED + "no_subscriber"
"""No service subscribes to the stream (ingest). A collector that wants it has them as `UNSERVED`."""
DOUBLE: Final = DROPPED + "double"
"""An exporter feeds two sites, and the other one's has come already (uplink)."""
NO_LOSS: Final = (NO_SUBSCRIBER, DOUBLE)
"""Causes under which nobody lacks anything."""
BUS_FULL: Final = DROPPED + "bus_full"
"""The bus took no more: its queue was at the high-water mark (ingest)."""
NO_MEMORY: Final = DROPPED + "memory"
"""The process was near its ceiling: not put on the bus (ingest), or no longer held (forwarder, transmitter)."""
OVERSIZED: Final = DROPPED + "oversized"
"""Longer than 65,507 bytes, which an IPv4 datagram can't carry (ingest: TCP, AF_UNIX, and UDP over IPv6)."""
CUT_OFF: Final = DROPPED + "cut_off"
"""A TCP message that was not finished when its connection ended, or that stands behind an oversized one."""
BUFFER_FULL: Final = DROPPED + "buffer_full"
"""The send buffer was full: the collector's own, for longer or by more than may wait (forwarder), or the interface's
(transmitter)."""
REFUSED: Final = DROPPED + "refused"
"""The collector's port is closed (forwarder)."""
NOT_CONNECTED: Final = DROPPED + "not_connected"
"""There is no way to the collector's address: no route, or no such family here (forwarder)."""
STOPPED: Final = DROPPED + "stopped"
"""Still waited for the collector, or for JetStream, when the process ended (forwarder, transmitter, uplink)."""
UNSERVED: Final = DROPPED + "unserved"
"""Were there for the collector while its sender was not: never came to it (forwarder, transmitter)."""
UNSURE: Final = DROPPED + "unsure"
"""In the hands of a sender when it was killed: nobody knows whether they had left (forwarder, transmitter)."""
UNPLANNED: Final = DROPPED + "unplanned"
"""Marked by rules in the kernel that offload has not told of: nobody knows who has got copies (forwarder,
transmitter)."""
OVER_SHARE: Final = DROPPED + "over_share"
"""More than the fair share of the collector's address while not all copies could be sent (forwarder, transmitter)."""
DISK_FULL: Final = DROPPED + "disk_full"
"""Not kept, since the disk had no room (journal)."""
DISK_ERROR: Final = DROPPED + "disk_error"
"""Not kept, since the disk failed (journal)."""
EXPIRED_UNREAD: Final = DROPPED + "expired_unread"
"""The journal removed them before the collector had caught up that far (forwarder, transmitter)."""
NOT_JOURNALED: Final = DROPPED + "not_journaled"
"""The collector was to have them from the journal, which never had them (forwarder, transmitter)."""
PERHAPS_TWICE: Final = "perhaps_twice"
"""Copies among `sent` that another node may have sent too, before it died or while it missed this one (forwarder,
transmitter). Their own account has those to collectors that another node serves by now."""
REVISION: Final = "revision"
"""The revision of the registry, as the bus is told of it (gateway), or as it is served, once there is one (forwarder,
transmitter, offload): a gauge."""
ELSEWHERE: Final = "elsewhere"
"""Collectors that another node of the cluster serves: a gauge (forwarder, transmitter)."""
LEFT: Final = DROPPED + "left"
"""Waited for a collector that left, or moved, whose own account has ended (account of forwarder or transmitter)."""

QUEUE_FULL: Final = DROPPED + "queue_full"
"""The interface's own queue took no more, ENOBUFS (transmitter)."""
NO_ROUTE: Final = DROPPED + "no_route"
"""There is no route to the collector (transmitter)."""
NO_NEIGHBOUR: Final = DROPPED + "no_neighbour"
"""The next hop did not tell its link address in time: no ARP or neighbour discovery answer (transmitter)."""
INTERFACE_DOWN: Final = DROPPED + "interface_down"
"""The interface to the collector is down, without carrier, or gone (transmitter)."""
OTHER_FAMILY: Final = DROPPED + "other_family"
"""An IPv4 source can't be claimed towards an IPv6 collector, nor the other way round (transmitter)."""
DESTINATION_REFUSED: Final = DROPPED + "destination_refused"
"""The policy lets no copies go to the collector's address (transmitter)."""
SOURCE_REFUSED: Final = DROPPED + "source_refused"
"""The policy, or the kind of the address, forbids claiming this source (transmitter)."""
RATE_LIMITED: Final = DROPPED + "rate_limited"
"""Datagrams above `frames_per_second` (transmitter)."""

# offload, account `rules/NAME` of a collector, `marks/STREAM` of a stream, `egress/LINK`, and its own
COPIED: Final = "copied"
"""Copies that the kernel's rules have counted. A train of datagrams (UDP_GRO, GSO) counts once."""
MARKED: Final = "marked"
"""Datagrams that the rules have marked: those that went on to ingest and that had been copied for all served."""
UNSEEN: Final = "unseen"
"""Datagrams that the rules have copied for all who want them, and that ended there (`[offload] unseen`)."""
QUEUE_DROPS: Final = "queue_drops"
"""Packets of any traffic that the queues of a link have dropped while rules sent copies by it."""
LINK_DROPS: Final = "link_drops"
"""The same, of the link behind its queues."""
APPLIER: Final = "applier"
"""1 while the process with CAP_NET_ADMIN is there: a gauge."""
COLLECTORS_SERVED: Final = "collectors_served"
"""Collectors that the rules serve now: a gauge."""
PLANS_REFUSED: Final = "plans_refused"
"""Plans that the kernel, or the applier by the settings, has refused."""
SERVER_AWAY: Final = DROPPED + "server_away"
"""More than may wait had to, while there was no connection to a NATS server, or no JetStream (uplink)."""
SERVER_SLOW: Final = DROPPED + "server_slow"
"""More than may wait had to, while JetStream acknowledged too slowly (uplink)."""
SERVER_REFUSED: Final = DROPPED + "server_refused"
"""The NATS server does not let this site publish there (uplink)."""
TOO_MANY_WORKERS: Final = DROPPED + "too_many_workers"
"""Of a worker of a journaled stream beyond those whose places are kept (uplink)."""
SERVER_LIMIT: Final = DROPPED + "server_limit"
"""A batch was larger than the NATS server's `max_payload`, or than its stream's `max_msg_size` (uplink)."""

# broker, account `broker`
BUS_REFUSED: Final = "bus_refused"
"""Connections to the bus that were refused: they had no key, or one that is not on the list."""
REFUSED_TOPIC: Final = "refused_topic"
"""Messages on a topic, or of a kind, that their sender may not publish."""
REFUSED_SENDER: Final = "refused_sender"
"""Messages in another service's name."""
REFUSED_MALFORMED: Final = "refused_malformed"
"""Messages without topic and envelope."""
SUBSCRIBERS_CUT: Final = "subscribers_cut"
"""Connections of subscribers that read nothing, closed because memory was short."""

SUMMED: Final = (RECEIVED, BYTES, KERNEL_DROPPED)
"""Counters of a stream that are the sums over its listeners."""

COLLECTOR_COUNTERS: Final = (
    *(EXPECTED, OFFERED, FILTERED, SAMPLED_OUT, SHARED_OUT, SENT, BYTES, HELD, WITHHELD, WITHHELD_BY_ADMIN, BY_KERNEL),
    *(MISSED, UNSERVED, UNSURE, STOPPED, BUFFER_FULL, NO_MEMORY, REFUSED, NOT_CONNECTED, REFUSALS, UNREACHABLES),
    *(PROHIBITED, QUEUE_FULL, NO_ROUTE, NO_NEIGHBOUR, INTERFACE_DOWN, OTHER_FAMILY, DESTINATION_REFUSED),
    *(SOURCE_REFUSED, RATE_LIMITED, OVER_SHARE, UNPLANNED, BY_KERNEL_UNSEEN, *TEMPLATE_COUNTERS),
    *(LEFT_BEHIND, EXPIRED_UNREAD, NOT_JOURNALED, PERHAPS_TWICE),
)
"""Counters that a collector's account may have, apart from drops that are named by an errno."""

AFTER_SENDING: Final = {REFUSALS: "refused", UNREACHABLES: "unreachable"}
"""Counters of copies among `sent` that are known to have reached nobody, at least, by an ICMP error: their cause."""

"""Payloads in shared memory: a worker lends them, and does not write over them while they may be read.

Passing a payload through two sockets costs four copies of it. So a worker's large payloads stay where they are, in a
memfd of one chunk a batch; the bus carries the columns and a *loan*: the number of the chunk, and the loan's own
number. Any process that may reach the bus may borrow: it asks at an AF_UNIX socket in the bus directory, once a worker
and stream. It is passed the memory, to read only, and a page of its own. In that page it writes the number up to which
it has given everything back. `lender` is the worker's side, `borrower` that of its readers.

Why nobody ever sees another datagram's bytes, however long a process is stopped in the middle of sending:

- Numbers grow, and a chunk has the number of its last loan. The worker writes into a chunk only when every borrower has
  given back that number (`Pool.lend`), so for each loan that is not given back the bytes stay as they were.
- A borrower gives back a number when nothing refers to its payload any more: that is what the object does which every
  view of the payload keeps alive (`borrower._Loan`). One that is stopped gives nothing back.
- It reads no loan twice, and none made before the worker knew of it (`Borrowed.payload`): for those nobody waits.
- It reads the loans of one start of a worker in the memory of that start alone: the answer carries the boot id that is
  in the worker's messages, since a successor has the same path. No two workers have one path at a time (`Lender`).
- What is lost on the bus is given back by what follows: every message says how far lending had come, and messages keep
  their order (`Borrowed.passed`).
- The memory is sealed (fcntl(2)): nobody but the worker can write to it, and nobody can cut it short.
- A borrower is forgotten when its connection ends, which the kernel does when its process does, and not before.
- Without a free chunk payloads go through the bus like small ones. So they do while anybody subscribes to
  `inline_topic`: those that can't borrow, and those that have just subscribed to the stream and have not borrowed yet.
  So they do for a moment after each subscription, for those that subscribe to many streams by one prefix.
"""

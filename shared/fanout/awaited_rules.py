"""Messages that wait until offload has told by which rules their datagrams were copied; and the answers to offload.

Offload tells each sender of copies of a generation before its rules go into the kernel. So only a sender that has just
begun may get datagrams of a generation that it has not been told of: it is told a moment later. To send copies of such
datagrams may be to send them twice.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

from shared.bus.bodies.offload_messages import KernelCopies, OffloadReply
from shared.bus.messages import Envelope, Message
from shared.bus.zmq_sockets import Publisher
from shared.fanout.kernel_copies import KernelRules
from shared.fanout.registry_replica import RegistryReplica
from shared.fanout.resumption import WaitingMessages
from shared.log import get_logger

PATIENCE_SECONDS: Final = 2.0
"""Time to be told of a generation: offload answers a subscription at once, unless it is just being restarted."""
REGISTRY_SECONDS: Final = 5.0
"""Time for the registry of a generation to come; after it, its gateway is gone, and offload makes another one."""

log = get_logger()


class AwaitedRules:
    """Lets the messages of a worker wait, in order, from the first one on whose rules are not known."""

    def __init__(
        self,
        rules: KernelRules,
        publisher: Publisher,
        replica: RegistryReplica,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules
        self._publisher = publisher
        self._replica = replica
        self._clock = clock
        self._waiting = WaitingMessages()
        self._deadline = 0.0
        self._unanswered: dict[int, tuple[float, KernelCopies]] = {}
        """By generation: what is known of those whose registry is not served yet, and until when to wait for that."""

    def __bool__(self) -> bool:
        """Return whether anything waits, or is to be answered."""
        return bool(self._waiting or self._unanswered)

    def order(self, message: Message) -> Sequence[Message]:
        """Return the messages that are to be handled now that this one has come."""
        worker = message.envelope.sender, message.envelope.boot
        if worker not in self._waiting:
            if self._is_known(message):
                return (message,)
            if not self._waiting:
                self._deadline = self._clock() + PATIENCE_SECONDS
        self._waiting.add(worker, message)
        return self.give_up() if self._waiting.full else ()

    def _is_known(self, message: Message) -> bool:
        batch = message.batch
        return batch is None or batch.generations is None or self._rules.know(batch.generations)

    def note(self, envelope: Envelope, body: KernelCopies) -> Sequence[Message]:
        """Take in a piece of a generation; return the messages that need not wait any more."""
        if not self._rules.note(envelope, body):
            return ()
        self._unanswered[body.generation] = self._clock() + REGISTRY_SECONDS, body
        return self._waiting.pop_all(lambda each: not self._is_known(each))

    def answer(self) -> None:
        """Tell offload of which generations this process knows, now that it serves the registry that it has."""
        for generation, (until, body) in list(self._unanswered.items()):
            served = not body.registry or self._replica.holds(body.registry, body.revision)
            if served:
                self._publisher.publish(body.reply, OffloadReply(body.serial))
            if served or self._clock() >= until:
                del self._unanswered[generation]

    def overdue(self) -> Sequence[Message]:
        """Return the messages that have waited for too long."""
        return self.give_up() if self._waiting and self._clock() >= self._deadline else ()

    def give_up(self) -> Sequence[Message]:
        """Return all messages that wait: datagrams of rules that nobody has told of will be dropped, and counted."""
        released = self._waiting.pop_all()
        unknown = {
            generation
            for each in released
            if each.batch is not None and each.batch.generations is not None
            for generation in self._rules.give_up(each.batch.generations)
        }
        if unknown:
            log.warning(
                "datagrams are marked by rules that offload has not told of: they are dropped, since the kernel may "
                "have copied them; see whether offload runs, and whether another program uses [offload] mark_mask",
                generations=sorted(unknown)[:10],
            )
        return released

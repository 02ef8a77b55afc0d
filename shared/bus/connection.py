"""A service's connection to the bus: a socket to publish by, one to subscribe by, and its reports."""

from typing import TYPE_CHECKING

from shared.bus.endpoint import open_link, queue_limit
from shared.bus.status import Reporter
from shared.bus.zmq_sockets import Publisher, Subscriber, new_context
from shared.process.memory import Memory
from shared.settings.tables import Bus

if TYPE_CHECKING:
    from shared.bus.loans.borrower import Borrower


class BusConnection:
    """The sockets of a service that has a name such as `journal.1`: its first part is the role that it has a key for.

    `borrower` is as for `Subscriber`. SettingsError when the key is missing, PermissionError when another user made the
    directory.
    """

    def __init__(self, name: str, bus: Bus, memory: Memory, borrower: "type[Borrower] | None" = None) -> None:
        link = open_link(bus, name.partition(".")[0])
        self.mark = queue_limit(bus.high_water_mark, memory.ceiling)
        """Messages that a queue of either socket may hold."""
        self._context = new_context()
        self.publisher = Publisher(self._context, bus.path, name, self.mark, link)
        self.subscriber = Subscriber(self._context, bus.path, self.mark, link, borrower)
        self.reporter = Reporter(self.publisher, memory)

    def close(self) -> None:
        """Close both sockets; wait for what is queued, at most the linger time."""
        self.subscriber.close()
        self.publisher.close()
        self._context.term()

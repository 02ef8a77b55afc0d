"""The journal while no stream is kept: it is there for `fanwire status` and a reload, and loads no numpy."""

import select
import time

from shared.bus.endpoint import open_link
from shared.bus.status import Reporter
from shared.bus.zmq_sockets import Publisher, new_context
from shared.process.lifecycle import Lifecycle, Readiness
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.model import Settings


def wait_for_streams(name: str, settings: Settings, lifecycle: Lifecycle) -> Settings:
    """Report until a reload names a stream to keep, or a signal ends the process; return the settings then."""
    latest = [settings]
    bus, context = settings.bus, new_context()
    publisher = Publisher(context, bus.path, name, bus.high_water_mark, open_link(bus, "journal"))
    reporter = Reporter(publisher, Memory(settings.journal.memory))
    reload = Reload(name, lifecycle, settings, latest.append)
    readiness = Readiness(name, bus, lambda: publisher.ready)
    with select.epoll() as waking:
        for descriptor in (publisher.fileno(), lifecycle.fileno()):
            waking.register(descriptor, select.EPOLLIN)
        while not (lifecycle.draining or latest[-1].journaled):
            fresh = publisher.new_subscriptions()
            if time.monotonic() >= reporter.due_at or (fresh and reporter.asked_for(fresh)):
                reporter.report(dict)
            readiness.check(streams=[])
            waking.poll(max(0.0, reporter.due_at - time.monotonic()))
            lifecycle.heed()
            reload.check()
    publisher.close()
    context.term()
    return latest[-1]

"""Takes the bus directory, binds both sides, and lets ZeroMQ pass messages until told to stop."""

import argparse
import sys
from collections.abc import Sequence

from services.broker.ipc_peers import transmitters_group
from services.broker.proxy import Proxy, check_broker
from services.broker.stalled_subscribers import CUT_OFF_RESERVE
from shared.process.lifecycle import Lifecycle, announce_ready, run, service_parser
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.model import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the broker; return its exit code."""
    return run(
        _serve, service_parser("broker", __doc__).parse_args(arguments), lambda settings: check_broker(settings.bus)
    )


def _serve(_arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    group = transmitters_group(settings.transmitter.user)
    bus = settings.bus
    memory = Memory(settings.broker.memory, "[broker] memory", reserve=CUT_OFF_RESERVE)
    with Proxy(bus.path, bus.high_water_mark, group, bus.endpoints, bus.key_directory, memory) as proxy:
        announce_ready("broker", directory=str(bus.path), listen=bus.listen)
        proxy.supervise(lifecycle, Reload("broker.1", lifecycle, settings))


if __name__ == "__main__":
    sys.exit(main())

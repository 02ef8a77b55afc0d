"""Sends numbered datagrams to the stream `messages`, counts the copies as a collector of its own, and prints both.

`counted_load.py RATE SECONDS` runs where fanwire does, with the standard library alone, and prints JSON: datagrams
sent, copies that came, copies that came twice, and what the kernel dropped at the listener meanwhile.
"""

import json
import socket
import sys
import threading
import time
from pathlib import Path

LISTENER = "0100007F:1A0B"
"""127.0.0.1:6667 as /proc/net/udp writes it."""
REGISTER = {"op": "register", "name": "load", "streams": ["messages"], "port": 9600, "take_over": True}
SETTLE_SECONDS = 10.0
SO_RCVBUFFORCE = 33


def kernel_drops() -> int:
    """Return what the kernel has dropped at the listener so far."""
    lines = Path("/proc/net/udp").read_text().splitlines()
    return sum(int(line.split()[-1]) for line in lines if line.split()[1] == LISTENER)


def collect(collector: socket.socket, seen: dict[int, int], ended: threading.Event) -> None:
    """Count copies by their number until the end."""
    collector.settimeout(0.5)
    while not ended.is_set():
        try:
            number = int(collector.recv(2048)[:10])
        except TimeoutError:
            continue
        seen[number] = seen.get(number, 0) + 1


def send(rate: int, seconds: float) -> int:
    """Send at this pace; return the number of datagrams."""
    sent, began = 0, time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
        while (passed := time.monotonic() - began) < seconds:
            while sent < int(passed * rate):
                exporter.sendto(b"%010d" % sent + bytes(190), ("127.0.0.1", 6667))
                sent += 1
            time.sleep(0.002)
    return sent


def main(rate: int, seconds: float) -> None:
    """Run it."""
    seen: dict[int, int] = {}
    ended, dropped = threading.Event(), kernel_drops()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector:
        collector.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        collector.bind(("127.0.0.1", 9600))
        with socket.create_connection(("127.0.0.1", 5000)) as gateway:
            gateway.sendall(json.dumps(REGISTER).encode() + b"\n")
            assert json.loads(gateway.recv(4096))["ok"]
        counting = threading.Thread(target=collect, args=(collector, seen, ended))
        counting.start()
        sent = send(rate, seconds)
        time.sleep(SETTLE_SECONDS)
        ended.set()
        counting.join()
    twice = sum(count > 1 for count in seen.values())
    print(json.dumps({"sent": sent, "came": len(seen), "twice": twice, "dropped": kernel_drops() - dropped}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))

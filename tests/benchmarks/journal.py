"""Measures the journal: `python -m tests.benchmarks.journal [DIRECTORY]`; by default its files are in memory.

It prints CPU a datagram for writing and reading back, that of the service at some rates, and the time of a start and of
an export with a million datagrams in 100 segments. No network is used.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from services.ingest.batch_publisher import StreamFeed
from services.journal.stream_journal import GATHERED_ROWS
from shared.bus.loans.lender import CHUNK, LENT_SIZE
from shared.bus.messages import datagrams_topic
from shared.capture.pcapng import Destination
from shared.datagrams.batch import DatagramBatch
from shared.journal.records import Identity
from shared.journal.segment_reader import SegmentReader
from shared.journal.segment_writer import SegmentWriter
from shared.journal.segments import SECOND, Segment
from shared.ledger.counters import BUS_FULL, WRITTEN
from shared.settings.tables import Bus
from tests.builders import BusEnds, accounts_when, make_batch, wait_wanted
from tests.shared.bus.loans.lending import Lending
from tests.stack import Stack, wait_until

SOURCES: Final = [f"10.0.{number // 250}.{number % 250 + 1}" for number in range(500)]
BOOT: Final = 12_345_678_912_345
LENGTHS: Final[dict[str, Callable[[], int]]] = {
    "200 bytes": lambda: 200,
    "syslog, 80 to 400 bytes": lambda: random.randint(80, 400),
    "400 bytes": lambda: 400,
    "1,464 bytes": lambda: 1464,
}
RUNS: Final = 5
RATES: Final = [(200_000, 700), (200_000, 256), (50_000, 64), (20_000, 16), (5_000, 4), (1_000, 4)]
"""Datagrams a second, and in each batch."""
SECONDS: Final = 10
SEGMENTS, SEGMENT_ROWS, BATCH_ROWS = 100, 10_000, 100
MINUTE: Final = 60 * SECOND


def batch_of(rows: int, length: Callable[[], int]) -> DatagramBatch:
    """Return a batch of random payloads."""
    return make_batch([random.randbytes(length()) for _ in range(rows)], SOURCES)


def again(batch: DatagramBatch, at_ns: int) -> DatagramBatch:
    """Return a batch as if it had just been received: nothing about it is known yet."""
    return DatagramBatch(batch.stream, at_ns, batch.rows, batch.payload)


def write(directory: Path, number: int, batch: DatagramBatch, count: int, together: int) -> tuple[float, Segment]:
    """Write a segment of this many batches, some at a time; return the µs of CPU a datagram, and the segment."""
    segment = Segment("messages", number, batch.received_ns, is_open=True)
    writer = SegmentWriter(directory, segment, Destination())
    began = time.process_time()
    for start in range(0, count, together):
        numbers = range(start, min(count, start + together))
        identities = [Identity("ingest.1", BOOT, at, at * len(batch)) for at in numbers]
        writer.append([(identity, again(batch, batch.received_ns)) for identity in identities])
    took = time.process_time() - began
    return took / count / len(batch) * 1e6, writer.seal()


def read(path: Path, segment: Segment) -> float:
    """Read a segment; return the µs of CPU a datagram."""
    began, rows = time.process_time(), 0
    with SegmentReader(path, segment) as reader:
        for head in reader.heads():
            rows += len(reader.read(head)[0])
    return (time.process_time() - began) / rows * 1e6


def measure_files(directory: Path) -> None:
    """Print what writing and reading cost, by length and rows of a batch: of one, of 5, of as many as are together."""
    print(f"{'':32}{'write, µs':>10}{'':20}{'read,':>8}{'bytes':>7}")
    print(f"{'datagrams':26}{'rows':>6}{'alone':>10}{'by 5':>10}{f'by {GATHERED_ROWS:,}':>10}{'µs':>8}{'more':>7}")
    for name, length in LENGTHS.items():
        for rows in (1024, 256, 64, 16, 4):
            if rows * length() > 1 << 19:
                continue
            batch = batch_of(rows, length)
            count = max(5, min(20_000 // rows, (64 << 20) // len(batch.payload), 2000))
            writes, reads, more = list[list[float]](), list[float](), 0.0
            for number in range(RUNS):
                writes.append([])
                for together in (1, 5, max(1, GATHERED_ROWS // rows)):
                    took, segment = write(directory, number, batch, count, together)
                    writes[-1].append(took)
                    path = directory / segment.name
                    more = path.stat().st_size / count / rows - len(batch.payload) / rows
                    if together == 1:
                        reads.append(read(path, segment))
                    path.unlink()
            alone, by_5, by_rows = map(min, zip(*writes, strict=True))
            print(f"{name:26}{rows:6}{alone:10.2f}{by_5:10.2f}{by_rows:10.2f}{min(reads):8.2f}{more:7.0f}")


def settings(directory: Path) -> str:
    """Return settings by which stream `messages` is kept there."""
    return (
        f'[journal]\ndirectory = "{directory}"\nmin_free = 0\n'
        '[[stream]]\nname = "messages"\nlisten = ["udp://127.0.0.1:6667"]\njournal = true\n'
    )


def measure_service(stack: Stack) -> None:
    """Print the CPU that a journal takes a datagram of 400 bytes, at some rates and with some rows in a batch."""
    stack.start("broker")
    journal = stack.start("journal")
    print(f"{'service: datagrams/s':>21}{'rows':>6}{'µs of CPU each':>16}")
    for rate, rows in RATES:
        batch, count = make_batch([random.randbytes(400) for _ in range(rows)], SOURCES), int(rate * SECONDS / rows)
        with BusEnds(stack.bus) as bus, _feeding(bus) as feed:
            before = accounts_when(bus, "journal.1", bool)["journal/messages"]
            cpu, began = journal.cpu_seconds(), time.monotonic()
            for number in range(count):
                time.sleep(max(0.0, began + number * rows / rate - time.monotonic()))
                _publish(feed, batch)
            took = time.monotonic() - began
            time.sleep(2)  # what is on its way
            cpu = journal.cpu_seconds() - cpu
            after = accounts_when(bus, "journal.1", bool)["journal/messages"]
            refused = feed.account[BUS_FULL]
        written = after[WRITTEN] - before.get(WRITTEN, 0)
        print(f"{count * rows / took:21,.0f}{rows:6}{cpu / written * 1e6:16.2f}", end="")
        lost = count * rows - refused - written
        print(f"  {refused} not taken by the bus, {lost} lost behind it" if refused or lost else "")
    print(f"  {journal.resident_mb('VmHWM'):.0f} MB at most")
    journal.stop()


@contextmanager
def _feeding(bus: BusEnds) -> Iterator[StreamFeed]:
    """Play a worker to which the journal listens, and from which it borrows."""
    publisher = bus.publisher()
    wait_wanted(publisher, datagrams_topic("messages"))
    with Lending(bus.directory, chunks=Bus().lent // CHUNK, boot=publisher.boot) as lending:
        feed = StreamFeed("messages", publisher, Counter(), lending.pool)

        def asks() -> bool:
            lending.turn()
            return len(lending.selector.get_map()) > 1

        def lends() -> bool:
            publisher.new_subscriptions()
            return feed.lend(LENT_SIZE) is not None

        feed.mark(time.time_ns())
        wait_until(asks, "the journal asks")
        feed.mark(time.time_ns())  # by which it knows that it may borrow
        wait_until(lends, "the journal borrows")
        yield feed


def _publish(feed: StreamFeed, batch: DatagramBatch) -> None:
    """Publish a batch as a worker does that has just received it: large payloads are lent."""
    loan, payload = feed.lend(len(batch.payload)), batch.payload
    if loan is not None:
        loan.memory[: len(payload)] = payload
        payload = loan.memory[: len(payload)]
    feed.publish(time.time_ns(), batch.rows, payload, loan)


def measure_start(stack: Stack, directory: Path) -> None:
    """Print the time of a start, and of an export of one minute of one exporter, with a million datagrams there."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "messages").mkdir(parents=True)
    batch = batch_of(BATCH_ROWS, lambda: 1000)
    now_ns = time.time_ns() - SEGMENTS * MINUTE
    step = MINUTE * BATCH_ROWS // SEGMENT_ROWS
    size = 0
    for number in range(SEGMENTS):
        began_ns = now_ns + number * MINUTE
        segment = Segment("messages", number + 1, began_ns, is_open=True)
        writer = SegmentWriter(directory / "messages", segment, Destination())
        for at in range(SEGMENT_ROWS // BATCH_ROWS):
            total = number * SEGMENT_ROWS + at * BATCH_ROWS
            writer.append(
                [(Identity("ingest.1", BOOT, total // BATCH_ROWS, total), again(batch, began_ns + at * step))]
            )
        size += writer.size
        if number + 1 < SEGMENTS:
            writer.seal()  # the last one is left open, as by a kill
    print(f"{SEGMENTS} segments, {SEGMENTS * SEGMENT_ROWS:,} datagrams, {size / 1e9:.1f} GB:")
    stack.start("broker")
    began = time.monotonic()
    journal = stack.start("journal")
    print(f"  start: {time.monotonic() - began:.2f} s until it is ready, {journal.resident_mb():.0f} MB")
    began = time.monotonic()
    code, _, said = stack.run(
        *("export", "--stream", "messages", "--from", "50m ago", "--until", "49m ago", "--source", f"{SOURCES[7]}/32"),
        *("--write", str(stack.directory / "minute.pcapng")),
    )
    print(f"  export of a minute of one exporter: {time.monotonic() - began:.2f} s ({said.strip()}, exit code {code})")
    journal.stop()


def main(arguments: Sequence[str]) -> None:
    """Measure all in a directory of its own."""
    with tempfile.TemporaryDirectory(dir=arguments[0] if arguments else "/dev/shm") as name:
        directory = Path(name)
        measure_files(directory)
        kept = directory / "kept"
        for measure in (measure_service, partial(measure_start, directory=kept)):
            place = Path(tempfile.mkdtemp(dir=directory))
            with Stack(place, settings(kept)) as stack:
                stack.by_exec = True  # as users start them
                measure(stack)


if __name__ == "__main__":
    main(sys.argv[1:])

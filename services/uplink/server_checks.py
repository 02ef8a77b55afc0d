"""Judgement of a NATS server and of a stream there: what can lose what it has acknowledged. No I/O."""

from collections.abc import Iterator
from typing import Final

from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from services.uplink.packs import LARGEST_BATCH
from services.uplink.subjects import kept_stream, site_subjects
from shared.settings.uplink import Uplink

MENDED: Final = {(2, 12): 12, (2, 14): 3}
"""Releases, and the patch level that each has to have at least; later ones have all."""
DUPLICATES_SECONDS: Final = 120.0
"""Time in which JetStream knows a message again by its number: longer than one is ever sent again after a failure."""


def wanted_stream(uplink: Uplink) -> StreamConfig:
    """Return the stream in which JetStream is to keep what this site sends."""
    return StreamConfig(
        name=kept_stream(uplink.site),
        subjects=[site_subjects(uplink.site)],
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        num_replicas=uplink.replicas,
        max_bytes=uplink.keep_bytes,
        max_age=uplink.keep_seconds,
        duplicate_window=min(DUPLICATES_SECONDS, uplink.keep_seconds),
    )


def check_server(version: tuple[int, int, int], max_payload: int) -> Iterator[str]:
    """Yield a sentence for each thing about a server that is to be mended."""
    release, patch = version[:2], version[2]
    if release < min(MENDED) or (release < max(MENDED) and release not in MENDED) or patch < MENDED.get(release, 0):
        told = ".".join(map(str, version))
        yield f"NATS server {told} can lose what it has acknowledged, or be attacked; use 2.12.12, 2.14.3 or later"
    if max_payload < LARGEST_BATCH:
        yield f"the NATS server takes messages of up to {max_payload} bytes; set max_payload: 1MB, its default"


def check_stream(found: StreamConfig, uplink: Uplink) -> Iterator[str]:
    """Yield a sentence for each thing about this site's stream that is to be mended."""
    wanted = wanted_stream(uplink)
    name = wanted.name
    if (found.num_replicas or 1) < uplink.replicas:
        yield f"stream {name} has {found.num_replicas or 1} replicas, and [uplink] replicas says {uplink.replicas}"
    if found.storage != StorageType.FILE:
        yield f"stream {name} is kept in memory alone: it is lost when its servers restart; make it with storage: file"
    if found.discard != DiscardPolicy.OLD:
        yield f"stream {name} refuses what is new when it is full; make it with discard: old"
    if not found.max_bytes or found.max_bytes < 0:
        yield f"stream {name} has no limit of its size: JetStream stops for all when its disk is full; set max_bytes"
    if (found.duplicate_window or 0) < (wanted.duplicate_window or 0):
        yield f"stream {name} knows a message again for too short a time; set duplicate_window to 2 minutes"

"""The messages between offload and the senders of copies: the copies that the kernel makes, generation by generation.

A *generation* is the number by which the kernel's rules mark each datagram that they have copied. The sender of copies
leaves out, for datagrams with that mark, the collectors that the generation serves. Offload publishes a generation
before its rules go in, and puts them in once each sender that subscribes has answered.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from shared.bus.bodies.fields import Number, ReplyTopic
from shared.client import Client, Streams
from shared.datagrams.limits import BUCKETS

MAX_GENERATION: Final = 0xFFFF
"""The most that a mask of marks can have room for: sixteen bits."""
PATHS_TOPIC: Final = "offload/paths/"
Share = Annotated[bytes, Meta(max_length=BUCKETS // 8)]
"""The buckets of sources that a member of a group takes, a bit for each (`shared.datagrams.sampling`); empty: all."""
MarkGeneration = Annotated[int, Meta(ge=0, le=MAX_GENERATION)]
"""A generation; 0: the datagram has no mark of offload's, and the kernel has copied it for nobody."""


class KernelServed(msgspec.Struct, array_like=True, frozen=True):
    """An entry of the registry as rules serve it, for those of its streams that they copy.

    The kernel has made each copy that `client` asks for of a marked datagram of `streams`: those by its prefixes, of
    these by its `share` if it is in a group, and of these one in `sample`, which the kernel counts itself.
    """

    client: Client
    streams: Streams
    share: Share = b""


class KernelCopies(msgspec.Struct, array_like=True, frozen=True):
    """One of `pieces` pieces of what a generation serves, of the collectors of one source.

    Generations are used again after minutes: one with a higher `serial`, or of another boot, replaces the one before.
    A subscriber that has all pieces publishes an `OffloadReply` on `reply`, each time that it has got them, once it
    serves `revision` of the registry of the gateway with the boot id `registry`, of which they were made.
    """

    generation: Annotated[int, Meta(ge=1, le=MAX_GENERATION)]
    serial: Number
    reply: ReplyTopic
    piece: Number
    pieces: Annotated[int, Meta(ge=1)]
    served: list[KernelServed]
    registry: Number = 0
    revision: Number = 0


Way = Literal["kernel", "frames", "packets", "relay"]
"""The way of a collector's copies: the kernel makes them; else the transmitter, as frames or as raw IP; or the
forwarder."""


MAX_REASON: Final = 200


class CollectorPath(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The way of a collector's copies, and the reason why the kernel does not make them; empty: it does."""

    name: Annotated[str, Meta(min_length=1, max_length=255)]
    way: Way
    reason: Annotated[str, Meta(max_length=MAX_REASON)] = ""


class OffloadPaths(msgspec.Struct, array_like=True, frozen=True):
    """One of `pieces` pieces of a list, numbered `report`: the ways of all collectors, while anybody subscribes."""

    report: Number
    piece: Number
    pieces: Annotated[int, Meta(ge=1)]
    paths: list[CollectorPath]


class OffloadReply(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A sender's word that it knows the generation of `serial`: it leaves out what that serves, from now on."""

    serial: Number

"""Types of fields that several messages on the bus have."""

from typing import Annotated, Final

from msgspec import Meta

MAX_NUMBER: Final = 1 << 62
"""Far enough below 2**64, the end of msgpack's integers, that a receiver can add to a number and send the sum."""
REPLY_PREFIX: Final = "reply/"
ReplyTopic = Annotated[str, Meta(max_length=128, pattern=f"^{REPLY_PREFIX}.*/$")]
StreamName = Annotated[str, Meta(pattern="^[^/]{1,64}$")]
"""A name without `/`, so that a subscription to a stream brings no other, such as `messages/more`."""
Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
PackedAddress = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""An address of 16 bytes, IPv4 mapped into IPv6."""

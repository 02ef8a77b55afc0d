"""Types of fields that several messages on the bus have."""

from typing import Annotated, Final

from msgspec import Meta

MAX_NUMBER: Final = 1 << 62
"""Far enough below 2**64, the end of msgpack's integers, that a receiver can add to a number and send the sum."""
SENDER: Final = r"^[a-z]+\.[0-9]{1,9}\Z"
"""A service and its number, as in `ingest.2`."""
REPLY_PREFIX: Final = "reply/"
REPLAY_PREFIX: Final = "replay/"
"""Topics of what the journal sends to those who have asked it: one a reader, who chooses its name."""
ReplyTopic = Annotated[str, Meta(max_length=128, pattern=f"^{REPLY_PREFIX}.*/\\Z")]
ReplayTopic = Annotated[str, Meta(max_length=128, pattern=f"^{REPLAY_PREFIX}[^/]+/\\Z")]
StreamName = Annotated[str, Meta(pattern=r"^[^/]{1,64}\Z")]
"""A name without `/`, so that a subscription to a stream brings no other, such as `messages/more`."""
Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
SenderName = Annotated[str, Meta(pattern=SENDER)]
PackedAddress = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""An address of 16 bytes, IPv4 mapped into IPv6."""

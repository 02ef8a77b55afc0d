"""The list of the names protocol, byte for byte as `json.dumps` prints it, kept rendered while the registry changes."""

import json
from typing import Final

from shared.client import Client

BLOCK: Final = 128
"""Entries rendered together. A change renders one block anew. Lists that differ share all their other blocks, so a
client that is slow to read an old list costs little more than references."""


class NamesList:
    """Every client as `{"address", "port", "name"}` by name, in the order of first registration."""

    def __init__(self) -> None:
        self._block_of: dict[str, int] = {}
        self._blocks: dict[int, dict[str, bytes]] = {}
        self._joined: dict[int, bytes] = {}
        self._appended = 0
        self._rendered: tuple[bytes, ...] = (b"{", b"}")

    def put(self, client: Client) -> None:
        """Add a client at the end, or change it in its place."""
        block = self._block_of.get(client.name)
        if block is None:
            block = self._block_of[client.name] = self._appended // BLOCK
            self._appended += 1
        entry = {"address": client.address, "port": client.port, "name": client.name}
        text = f"{json.dumps(client.name)}: {json.dumps(entry)}"
        self._blocks.setdefault(block, {})[client.name] = text.encode()
        self._forget(block)

    def remove(self, name: str) -> None:
        """Remove a client."""
        block = self._block_of.pop(name)
        del self._blocks[block][name]
        if not self._blocks[block]:
            del self._blocks[block]
        self._forget(block)

    def _forget(self, block: int) -> None:
        self._joined.pop(block, None)
        self._rendered = ()

    def render(self) -> tuple[bytes, ...]:
        """Return the whole list in parts to be sent one after the other; the parts are shared, never changed."""
        if not self._rendered:
            parts = [b"{"]
            for number, entries in self._blocks.items():
                if number not in self._joined:
                    self._joined[number] = b", ".join(entries.values())
                parts += (self._joined[number], b", ")
            parts[len(parts) - 1 if self._blocks else 1 :] = [b"}"]
            self._rendered = tuple(parts)
        return self._rendered

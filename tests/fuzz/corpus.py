"""The inputs kept for each target, one a line in hexadecimal, and how several pieces are one input.

Kept is what gets somewhere, from which mutations start, and what once found something.
"""

from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).with_name("corpus")


def read_corpus(name: str) -> list[bytes]:
    """The inputs kept for a target."""
    return [bytes.fromhex(line) for line in (CORPUS / f"{name}.hex").read_text().split()]


def write_corpus(name: str, inputs: list[bytes]) -> None:
    """Keep these inputs, shortest first."""
    (CORPUS / f"{name}.hex").write_text("".join(f"{data.hex()}\n" for data in sorted(set(inputs), key=_length_first)))


def _length_first(data: bytes) -> tuple[int, bytes]:
    return len(data), data


def join_parts(parts: list[bytes]) -> bytes:
    """Pieces as one input; `split_parts` is the way back."""
    return b"".join(len(part).to_bytes(2) + part for part in parts)


def split_parts(data: bytes, most: int) -> list[bytes]:
    """Parts with two bytes of length each; the last takes what is left. `most` of them; what is behind is let go."""
    parts: list[bytes] = []
    while data and len(parts) < most:
        size = int.from_bytes(data[:2])
        parts.append(data[2 : 2 + size])
        data = data[2 + size :]
    return parts

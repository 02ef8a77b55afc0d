"""The READMEs as the tests read them: code blocks by name, rows of tables, sentences.

A code block's info string is its language and its name, as in "```sh tour". A test asks for it by page and name, as in
`block("README.md", "tour")`. A block that no test can run, such as a transcript, has the name `shown`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests.stack import CHECKOUT

FRONT: Final = "README.md"
SHOWN: Final = "shown"
"""The name of blocks that are shown, not run."""
FENCED: Final = re.compile(r"^ *```(\w*) ?(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
ROW: Final = re.compile(r"^ *\|(.*)\|$", re.MULTILINE)
WORDS: Final = re.compile(r"`[^`]*`|[^\s]*\w[^\s]*")
"""A piece of code is one word; a dash is none."""


class Block(NamedTuple):
    """A fenced piece of code: the language, the name that its info string gives it, the lines."""

    language: str
    name: str
    code: str


def pages() -> list[str]:
    """Every README of the checkout, as a path from its top."""
    folders = (CHECKOUT / name for name in ("services", "shared", "deploy", "tests"))
    found = [path for folder in folders for path in folder.rglob("README.md")]
    return [FRONT, *sorted(str(path.relative_to(CHECKOUT)) for path in found)]


def text(page: str) -> str:
    """The whole page."""
    return (CHECKOUT / page).read_text()


def blocks(page: str) -> list[Block]:
    """Its pieces of code, in order."""
    return [Block(*found) for found in FENCED.findall(text(page))]


def block(page: str, name: str) -> str:
    """The code that has this name on the page; there is exactly one."""
    (code,) = (each.code for each in blocks(page) if each.name == name)
    return code


def prose(page: str) -> str:
    """The page without its code."""
    return FENCED.sub("", text(page))


def tables(page: str) -> Iterator[list[list[str]]]:
    """Each table: its rows, heading first, each a list of cells; a bar within code, or after a backslash, is text."""
    for lines in re.findall(r"(?:^ *\|.*\|\n)+", prose(page), re.MULTILINE):
        rows = [re.split(r" *(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$) *", f" {line} ") for line in ROW.findall(lines)]
        yield [[cell.strip() for cell in row] for row in rows if set("".join(row)) - set(" -")]


def defined(heading: str) -> dict[str, list[str]]:
    """All tables whose first column has this heading: the other cells by what stands in backticks in the first one.

    AssertionError when a word is defined twice, on whatever page.
    """
    found: dict[str, list[str]] = {}
    for page in pages():
        for (first, *_), *rows in tables(page):
            for name, *rest in rows if first.strip("`") == heading else ():
                for word in re.findall(r"`([^`]+)`", name):
                    assert word not in found, f"{word} is defined twice, the second time in {page}"
                    found[word] = rest
    return found


def sentences(page: str) -> Iterator[str]:
    """Every sentence of the page, and every cell of its tables; headings and code are none."""
    for paragraph in re.split(r"\n\s*\n|\n(?= *(?:[-*#|]|\d+\.) ?)", prose(page)):
        for piece in paragraph.split("|") if paragraph.lstrip().startswith("|") else [paragraph]:
            plain = re.sub(r"\]\([^)]*\)|^ *(?:[-*]|\d+\.|#+) ", "", " ".join(piece.split()))
            yield from re.split(r"(?<=[.?!])\)?\*?\s+", re.sub(r"<[^>]*>", "", plain))


def words(sentence: str) -> int:
    """The number of words."""
    return len(WORDS.findall(sentence))


def exists(page: str, link: str) -> bool:
    """Return whether a relative link on the page leads to a file, and its anchor to a heading there."""
    path, _, anchor = link.partition("#")
    target = (CHECKOUT / page).parent / path if path else CHECKOUT / page
    if not target.exists():
        return False
    return not anchor or anchor in _anchors(target)


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

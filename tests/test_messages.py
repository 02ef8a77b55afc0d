"""Every sentence that the code can say is provoked: a test expects it, or `tests/provoked.py` brings it out."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.provoked import everything, said
from tests.stack import CHECKOUT

WORDS: Final = re.compile(r"[A-Za-z,;:.()'`-]+ [A-Za-z,;:.()'`-]+ [A-Za-z]+")
"""Three words in a row make a sentence, or the piece of one between two values."""
CODE: Final = re.compile(
    r"CREATE TABLE|ALTER TABLE|INSERT INTO|^SELECT rowid|\(\.\*\)|^Object contains|^Expected `|^Cannot over"
    r"|^Max open files|^print |^function |^Message Size|^permissions violation"
)
"""SQL, a script of a shell, and sentences of others that are searched for."""
HELP: Final = frozenset({"help", "description", "epilog", "service_parser", "Parser", "add_command", "execute"}) | {
    f"{kind}MetricFamily" for kind in ("Counter", "Gauge", "Info")
}
"""Arguments and functions whose texts are for `--help`, for SQLite, or for the help of a metric."""
KERNEL: Final = "a kernel without what this one has, or a sandbox"
STACK: Final = "a whole stack, whose test looks at the exit code, the error word or the account"
LINKS: Final = "hosts and links of a lab, whose tests look at the account, or at the errno in the log"
ELSEWHERE: Final[dict[str, str]] = {
    "capset(2) was refused": KERNEL,
    "fanwire needs a 64-bit Linux": KERNEL,
    "it must give up its privileges, and failed": KERNEL,
    "the kernel has no AF_PACKET, or RestrictAddressFamilies= of a systemd unit leaves it out": KERNEL,
    "the address can't be checked just now: {}": KERNEL,
    "can't accept TCP connections; trying again in a second": KERNEL,
    "can't read a TCP connection: it is closed": KERNEL,
    "can't lend to another subscriber": KERNEL,
    "error in the gateway's loop": KERNEL,
    "the disk is slow: the next start seals the segments that are open now": KERNEL,
    "the bus can't be bound anew; the broker tries again each second": KERNEL,
    "copies have another source address now: this host's addresses or routes have changed": LINKS,
    "copies to a collector fail; check its host, its port and the route": LINKS,
    "{}; the forwarder keeps trying": LINKS,
    "{} or [transmitter] frames_per_second did not let them leave in time": LINKS,
    "than a link there takes are lost, and where ICMPv6 is filtered nobody hears of it": LINKS,
    "# {} was {} at the import\n": STACK,
    "[gateway] client_authorities: expected a PEM file, for each [[token]] that has a certificate": STACK,
    "message refused: malformed": STACK,
    "no answer from the gateway within {} s": STACK,
    "no copy came within {} s: {}": STACK,
    "no running transmitter has raw sockets; {}": STACK,
    "{} pages are open already": STACK,
    "not a string": "`decoder` puts what was expected of the field in its place",
    "the entry could not be removed, and goes with its lease: {}": STACK,
    "the lease was not renewed: {}": STACK,
    "the limit of open connections is reached; try again later": STACK,
    "the path is another worker's by now": "caught where it is raised",
    "this user may not enter it": STACK,
    "{} requests of {} wait for the transmitter already": STACK,
    "{} requests wait for the transmitter already": STACK,
    "{}: the answer is not a list of clients; is this the gateway?": STACK,
}
"""Sentences that no direct call brings out, and no test expects by their words, with the reason."""


def sentences(folder: str) -> Iterator[str]:
    """Yield each sentence in a folder's code, without docstrings and texts of `--help`; `{}` stands for a value."""
    for path in (CHECKOUT / folder).rglob("*.py"):
        yield from (text for text in _texts(path) if WORDS.search(text) and not CODE.search(text))


def _texts(path: Path) -> Iterator[str]:
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    skipped: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        elif isinstance(node, ast.keyword) and node.arg in HELP:
            skipped |= {id(each) for each in ast.walk(node.value)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in HELP:
            skipped |= {id(each) for argument in node.args for each in ast.walk(argument)}
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(value) for value in node.values}
    yield from (text for node in nodes if id(node) not in skipped and (text := _text(node)))


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(value.value) if isinstance(value, ast.Constant) else "{}" for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def pieces(text: str) -> list[str]:
    """Return the pieces of a text between its values that are long enough to be recognised."""
    return [piece for piece in re.sub(r"\\(?=\W)", "", text).split("{}") if len(piece) >= 12 and " " in piece.strip()]


def word_runs(text: str) -> set[str]:
    """Return the runs of three words in a text's pieces that are long enough to be recognised."""
    runs = [piece.split() for piece in pieces(text)]
    found = {" ".join(words[at : at + 3]) for words in runs for at in range(len(words) - 2)}
    return {each for each in found if len(each) >= 15}


def test_every_sentence_is_provoked() -> None:
    """Each sentence of the code is said by a provocation, or a test expects a piece or three words of it."""
    heard = "\n".join({*said(everything())})
    tests = [text for path in (CHECKOUT / "tests").rglob("*.py") if path != Path(__file__) for text in _texts(path)]
    expected = {piece for text in tests for piece in pieces(text)}
    expected_runs = {run for text in tests for run in word_runs(text)}
    found = {*sentences("services"), *sentences("shared")}
    assert len(found) > 400

    def is_provoked(text: str) -> bool:
        pattern = ".*".join(map(re.escape, filter(None, map(str.strip, text.split("{}")))))
        known = (own in other or other in own for own in pieces(text) for other in expected)
        return bool(re.search(pattern, heard) or word_runs(text) & expected_runs) or any(known)

    assert sorted(text for text in found if not is_provoked(text)) == sorted(ELSEWHERE)

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
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(value.value) if isinstance(value, ast.Constant) else "{}" for value in node.values)
            waiting += (value for value in node.values if not isinstance(value, ast.Constant))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in HELP:
            waiting += (node.func, *node.keywords)
        elif not _is_help(node):
            for part in map(vars(node).get, node._fields):  # half of the time of ast.walk
                if isinstance(part, list):
                    waiting += [each for each in part if isinstance(each, ast.AST)]
                elif isinstance(part, ast.AST) and part._fields:  # not Load and Store, which are half of all
                    waiting.append(part)


def _is_help(node: ast.AST) -> bool:
    """Return whether a node is a docstring, or a text for `--help`."""
    if isinstance(node, ast.keyword):
        return node.arg in HELP
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


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
        return bool(word_runs(text) & expected_runs) or any(known) or bool(re.search(pattern, heard))

    assert sorted(text for text in found if not is_provoked(text)) == sorted(ELSEWHERE)

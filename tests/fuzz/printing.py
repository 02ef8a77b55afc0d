"""Output of a target, caught: on a terminal it must do nothing but appear."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def printed(*, escaped: bool = True) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Catch standard output and standard error; the latter, and if `escaped` the former, are printable lines."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err
    check_printable(err.getvalue())
    if escaped:
        check_printable(out.getvalue())


def check_printable(text: str) -> None:
    """Lines without anything that a terminal would obey."""
    assert all(line.isprintable() for line in text.split("\n")), text
    text.encode()


def check_line(error: Exception) -> None:
    """A refusal is one line."""
    assert str(error)
    assert str(error).isprintable(), error

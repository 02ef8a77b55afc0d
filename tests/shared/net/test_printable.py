import doctest

from hypothesis import given
from hypothesis import strategies as st

import shared.net.printable
from shared.net.printable import printable


def test_examples_in_the_docstring_hold() -> None:
    """The module's own examples give what they say."""
    assert doctest.testmod(shared.net.printable) == (0, 1)


@given(st.text(st.characters(codec=None)))
def test_any_text_is_one_line_that_can_be_encoded(text: str) -> None:
    """Any text, surrogates too, can be written to a terminal and is seen; what could be seen before stays."""
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert shown == text or not text.isprintable()

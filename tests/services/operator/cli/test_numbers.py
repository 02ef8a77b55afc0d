import contextlib
import doctest

from hypothesis import example, given
from hypothesis import strategies as st

import services.operator.cli.numbers
from services.operator.cli.numbers import parse_whole


def test_examples_in_the_docstring_hold() -> None:
    """The module's own examples give what they say."""
    assert doctest.testmod(services.operator.cli.numbers) == (0, 3)


@given(
    st.text(st.sampled_from("0123456789-+ _\u00b2\u0663"), max_size=40), st.integers(0, 99), st.integers(100, 70_000)
)
@example("0" * 19 + "199999", 1, 65_535)
@example("9" * 5_000, 1, 65_535)
def test_any_text_is_a_number_of_the_range_or_refused(text: str, smallest: int, largest: int) -> None:
    """An accepted number is in the range, and was written in plain digits."""
    with contextlib.suppress(ValueError):
        number = parse_whole(text, smallest, largest)
        assert smallest <= number <= largest
        assert str(number) == text.lstrip("0") or (number == 0 and set(text) == {"0"})

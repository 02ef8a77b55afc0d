import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.arriving import SOURCES, join_arrivals, split_arrivals
from tests.fuzz.corpus import CORPUS, join_parts, read_corpus, split_parts
from tests.fuzz.targets import TARGETS


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """An input of the corpus with some bytes changed, a stretch cut out, or two of them spliced."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data))) : draw(st.integers(0, len(data)))] = draw(st.binary(max_size=6))
    return bytes(data + draw(st.sampled_from(seeds)) if draw(st.booleans()) else data)


def test_every_target_has_a_corpus() -> None:
    """Each target has inputs to start from, and no file is left of one that is gone."""
    assert {path.stem for path in CORPUS.iterdir()} == TARGETS.keys()
    assert all(read_corpus(name) for name in TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs_are_taken_or_refused(name: str) -> None:
    """Every input kept, those that once found something among them, does no harm."""
    for data in read_corpus(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_are_taken_or_refused(name: str) -> None:
    """Some hundred mutations of the kept inputs, and bytes at random, do no harm."""

    @settings(max_examples=75)
    @given(st.one_of(mutated(read_corpus(name)), st.binary(max_size=200)))
    def fuzz(data: bytes) -> None:
        TARGETS[name](data)

    fuzz()


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=7))
def test_parts_come_back(parts: list[bytes]) -> None:
    """A bus message made one input is the same parts again."""
    assert split_parts(join_parts(parts), len(parts)) == parts


@given(st.lists(st.tuples(st.integers(0, 15), st.binary(max_size=300)), max_size=20))
def test_arrivals_come_back(sent: list[tuple[int, bytes]]) -> None:
    """Datagrams made one input are the same datagrams again, of the same sources."""
    arrivals = split_arrivals(join_arrivals(sent))
    assert [(each.source, each.payload) for each in arrivals] == [
        (SOURCES[bits & 3], payload) for bits, payload in sent
    ]

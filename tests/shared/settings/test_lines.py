import tomllib

import pytest

from shared.settings.lines import line_of

TEXT = """\
# [bus]
bus = {pool = 1}
[ gateway ]   # once
listen = [
    "tcp://127.0.0.1:5000",
]
"max_clients" = 5
[[stream]]
name = \"\"\"
[[stream]]
listen = 1
\"\"\"
[[stream]]\r
listen = 2
[other."gateway"]
memory = 1
"""


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["bus", "pool"], 2),
        (["gateway"], 3),
        (["gateway", "listen"], 4),
        (["gateway", "max_clients"], 7),
        (["gateway", "memory"], 3),
        (["stream", 0, "name"], 9),
        (["stream", 0, "listen"], 8),
        (["stream", 1, "listen"], 14),
        (["stream", 2, "name"], None),
        (["console", "listen"], None),
    ],
)
def test_line_of_a_key_or_its_table(places: list[str | int], expected: int | None) -> None:
    """The key's own line, else that of its table; comments, texts of several lines and other tables are none."""
    tomllib.loads(TEXT)
    assert line_of(TEXT, places) == expected

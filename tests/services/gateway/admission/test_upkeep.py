import errno

from structlog.testing import capture_logs

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.admission.tokens import Tokens
from services.gateway.admission.upkeep import Readmission
from services.gateway.registry.entry import Origin
from shared.client import Client
from shared.settings.entries import Token
from shared.settings.own_listeners import OwnListeners
from tests.services.gateway.table import Table

RED = Peer(0, "192.0.2.7", 4000, Rights("red"))


def test_what_can_not_be_taken_away_now_is_taken_later() -> None:
    """While the disk is full entries keep what a reload takes from them, and then lose it without another one."""
    full = [False]

    def keep(*_: object, **__: object) -> None:
        if full[0]:
            raise OSError(errno.EIO, "the registry can't be written to disk just now")

    table = Table(keep=keep)
    for name, streams in (("both", ("a", "b")), ("other", ("b",))):
        table.grant(Client(name, 0, RED.address, 9, streams=streams), RED, Origin.JSON)
    full[0], readmission = True, Readmission(table)
    tokens = Tokens([Token(name="red", certificate="red", scopes=("collect",), streams=("a",))])

    def keeps() -> dict[str, tuple[str, ...]]:
        return {entry.client.name: entry.client.streams for entry in table.entries()}

    readmission.begin(tokens, Destinations(["a", "b"], OwnListeners(()), lambda _: False, lambda _: False))
    readmission.check()
    assert keeps() == {"both": ("a", "b"), "other": ("b",)}
    full[0] = False
    with capture_logs() as logs:
        readmission.check()
        readmission.check()
    assert keeps() == {"both": ("a",)}
    assert [each["clients"] for each in logs] == [["other"], ["both"]]

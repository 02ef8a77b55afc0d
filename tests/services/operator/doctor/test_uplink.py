import pytest

from services.operator.doctor.uplink import check_uplink
from shared.ledger.accounts import Accounts
from shared.settings.model import Settings
from shared.settings.uplink import Uplink

ON = Settings(uplink=Uplink(servers=("nats://127.0.0.1:4222",), site="berlin"))


def uplink(own: dict[str, int], **sending: int) -> dict[str, Accounts]:
    """The accounts of an uplink that sends `flows`."""
    return {"forwarder.1": {}, "uplink.1": {"uplink": own, "sending/flows": {"taken": 9, **sending}}}


def test_an_uplink_that_is_off_is_not_asked_for() -> None:
    """Without servers there is nothing to say."""
    assert list(check_uplink(uplink({}), Settings())) == []


@pytest.mark.parametrize(
    ("accounts", "expected"),
    [
        ({"forwarder.1": {}}, [("error", "not heard on the bus: nothing goes to other sites, and nothing comes")]),
        (uplink({"connected": 1}, held=3), [("ok", "connected to a NATS server; 3 datagrams wait for it")]),
        (uplink({"connected": 0}, held=3), [("error", "no connection to a NATS server; 3 datagrams wait for one")]),
        (
            uplink({"connected": 1, "server_faults": 2}),
            [("warning", "2 faults of the NATS server or of this site's stream there")],
        ),
        (
            uplink({"connected": 1}, dropped_server_away=7, dropped_server_slow=1),
            [
                ("ok", "connected to a NATS server; 0 datagrams wait"),
                ("warning", "8 datagrams did not get to JetStream: 7 server_away, 1 server_slow"),
            ],
        ),
    ],
)
def test_what_is_wrong_is_found(accounts: dict[str, Accounts], expected: list[tuple[str, str]]) -> None:
    """A missing uplink, one without connection, a bad server and losses are findings; else it is well."""
    found = list(check_uplink(accounts, ON))
    assert len(found) == len(expected)
    for finding, (level, why) in zip(found, expected, strict=True):
        assert finding.level == level
        assert finding.why.startswith(why)
        if "not heard" in why:
            assert finding.cure == "`systemctl enable --now fanwire-uplink`, or `fanwire run`"
        elif level != "ok":
            assert finding.cure == "see the uplink's log: it says what is wrong, and where"


def test_the_shared_registry_is_looked_at() -> None:
    """A node that can't write to the registry of its cluster, and damaged records there, are findings."""
    shared = Settings(uplink=Uplink(servers=("nats://127.0.0.1:4222",), site="berlin", registry="berlin"))
    cures = {
        "ok": "",
        "error": "see the gateway's log; `register` and `renew` are refused meanwhile",
        "warning": "let only gateways write to its bucket",
    }
    for gateway, levels, said in (
        ({"registry_connected": 1, "sessions_live": 3}, ["ok"], "shares its registry: 3 nodes take part"),
        ({"registry_connected": 0}, ["error"], "this node can't change the registry of the cluster"),
        ({"registry_connected": 1, "registry_damaged": 2}, ["ok", "warning"], "2 records of the cluster's registry"),
    ):
        accounts = {**uplink({"connected": 1}), "gateway.1": {"gateway": gateway}}
        *found, _ = check_uplink(accounts, shared)
        assert [finding.level for finding in found] == levels
        assert found[-1].why.startswith(said)
        assert found[-1].cure == cures[levels[-1]]
        assert next(check_uplink(accounts, ON)).why.startswith("connected")


def test_how_late_other_sites_come_is_told() -> None:
    """A site whose datagrams come late while more of them wait is a warning; late alone, as after an outage, is not."""
    for waiting, late, level in ((5, 12_500, "warning"), (0, 12_500, "ok"), (5, 900, "ok")):
        found = uplink({"connected": 1})
        found["uplink.1"]["receiving/bonn"] = {"waiting_messages": waiting, "late_ms": late}
        (_, finding) = check_uplink(found, ON)
        assert finding.level == level
        assert finding.why == (
            f"site bonn: the last datagrams came {late / 1000:.1f} s late, and {waiting} messages waited in JetStream"
        )
        slow = "see whether it falls; else the link is too slow, or the senders of copies here are"
        assert finding.cure == (slow if level == "warning" else "")

"""The past that a collector asks for: from when on, of which streams, and whose it is."""

import contextlib
import errno
from datetime import datetime
from string import ascii_letters
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.admission.since import PastGrant, grant_past, parse_since
from services.gateway.protocol.requests import Register, RequestError
from services.gateway.registry.entry import Origin
from services.gateway.registry.reached_places import STORE_SECONDS, TOLD_SECONDS, Past, PastByName, Pasts
from shared.bus.bodies.journal_messages import Behind, CatchUpReport
from shared.client import Client, Place, Resume
from tests.services.gateway.table import HERE, Table

NOW = 1_000_000.0
OURS, THEIRS = Peer(1, "192.0.2.1", 4000, Rights("ours")), Peer(2, "192.0.2.2", 4000, Rights("theirs"))
PLACES = (Place("flows", "ingest.1", 7, 3, 99, 5), Place("logs", "ingest.1", 7, 4, 88, 5))


class Site:
    """A registry whose streams `flows` and `logs` have a journal, and what it has stored of places."""

    def __init__(self) -> None:
        self.now, self.clock, self.full = NOW, 0.0, False
        self.stored: dict[str, Any] = {}
        self.table = Table()
        self.table.pasts = Pasts(lambda: self.now, lambda: self.clock, self._store, most=4, most_of_holder=3)
        self.table.pasts.journaled = frozenset({"flows", "logs"})

    def _store(self, changed: PastByName) -> None:
        if self.full:
            raise OSError(errno.EIO, "the registry can't be written to disk just now")
        self.stored.update(changed)

    def ask(self, since: float | str | None, *streams: str, peer: Peer = OURS) -> PastGrant:
        """Ask for the past as `siem`."""
        asked = Register(name="siem", streams=streams or ("flows",), port=9, since=since)
        return grant_past(asked, self.table.find("siem"), peer.rights.holder, self.table.pasts)

    def join(self, *streams: str, peer: Peer = OURS, resume: Resume | None = None) -> int:
        """Enter `siem`; return its generation."""
        client = Client("siem", generation=0, address="192.0.2.1", port=9, streams=streams or ("flows",), resume=resume)
        return self.table.grant(client, peer, Origin.JSON).client.generation

    def leave(self) -> None:
        """Let it leave."""
        entry = self.table.find("siem")
        assert entry
        self.table.release(entry)

    def tell(self, generation: int, state: Any, **more: Any) -> None:
        """Let the forwarder tell of it."""
        behind = Behind("siem", generation, state, 5, list(PLACES), **more)
        self.table.note_behind(CatchUpReport("relay", [behind]))


@pytest.fixture
def site() -> Site:
    """Nobody is signed up."""
    return Site()


def test_since_is_seconds_ago_or_a_time(site: Site) -> None:
    """Both become the time that the sender goes by, of the streams that have a journal; what lacks one is said."""
    assert site.ask(None) == PastGrant()
    assert site.ask(60) == PastGrant(Resume(999_940 * 10**9, streams=("flows",)))
    assert site.ask("1970-01-02T00:00:00Z", "*").resume == Resume(86_400 * 10**9)
    assert site.ask(60, "flows", "traps").note == "there is no journal of traps: only live copies of it"


@pytest.mark.parametrize(
    ("since", "streams", "said"),
    [
        ("yesterday", ("flows",), 'expected seconds ago, a time such as "2026-11-30T03:12:00Z", or "left"'),
        ("0001-01-01T00:00:00", ("flows",), "expected seconds ago"),
        ("1969-12-31T00:00:00Z", ("flows",), "expected seconds ago"),
        ("2100-01-01T00:00:00Z", ("flows",), "that time is still to come; expected one that has passed"),
        (60, ("traps",), "none of the streams has a journal; leave it out, or set journal = true in [[stream]]"),
    ],
)
def test_a_past_that_can_not_be_had_is_refused(site: Site, since: float | str, streams: Any, said: str) -> None:
    """The refusal says what was wrong, and what to do."""
    with pytest.raises(RequestError, match="since: ") as refused:
        site.ask(since, *streams)
    assert (refused.value.error, said in str(refused.value)) == ("bad_request", True)
    asked = Register(name="siem", since=since)
    with pytest.raises(RequestError, match="since: a client without streams has no past"):
        grant_past(asked, None, "", site.table.pasts)


@example("0001-01-01T00:00:00")
@given(st.text(max_size=64) | st.datetimes(timezones=st.none() | st.timezones()).map(datetime.isoformat))
def test_any_text_is_a_time_that_has_passed_or_refused(since: str) -> None:
    """A text is used or refused, whatever it is and whatever time it means."""
    with contextlib.suppress(RequestError):
        assert 0 <= parse_since(since, NOW) <= NOW


def test_left_is_where_its_sender_saw_it_leave(site: Site) -> None:
    """A name that comes back gets the places that the sender told of the generation that it had, and no other."""
    unknown = site.ask("left")
    assert (unknown.resume, unknown.catch_up) == (None, True)
    assert unknown.note == "it is not known where 'siem' has left: live copies only, from now on"
    generation = site.join("flows", "traps")
    here = site.ask("left")
    assert here == PastGrant(Resume(int(NOW * 1e9), generation, (), ("flows",)), catch_up=True)
    site.leave()
    assert site.ask("left").resume == Resume(int(NOW * 1e9), generation, (), ("flows",))
    site.tell(generation - 1, "left")
    assert site.ask("left").resume == Resume(int(NOW * 1e9), generation, (), ("flows",))
    site.tell(generation, "left")
    assert site.ask("left", "*").resume == Resume(5, generation, PLACES, ("flows",))
    assert site.stored["siem"].places == PLACES


def test_all_streams_may_be_more_than_an_entry_names(site: Site) -> None:
    """Nothing that is kept or sent for a client of all streams names one of them, however many have a journal."""
    site.table.pasts.journaled = frozenset(f"s{number}" for number in range(65))
    for had, wants, granted in (("*", "*", ()), ("*", "s7", ("s7",)), ("s7", "*", ("s7",))):
        site.join(had, resume=site.ask(60, had).resume)
        entry = site.table.find("siem")
        assert entry
        past = site.table.pasts.left_by(entry)
        assert msgspec.json.decode(msgspec.json.encode(past), type=Past) == past
        site.leave()
        resume = site.ask("left", wants).resume
        assert resume
        assert resume.streams == granted
    assert site.ask("left", "s8").resume is None


def test_the_past_of_another_holder_is_not_had(site: Site) -> None:
    """A holder that takes a name over, or signs up under it later, does not get what the former one has missed."""
    generation = site.join()
    assert site.ask("left", peer=THEIRS).resume is None
    site.leave()
    site.tell(generation, "left")
    assert site.ask("left", peer=THEIRS).resume is None
    assert site.ask("left").resume
    site.join(peer=THEIRS)
    site.leave()
    assert site.ask("left").resume is None


def test_a_collector_is_level_when_its_sender_says_so(site: Site) -> None:
    """Until then its entry shows how far it is behind, and the place that it has reached is kept."""
    resume = Resume(1, 0, (), ("flows",))
    generation = site.join(resume=resume)
    entry = site.table.find("siem")
    assert entry
    progress = site.table.pasts.progress(entry)
    assert progress
    assert progress.level_in is None
    site.tell(generation, "catching_up", rows=500, age_ms=1500, per_second=70)
    progress = site.table.pasts.progress(entry)
    assert progress
    assert (progress.rows, progress.seconds, progress.per_second) == (500, 1.5, 70)
    assert site.table.pasts.resumed(entry) == replace_resume(resume, 5)
    site.tell(generation - 1, "level")
    assert entry.client.resume
    site.tell(generation, "level")
    level = site.table.find("siem")
    assert level
    assert (level.client.resume, level.client.generation, site.table.pasts.progress(level)) == (None, generation, None)


def test_one_that_was_level_goes_on_from_now_where_its_sender_knows_no_place(site: Site) -> None:
    """The host was restarted weeks later: the place that it had reached while it caught up brings none of it again."""
    generation = site.join(resume=Resume(1, 0, (), ("flows",)))
    site.tell(generation, "catching_up")
    assert site.stored["siem"].places == PLACES
    site.tell(generation, "level")
    assert site.stored == {"siem": None}
    site.now += 10 * 86_400
    assert site.ask("left").resume == Resume(int(site.now * 1e9), generation, (), ("flows",))


def replace_resume(resume: Resume, since_ns: int) -> Resume:
    """Return it with the time and the places that the sender has told."""
    return Resume(since_ns, resume.generation, PLACES, resume.streams)


def test_places_are_bounded(site: Site) -> None:
    """Of each holder the oldest go first; one that leaves under many names costs others nothing."""

    def leave_as(peer: Peer, names: str) -> None:
        for name in names:
            client = Client(name, generation=0, address="192.0.2.1", port=9, streams=("flows",))
            site.table.release(site.table.grant(client, peer, Origin.JSON))
        site.table.pasts.prune()

    def kept(peer: Peer) -> str:
        holder = peer.rights.holder
        return "".join(name for name in ascii_letters if site.table.pasts.left(name, ["flows"], holder, None))

    leave_as(OURS, "a")
    leave_as(THEIRS, "mnopq")
    assert (kept(OURS), kept(THEIRS)) == ("a", "opq")
    leave_as(OURS, "bcde")
    assert (kept(OURS), kept(THEIRS)) == ("de", "pq")
    leave_as(HERE, "vwxyz")
    assert (kept(OURS), kept(THEIRS), kept(HERE)) == ("e", "q", "yz")
    assert set(site.stored.values()) == {None}


def test_a_step_of_the_clock_costs_no_place(site: Site) -> None:
    """A week forth forgets nothing; a year back, the places that a sender tells are stored as before."""
    generation = site.join(resume=Resume(1, 0, (), ("flows",)))
    for hours in (0, 200, -8760):
        site.now, site.clock = NOW + 3600 * hours, site.clock + STORE_SECONDS
        site.stored.clear()
        site.tell(generation, "catching_up")
        site.table.pasts.prune()
        assert site.stored["siem"].places == PLACES
        site.tell(generation, "catching_up")


def test_progress_that_is_told_no_more_is_shown_no_more(site: Site) -> None:
    """The bus may drop the one report that a collector is level, which the registry had nothing to resume for."""
    generation = site.join()
    site.tell(generation, "catching_up", rows=500)
    entry = site.table.find("siem")
    assert entry
    assert site.table.pasts.progress(entry)
    site.clock += TOLD_SECONDS
    assert site.table.pasts.progress(entry) is None
    site.tell(generation, "catching_up", rows=400)
    assert site.table.pasts.progress(entry)


@pytest.mark.parametrize("end", ["level", "left"])
def test_progress_is_known_until_its_end(site: Site, end: str) -> None:
    """Nothing is left of what was told of a collector that is level, or has gone."""
    generation = site.join(resume=Resume(1, 0, (), ("flows",)))
    site.tell(generation, "catching_up", rows=500)
    site.clock = 10.0
    site.tell(generation, "catching_up", rows=400)
    entry = site.table.find("siem")
    assert entry
    progress = site.table.pasts.progress(entry)
    assert progress
    assert (progress.rows, progress.level_in) == (400, 40.0)
    if end == "left":
        site.leave()
    site.tell(generation, end)
    assert site.table.pasts._told == {}


def test_a_full_disk_keeps_back_no_other_report(site: Site) -> None:
    """The progress is known though its place can't be stored, and the place is stored at the next report."""
    generation = site.join(resume=Resume(1, 0, (), ("flows",)))
    site.full = True
    site.tell(generation, "catching_up", rows=500)
    entry = site.table.find("siem")
    assert entry
    progress = site.table.pasts.progress(entry)
    assert progress
    assert (progress.rows, site.stored) == (500, {})
    site.full = False
    site.tell(generation, "catching_up")
    assert site.stored["siem"].places == PLACES

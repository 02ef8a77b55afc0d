"""The answers that the gateway should give: the registry of its README, in the plainest way, by a test's clock."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

Line = dict[str, Any]

MAX_CLIENTS: Final = 12
NAMES_TTL: Final = 20.0
ORDER: Final = {"by": "", "since": 1000.0, "reason": ""}
"""An order to withhold copies; the gateway's Unix time stands still."""
PRESERVE_SECONDS: Final = 40.0
SETTINGS: Final = (
    f"[gateway]\nmax_clients = {MAX_CLIENTS}\nlease_seconds = {NAMES_TTL}\npreserve_seconds = {PRESERVE_SECONDS}\n"
)
RETURN_SECONDS: Final = 30.0
PRESERVE_WINDOW, PRESERVE_LEAST, PRESERVE_BELOW = 60.0, 10, 0.85


@dataclass(frozen=True)
class Caller:
    """The sender of a request: a connection (0: of an earlier gateway), and its token's holder; "": any right."""

    connection: int
    address: str
    port: int
    holder: str = ""

    def controls(self, other: "Caller") -> bool:
        """Return whether this caller owns the other's entries, or has every right."""
        return not self.holder or self.holder == other.holder

    def resembles(self, other: "Caller") -> bool:
        """Return whether it may be the other, come back: by the same holder, or without holders the same address."""
        return self.holder == other.holder if self.holder or other.holder else self.address == other.address


@dataclass
class Entry:
    """An entry; `deadlines` are those that it has had since the clock last moved, which a list may still show."""

    client: Line
    caller: Caller
    json: bool
    ttl: float = 0.0
    hold: bool = False
    renewed_at: float = 0.0
    deadlines: list[float] = field(default_factory=list)

    def prolong(self, now: float) -> float | None:
        """Let the lease begin anew; return in how many seconds it ends, None: never."""
        if not self.ttl:
            return None
        self.renewed_at = now
        self.deadlines.append(now + self.ttl)
        return self.ttl

    def over(self, now: float) -> bool:
        """Return whether the lease has ended."""
        return bool(self.deadlines) and self.deadlines[-1] <= now

    def listed(self, now: float) -> Line:
        """The entry as a list shows it: `expires_in` is one of several values."""
        return self.client | {"expires_in": OneOf(self.deadlines, now)}


class OneOf:
    """Equal to the seconds until any of these deadlines; without any, to None."""

    def __init__(self, deadlines: Iterable[float], now: float) -> None:
        self._values: list[float | None] = [max(0.0, each - now) for each in deadlines]
        self._values = self._values or [None]

    def __eq__(self, other: object) -> bool:
        return other in self._values

    def __repr__(self) -> str:
        return f"one of {self._values}"

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Model:
    """The registry. `told` are lines that nobody asked for, each with the connection that gets it."""

    now: float
    generation: int
    revision: int = 0
    clients: dict[str, Entry] = field(default_factory=dict)
    events: list[Line] = field(default_factory=list)
    told: list[tuple[int, Line]] = field(default_factory=list)
    withheld: set[str] = field(default_factory=set)
    epoch: str = ""
    """As the gateway says it."""
    _expired_at: list[tuple[float, str]] = field(default_factory=list)
    _preserving_since: float | None = None

    def answer(self, request: Line, caller: Caller) -> Line:
        """Do what a request says, and return its answer."""
        said: Line = {
            "register": self._register,
            "renew": self._renew,
            "leave": self._leave,
            "list": self._list,
            "withhold": self._withhold,
            "release": self._release,
        }[request["op"]](request, caller)
        return {"ok": "error" not in said, "id": request["id"]} | said

    def sign_up(self, name: str, caller: Caller) -> Line:
        """The answer to a name."""
        present = self.clients.get(name)
        if present is None and len(self.clients) >= MAX_CLIENTS:
            return {"ok": False, "error": "registry_full"}
        if present is not None and present.json:
            return {"ok": False, "error": "name_taken"}
        self._enter(Entry(self._client({"name": name}, caller), caller, json=False, ttl=NAMES_TTL))
        shown = ("address", "port", "name")
        return {name: {key: entry.client[key] for key in shown} for name, entry in self.clients.items()}

    def watch(self, request: Line) -> tuple[Line, Sequence[Line]]:
        """The answer to `watch`, and the events that follow it at once."""
        resumed, epoch = request.get("revision"), request.get("epoch")
        begin = self.revision - len(self.events)
        known = epoch == self.epoch
        if known and resumed is not None and begin <= resumed <= self.revision:
            return {"ok": True, "id": request["id"], "revision": resumed}, self.events[resumed - begin :]
        return {"ok": True, "id": request["id"]} | self._list(request, None), ()

    def held_by(self, connection: int) -> list[str]:
        """The names of the entries that last as long as this connection."""
        return [name for name, entry in self.clients.items() if entry.hold and entry.caller.connection == connection]

    def remove(self, names: Iterable[str], kind: str = "left") -> None:
        """Take entries away in this order."""
        for name in names:
            client = self.clients.pop(name).client
            self._happen(kind, name=name, generation=client["generation"])

    def pass_by(self, seconds: float) -> None:
        """Let time pass, and what is over expire, unless so much is missing that nothing does."""
        self.now += seconds
        for entry in self.clients.values():
            entry.deadlines = entry.deadlines[-1:]
        overdue = [name for name, entry in self.clients.items() if entry.over(self.now)]
        holders = [holder for name in overdue if (holder := self.clients[name].caller.holder)]
        if self._preserves(holders):
            overdue, holders = [name for name in overdue if not self.clients[name].caller.holder], []
        self._expired_at += [(self.now, holder) for holder in holders]
        self.remove(overdue, "expired")

    def _preserves(self, overdue: list[str]) -> bool:
        begin = self.now - PRESERVE_WINDOW
        came = Counter(
            entry.caller.holder
            for entry in self.clients.values()
            if entry.caller.holder and entry.deadlines and not entry.over(self.now) and entry.renewed_at > begin
        )
        lacking = Counter([*overdue, *(holder for at, holder in self._expired_at if at > begin)])
        due, renewed = 0, 0.0
        for holder in {*came, *lacking}:  # a holder counts as one client
            due += 1
            renewed += came[holder] / (came[holder] + lacking[holder])
        if not overdue or due < PRESERVE_LEAST or renewed >= PRESERVE_BELOW * due:
            self._preserving_since = None
        elif self._preserving_since is None:
            self._preserving_since = self.now
        elif self.now >= self._preserving_since + PRESERVE_SECONDS:
            self._preserving_since = None
        return self._preserving_since is not None

    def restart(self) -> None:
        """Go on as another gateway: events are known from now on, leases begin anew, connections are gone."""
        self.events, self._expired_at, self._preserving_since = [], [], None
        for entry in self.clients.values():
            entry.caller = replace(entry.caller, connection=0)
            entry.ttl = entry.ttl or RETURN_SECONDS * entry.hold
            entry.deadlines = []
            entry.prolong(self.now)

    def _register(self, request: Line, caller: Caller) -> Line:
        present = self.clients.get(request["name"])
        if present is None and len(self.clients) >= MAX_CLIENTS:
            return {"error": "registry_full"}
        if present is not None and not self._may_replace(present, caller, request["take_over"]):
            return {"error": "name_taken"}
        if request.get("streams") and self._is_place_taken(request, caller):
            return {"error": "address_taken"}
        if present is not None and present.json and present.caller.connection != caller.connection:
            lost = {"event": "taken_over", "name": request["name"], "generation": present.client["generation"]}
            self.told.append((present.caller.connection, lost))
        client = self._client(request, caller)
        entry = Entry(client, caller, True, request["ttl"], request["hold"])
        return {"client": self._enter(entry), "receives": bool(client["streams"]) and not client["withheld"]}

    def _withhold(self, request: Line, caller: Caller) -> Line:
        name, entry = request["name"], self.clients.get(request["name"])
        if caller.holder:
            return {"error": "not_permitted"}
        if entry is None or not entry.client["streams"]:
            return {"error": "bad_name"}
        if name not in self.withheld and len(self.withheld) >= MAX_CLIENTS:
            return {"error": "registry_full"}
        self.withheld.add(name)
        return {"client": self._amend(entry, ORDER)}

    def _release(self, request: Line, caller: Caller) -> Line:
        name, entry = request["name"], self.clients.get(request["name"])
        if caller.holder:
            return {"error": "not_permitted"}
        if name not in self.withheld:
            return {"error": "bad_name"}
        self.withheld.remove(name)
        return {"client": self._amend(entry, None) if entry else None}

    def _amend(self, entry: Entry, order: Line | None) -> Line:
        return self._enter(replace(entry, client=entry.client | {"withheld": order}))

    def _is_place_taken(self, request: Line, caller: Caller) -> bool:
        others = [entry.client for name, entry in self.clients.items() if name != request["name"]]
        place = {"address": caller.address, "port": request["port"]}
        return any(other["streams"] and place.items() <= other.items() for other in others)

    def _may_replace(self, present: Entry, caller: Caller, take_over: bool) -> bool:
        if present.json and present.caller.connection == caller.connection:
            return True
        same = caller.resembles(present.caller)
        orphaned = present.hold and not present.caller.connection
        return (same and orphaned) or (take_over and (same or not caller.holder))

    def _renew(self, request: Line, caller: Caller) -> Line:
        refused = self._refusal(request, caller)
        return refused or {"expires_in": self.clients[request["name"]].prolong(self.now)}

    def _leave(self, request: Line, caller: Caller) -> Line:
        refused = self._refusal(request, caller)
        if not refused:
            self.remove([request["name"]])
        return refused

    def _refusal(self, request: Line, caller: Caller) -> Line:
        entry = self.clients.get(request["name"])
        if entry is None or entry.client["generation"] != request["generation"]:
            return {"error": "stale_generation"}
        return {} if caller.controls(entry.caller) else {"error": "not_permitted"}

    def _list(self, _request: Line, _caller: Caller | None) -> Line:
        clients = {name: entry.listed(self.now) for name, entry in self.clients.items()}
        withheld = dict.fromkeys(self.withheld, ORDER)
        return {"clients": clients, "withheld": withheld, "revision": self.revision}

    def _client(self, request: Line, caller: Caller) -> Line:
        self.generation += 1
        fields = {"streams": [], "port": caller.port} | {
            key: request[key] for key in ("name", "streams", "port") if key in request
        }
        plain = {"source": "relay", "from": [], "sample": 1, "group": "", "hop_limit": 64, "dscp": 0}
        order = ORDER if request["name"] in self.withheld else None
        return fields | plain | {"address": caller.address, "generation": self.generation, "withheld": order}

    def _enter(self, entry: Entry) -> Line:
        name = entry.client["name"]
        kind = "changed" if name in self.clients else "joined"
        self.clients[name] = entry
        shown = entry.client | {"expires_in": entry.prolong(self.now)}
        self._happen(kind, client=shown)
        return shown

    def _happen(self, kind: str, **facts: Any) -> None:
        self.revision += 1
        self.events.append({"event": kind, "revision": self.revision, **facts})

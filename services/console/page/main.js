// The page: what it shows by its address, and the events that keep it up to date.

import { adminForm } from "./admin.js";
import { Detail } from "./details.js";
import { UNKNOWN, bytes, clock, duration, html, moment, rate, say, share, short, spoken, whole } from "./drawing.js";
import { Flow } from "./flow.js";
import { Pasts, Table, link, word } from "./tables.js";

const find = (id) => document.getElementById(id);
const state = { collectors: "trouble", exporters: "rate", text: "" };
const VERDICTS = { ok: "all is well", warning: "look at this", error: "something is wrong", unknown: "unknown" };
const pasts = { collectors: new Pasts(), exporters: new Pasts(), streams: new Pasts() };
const flow = new Flow(find("flow"));
const detail = new Detail(find("detail"));
let source = null;
let lastAt = null;
let version = null;

const number = "number";
const lostTone = (row) => (row.recent ? "bad" : row.lost ? "warn" : "");
const tables = {
  collectors: new Table(find("collectors"), "Collectors", [
    { title: "collector", sort: "name", ...link("collector") },
    { title: "health", sort: "trouble", ...word },
    { title: "address", class: "wider", text: (row) => `${row.address} port ${row.port}` },
    { title: "streams", class: "wide", text: (row) => row.streams.join(", ") },
    { title: "rate", sort: "rate", class: number, text: (row) => rate(row.rate) },
    Table.past(pasts.collectors),
    { title: "lost, 5 min", sort: "recent", class: number, text: (row) => whole(row.recent), tone: (row) => (row.recent ? "bad" : "") },
    { title: "lost", sort: "lost", class: `${number} medium`, text: (row) => whole(row.lost), tone: lostTone },
    { title: "by cause", class: "medium", make: () => html("span"), update: tags },
    { title: "waiting", sort: "held", class: `${number} wider`, text: (row) => (row.held === null ? UNKNOWN : row.held && row.rate ? `${whole(row.held)} (${(row.held / row.rate).toFixed(1)} s)` : whole(row.held)) },
    { title: "sent", class: `${number} wider`, text: (row) => whole(row.sent) },
  ], { sorted: state.collectors, onSort: (by) => go({ collectors: by }), empty: "nobody is signed up, or nobody matches the filter" }),
  exporters: new Table(find("exporters"), "Exporters", [
    { title: "exporter", sort: "name", ...link("exporter") },
    { title: "rate", sort: "rate", class: number, text: (row) => rate(row.rate) },
    Table.past(pasts.exporters),
    { title: "share", class: number, text: (row) => share(row.share) },
    { title: "bytes", sort: "bytes", class: `${number} medium`, text: (row) => `${bytes(row.bytes)}/s` },
    { title: "gaps", sort: "gaps", class: `${number} medium`, text: (row) => (row.missed === null ? "not read" : whole(row.missed)), tone: (row) => (row.missed ? "warn" : ""), hint: () => "missing of its own numbers: flows of NetFlow v5, datagrams of v9 and sFlow, records of IPFIX" },
    { title: "streams", class: "medium", text: (row) => row.streams.join(", ") },
    { title: "worker", class: "wide single", text: (row) => row.workers.join(", ") },
    { title: "collectors", sort: "untaken", class: number, text: (row) => (row.takers ? whole(row.takers) : "nobody"), tone: (row) => (row.takers ? "" : "warn") },
  ], { sorted: state.exporters, onSort: (by) => go({ exporters: by }), empty: "nobody has sent anything in the last seconds, or nobody matches the filter" }),
  streams: new Table(find("streams"), "Streams", [
    { title: "stream", ...link("stream") },
    { title: "rate", class: number, text: (row) => rate(row.rate) },
    Table.past(pasts.streams),
    { title: "bytes", class: `${number} medium`, text: (row) => (row.bytes === null ? UNKNOWN : `${bytes(row.bytes)}/s`) },
    { title: "exporters", class: `${number} medium`, text: (row) => whole(row.exporters) },
    { title: "collectors", class: number, text: (row) => (row.takers ? whole(row.takers) : "nobody"), tone: (row) => (row.takers ? "" : "warn") },
    { title: "dropped by the kernel", class: `${number} wide`, text: (row) => whole(row.kernel), tone: (row) => (row.kernel ? "warn" : "") },
    { title: "lost", class: number, text: (row) => whole(row.lost), tone: (row) => (row.lost ? "warn" : "") },
    { title: "workers", class: "wide single", text: (row) => row.workers.map((each) => `${each.name} ${rate(each.rate)}`).join(", ") || UNKNOWN },
  ], { empty: "no stream" }),
  losses: new Table(find("losses"), "Losses", [
    { title: "place", text: (row) => row.place },
    { title: "of", text: (row) => row.of, hint: (row) => row.of },
    { title: "cause", make: () => html("span", { class: "tag" }), update: (node, row) => { say(node, spoken(row.what)); node.className = `tag ${row.kind}`; } },
    { title: "last 5 min", class: number, text: (row) => whole(row.recent), tone: (row) => (row.recent ? "bad" : "") },
    { title: "in all", class: `${number} medium`, text: (row) => whole(row.lost) },
    { title: "counted by", class: "medium", text: (row) => row.service },
  ], { empty: "nothing is known to be lost" }),
  journal: new Table(find("journal"), "Journal", [
    { title: "stream", text: (row) => row.stream },
    { title: "since", text: (row) => (row.since === null ? UNKNOWN : moment(row.since)) },
    { title: "until", class: "medium", text: (row) => (row.until === null ? UNKNOWN : clock(row.until)) },
    { title: "size", class: number, text: (row) => (row.limit ? `${bytes(row.bytes)} of ${bytes(row.limit)}` : bytes(row.bytes)) },
    { title: "state", text: (row) => (row.failing ? "can't write" : "writes"), tone: (row) => (row.failing ? "bad" : "") },
    { title: "owed to", text: (row) => row.owed.map((each) => `${each.collector} ${short(each.datagrams)}`).join(", ") + (row.all_owed > row.owed.length ? ` and ${row.all_owed - row.owed.length} more` : "") || "nobody" },
  ], { empty: "no stream is kept" }),
  nodes: new Table(find("nodes"), "Nodes", [
    { title: "node", text: (row) => row.name },
    { title: "state", ...word },
    { title: "heard", class: number, text: (row) => (row.silent === null ? "never" : row.silent ? `${row.silent.toFixed(1)} s ago` : "here") },
    { title: "behind", class: `${number} medium`, text: (row) => whole(row.behind), hint: () => "messages of it that are still to come" },
    { title: "collectors", class: number, text: (row) => whole(row.collectors) },
  ], { empty: "no node" }),
  services: new Table(find("services"), "Services", [
    { title: "service", text: (row) => row.name },
    { title: "state", ...word },
    { title: "up for", class: number, text: (row) => duration(lastAt - row.started) },
    { title: "memory", class: "medium", make: () => html("span"), update: memory },
    { title: "process", class: `${number} wide`, text: (row) => String(row.pid) },
  ], { empty: "no service has reported" }),
};

function tags(node, row) {
  const wanted = Object.entries(row.causes).map(([cause, count]) => `${spoken(cause)} ${short(count)}`);
  if (node.dataset.shown === wanted.join()) return;
  node.dataset.shown = wanted.join();
  node.replaceChildren(...wanted.map((text) => html("span", { class: "tag" }, text)));
}

function memory(node, row, cell) {
  if (row.memory === null) {
    say(node, UNKNOWN);
    cell.classList.add("unknown");
    return;
  }
  if (!node.firstChild) {
    node.append(html("span", { class: "fill", "aria-hidden": "true" }, html("i")), html("span"));
  }
  const part = row.ceiling ? row.memory / row.ceiling : 0;
  node.firstChild.firstChild.style.width = `${Math.round(100 * part)}%`;
  node.firstChild.classList.toggle("high", part > 0.8);
  say(node.lastChild, row.ceiling ? `${bytes(row.memory)} of ${bytes(row.ceiling)}` : bytes(row.memory));
}

function showTotals(totals, collectors, exporters, seconds) {
  const troubled = totals.troubled;
  const tiles = [
    ["received", rate(totals.received), ""],
    ["payload", totals.bytes === null ? UNKNOWN : `${bytes(totals.bytes)}/s`, ""],
    ["copies sent", rate(totals.sent), ""],
    [`lost in ${duration(seconds)}`, whole(totals.lost), totals.lost ? "bad" : ""],
    ["collectors", collectors ? (troubled ? `${whole(troubled)} of ${whole(collectors.all)} in trouble` : whole(collectors.all)) : UNKNOWN, troubled ? "bad" : ""],
    ["exporters", exporters ? (totals.untaken ? `${whole(exporters.all)}, ${whole(totals.untaken)} untaken` : whole(exporters.all)) : UNKNOWN, totals.untaken ? "warn" : ""],
  ];
  const list = find("totals");
  if (!list.firstChild) list.append(...tiles.map(([name]) => html("div", {}, html("dd"), html("dt", {}, name))));
  tiles.forEach(([name, text, tone], at) => {
    const cell = list.children[at].firstChild;
    say(list.children[at].lastChild, name);
    say(cell, text);
    cell.className = text === UNKNOWN ? "unknown" : tone;
  });
}

function show(view) {
  lastAt = view.at;
  if (version !== null && version !== view.version) return location.reload();
  version = view.version;
  const verdict = find("verdict");
  verdict.dataset.level = view.verdict.level;
  const balance = view.balanced === null ? "" : view.balanced ? ", the ledger is balanced" : ", the ledger is not balanced";
  say(find("verdict-text"), VERDICTS[view.verdict.level] + balance);
  const reasons = find("reasons");
  const said = view.verdict.reasons.join("\n");
  if (reasons.dataset.said !== said) {
    reasons.dataset.said = said;
    reasons.hidden = !said;
    reasons.replaceChildren(...view.verdict.reasons.map((reason) => html("li", {}, reason)));
  }
  document.title = view.verdict.level === "ok" ? "fanwire" : `${VERDICTS[view.verdict.level]} – fanwire`;
  say(find("version"), `version ${view.version}`);
  showTotals(view.totals, view.collectors, view.exporters, view.recent_seconds);
  for (const kind of ["collectors", "exporters", "streams"]) {
    const table = view[kind];
    const rows = kind === "streams" ? table : table && table.rows;
    for (const row of rows || []) {
      row.key = row.name;
      if (kind === "collectors" && row.since !== null && !["ok", UNKNOWN].includes(row.health)) row.lasts = `for ${duration(view.at - row.since)}`;
    }
    pasts[kind].note(rows || [], view.at);
    tables[kind].show(rows);
    if (kind !== "streams") say(tables[kind].title, table ? counted(table) : "");
  }
  view.losses.forEach((row) => (row.key = [row.place, row.service, row.of, row.what].join("\n")));
  tables.losses.show(view.losses);
  say(tables.losses.title, view.losses.length < view.all_losses ? `${whole(view.losses.length)} of ${whole(view.all_losses)}, the most recent` : "by place on the way");
  find("journal").hidden = view.journal.length === 0;
  view.journal.forEach((row) => (row.key = row.stream));
  tables.journal.show(view.journal);
  find("nodes").hidden = view.nodes === null;
  if (view.nodes) showNodes(view.nodes);
  view.services.forEach((row) => {
    row.key = row.name;
    row.health = row.silent ? "silent" : "ok";
    row.healthText = row.silent ? `silent since ${clock(row.heard)}` : "reports";
  });
  tables.services.show(view.services);
  flow.draw(view.flow);
}

const NODE_WORDS = { live: "ok", joining: "slow", silent: "silent" };

function showNodes(nodes) {
  for (const row of nodes.rows) {
    row.key = row.name;
    row.health = NODE_WORDS[row.state] || UNKNOWN;
    row.healthText = row.state;
  }
  tables.nodes.show(nodes.rows);
  say(tables.nodes.title, nodes.majority ? "they share out the collectors" : "this one hears neither most of them nor JetStream");
}

function counted(table) {
  if (table.rows.length < table.found) return `${whole(table.rows.length)} of ${whole(table.found)} shown; sort or filter for others`;
  return table.found < table.all ? `${whole(table.found)} of ${whole(table.all)}` : whole(table.all);
}

function connect() {
  if (source) source.close();
  source = new EventSource(`/events?${new URLSearchParams(state)}`);
  source.addEventListener("open", () => document.body.classList.replace("broken", "live") || document.body.classList.add("live"));
  source.addEventListener("message", (event) => {
    const view = JSON.parse(event.data);
    document.body.classList.remove("broken");
    document.body.classList.add("live");
    show(view);
    say(find("link-text"), `live, ${clock(view.at)}`);
  });
  source.addEventListener("error", () => {
    document.body.classList.remove("live");
    document.body.classList.add("broken");
    say(find("link-text"), lastAt ? `no connection; this is how it was at ${clock(lastAt)}` : "no connection yet; trying again");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
  });
}

/** Change what is shown, by the page's address: that makes it a link. */
function go(change) {
  const query = new URLSearchParams({ ...state, ...change });
  location.hash = `#/?${query}`;
}

function route() {
  const [, path, query] = /^#?\/?([^?]*)\??(.*)$/.exec(location.hash);
  const [kind, name] = path.split("/");
  const overview = find("overview");
  if (["collector", "exporter", "stream"].includes(kind) && name !== undefined) {
    overview.hidden = true;
    find("detail").hidden = false;
    detail.open(kind, decodeURIComponent(name));
    scrollTo(0, 0);
    return;
  }
  detail.close();
  find("detail").hidden = true;
  overview.hidden = false;
  const before = JSON.stringify(state);
  for (const [key, value] of new URLSearchParams(query)) if (key in state) state[key] = value;
  tables.collectors.sortedBy(state.collectors);
  tables.exporters.sortedBy(state.exporters);
  if (find("filter").value !== state.text) find("filter").value = state.text;
  if (before !== JSON.stringify(state) || !source) connect();
}

let typing = 0;
find("filter").addEventListener("input", (event) => {
  clearTimeout(typing);
  typing = setTimeout(() => go({ text: event.target.value }), 300);
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && !(event.target instanceof HTMLInputElement) && !find("overview").hidden) {
    event.preventDefault();
    find("filter").focus();
  } else if (event.key === "Escape" && find("overview").hidden) location.hash = "#/";
});
// A page that nobody sees takes no events: a browser has six connections for all pages of an address.
let asleep = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(asleep);
  if (document.hidden) {
    asleep = setTimeout(() => {
      source.close();
      source = null;
    }, 20000);
  } else if (!source) connect();
});
addEventListener("hashchange", route);
adminForm(find("admin"), () => detail.showChanges());
route();
if (!source) connect();

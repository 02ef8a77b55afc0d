// The page of one collector, exporter or stream: facts, the last 15 minutes, and one datagram.

import { allowed, changeButton } from "./admin.js";
import { UNKNOWN, area, bytes, clock, duration, html, line, rate, say, share, spoken, svg, whole } from "./drawing.js";

const STEPS = 180;

export class Detail {
  constructor(place) {
    this.place = place;
    this.kind = this.name = null;
    this.timer = 0;
  }

  open(kind, name) {
    if (kind === this.kind && name === this.name) return;
    this.close();
    this.kind = kind;
    this.name = name;
    this.title = html("span", {}, name);
    this.word = html("span", { class: "word" });
    this.facts = html("dl", { class: "facts" });
    this.chart = svg("svg", { role: "img" });
    this.button = html("button", { type: "button", class: "act" }, "Show me one datagram");
    this.datagram = html("div", { "aria-live": "polite" });
    this.button.addEventListener("click", () => this.sample());
    this.changes = html("section", { hidden: true });
    this.row = null;
    this.showChanges();
    this.place.replaceChildren(
      html("a", { class: "back", href: "#/" }, "← all"),
      html("section", {}, html("h1", { class: "detail-title" }, this.title, this.word), this.facts),
      html("section", {}, html("h2", {}, "Last 15 minutes ", html("small", {}, "datagrams a second")), html("div", { class: "chart" }, this.chart)),
      html("section", {}, html("h2", {}, "One datagram ", html("small", {}, "the next that comes, five seconds at most")), html("div", { class: "datagram" }, this.button, this.datagram)),
      this.changes,
    );
    this.load();
    this.timer = setInterval(() => this.load(), 5000);
  }

  /** Buttons for an admin: a collector can be withheld, released and removed, and a probe sent to a stream. */
  showChanges() {
    const { kind, name } = this;
    if (kind === null) return;
    this.changes.hidden = !allowed || kind === "exporter";
    const withheld = () => this.row && this.row.order;
    this.withholding = null;
    if (this.changes.hidden) this.changes.replaceChildren();
    else if (kind === "collector") {
      this.withholding = changeButton(
        () => (withheld() ? "Release its copies" : "Withhold its copies"),
        "Telling its sender …",
        () => (withheld() ? "release" : "withhold"),
        () => {
          if (withheld()) return { name };
          const reason = prompt(`Withhold the copies of ${name}? It stays signed up, and gets none until they are released. The reason, if you like:`);
          return reason === null ? "" : { name, reason };
        },
        () => this.load(),
      );
      this.changes.replaceChildren(
        html("h2", {}, "Withhold ", html("small", {}, "it stays signed up, and gets no copies until they are released")),
        this.withholding,
        html("h2", {}, "Remove ", html("small", {}, "it gets no more copies until it signs up again")),
        changeButton(() => "Remove this collector", "Removing it …", () => "remove", () => {
          if (!this.row) return "it is not there now";
          return confirm(`Remove the collector ${name}? It gets no more copies until it signs up again.`) ? { name, generation: this.row.generation } : "";
        }),
      );
    } else
      this.changes.replaceChildren(
        html("h2", {}, "Probe ", html("small", {}, "a marked datagram to this stream; its other collectors get a copy too")),
        changeButton(() => "Send a probe", "Waiting for its copy …", () => "probe", () => ({ stream: name })),
      );
  }

  close() {
    clearInterval(this.timer);
    this.kind = this.name = null;
    this.place.replaceChildren();
  }

  async load() {
    const { kind, name } = this;
    try {
      const answer = await fetch(`/api/${kind}s/${encodeURIComponent(name)}`);
      const found = await answer.json();
      if (kind === this.kind && name === this.name) this.show(found);
    } catch {
      // The header says that the connection is broken; the last state stays.
    }
  }

  show({ row, rates, losses }) {
    const now = Date.now() / 1000;
    this.row = row;
    const facts = row === null ? [["state", this.kind === "exporter" ? "has sent nothing in the last seconds" : "not there now"]] : { collector: collectorFacts, exporter: exporterFacts, stream: streamFacts }[this.kind](row);
    this.facts.replaceChildren(...facts.flatMap(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, String(value)))));
    this.word.hidden = !row || !row.health;
    if (row && row.health) {
      this.word.dataset.word = row.health;
      say(this.word, row.since === null ? row.health : `${row.health} for ${duration(now - row.since)}, since ${clock(row.since)}`);
    }
    if (this.withholding) this.withholding.refresh();
    drawChart(this.chart, rates, losses);
  }

  async sample() {
    this.button.disabled = true;
    say(this.button, "Waiting for the next one …");
    let found;
    try {
      found = await (await fetch(`/api/datagram?${new URLSearchParams({ [this.kind]: this.name })}`)).json();
    } catch {
      found = { error: "no answer: the connection is broken" };
    }
    this.button.disabled = false;
    say(this.button, "Show me one datagram");
    if (found.error) {
      this.datagram.replaceChildren(html("p", {}, found.error));
      return;
    }
    const head = [
      ["from", `${found.address} port ${found.port}`],
      ["stream", found.stream],
      ["received", new Date(found.received * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3 })],
      ["length", `${whole(found.length)} bytes`],
      ["worker", found.worker],
      ...found.header,
    ];
    this.datagram.replaceChildren(
      html("dl", { class: "facts" }, ...head.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value)))),
      html("pre", { tabindex: "0", role: "region", "aria-label": "Payload as hexadecimal and text" }, dump(found.hex)),
    );
  }
}

function collectorFacts(row) {
  const causes = Object.entries(row.causes).map(([cause, count]) => `${whole(count)} ${spoken(cause)}`);
  return [
    ["address", `${row.address} port ${row.port}`],
    ["streams", row.streams.join(", ")],
    ["source of copies", row.source],
    ["sent now", rate(row.rate)],
    ["bytes now", row.bytes === null ? UNKNOWN : `${bytes(row.bytes)}/s`],
    ["sent", whole(row.sent)],
    ...(row.by_kernel ? [["sent by the kernel itself", whole(row.by_kernel)]] : []),
    ...(row.templates ? [["templates sent besides", whole(row.templates)]] : []),
    ["lost", whole(row.lost)],
    ["lost in the last 5 min", whole(row.recent)],
    ["lost by cause", row.lost === null ? UNKNOWN : causes.join(", ") || "none"],
    ["waiting", whole(row.held)],
    ...row.owed.map((each) => [`still to get of ${each.stream}`, `${whole(each.datagrams)}, received since ${clock(each.since)}${each.level_in === null ? "" : `; level in ${duration(each.level_in)}`}`]),
    ["filtered, sampled or shared out", whole(row.kept_back)],
    ...(row.order || row.withheld ? [["withheld by an admin", whole(row.withheld)]] : []),
    ...(row.order ? [["withheld since", order(row.order)]] : []),
    ["from", row.from.join(", ") || "every exporter"],
    ...(row.sample > 1 ? [["sample", `1 in ${row.sample}`]] : []),
    ...(row.group ? [["group", row.group]] : []),
    ["counted by", row.sender || UNKNOWN],
  ];
}

function order({ by, since, reason }) {
  const when = new Date(since * 1000).toLocaleString("en-GB");
  return `${when}${by ? `, by ${by}` : ""}${reason ? `: ${reason}` : ""}`;
}

function exporterFacts(row) {
  return [
    ["sends now", rate(row.rate)],
    ["bytes now", `${bytes(row.bytes)}/s`],
    ["share of its streams", share(row.share)],
    ["streams", row.streams.join(", ")],
    ["workers", row.workers.join(", ")],
    ["collectors", row.takers ? whole(row.takers) : "nobody takes what it sends"],
    ["gaps in its numbers", row.missed === null ? "not read: no protocol is set" : whole(row.missed)],
  ];
}

function streamFacts(row) {
  return [
    ["comes in now", rate(row.rate)],
    ["bytes now", row.bytes === null ? UNKNOWN : `${bytes(row.bytes)}/s`],
    ["received", whole(row.received)],
    ["collectors", row.takers ? whole(row.takers) : "nobody takes it"],
    ["exporters", whole(row.exporters)],
    ["not taken by anybody", whole(row.untaken)],
    ["dropped by the kernel", whole(row.kernel)],
    ["lost", whole(row.lost)],
    ["lost by cause", row.lost === null ? UNKNOWN : Object.entries(row.causes).map(([cause, count]) => `${whole(count)} ${spoken(cause)}`).join(", ") || "none"],
    ["workers", row.workers.map((each) => `${each.name} ${rate(each.rate)}`).join(", ") || UNKNOWN],
  ];
}

function drawChart(chart, rates, losses) {
  const width = Math.max(280, chart.clientWidth - 52);
  const height = 150;
  const most = ceiling(Math.max(1, ...[...rates, ...losses].filter((value) => value !== null)));
  chart.setAttribute("viewBox", `-52 -8 ${width + 54} 190`);
  chart.setAttribute("aria-label", rates.length ? `Rate now ${rate(rates.at(-1))}, at most ${rate(Math.max(...rates))}` : "No past yet");
  const grid = [0, 0.5, 1].flatMap((part) => [
    svg("line", { class: "grid", x1: 0, x2: width, y1: height * (1 - part), y2: height * (1 - part) }),
    label(-6, height * (1 - part) + 4, rate(most * part), "end"),
  ]);
  const times = [15, 10, 5, 0].map((minutes) => label(width * (1 - minutes / 15), height + 20, minutes ? `−${minutes} min` : "now", minutes === 15 ? "start" : minutes ? "middle" : "end"));
  chart.replaceChildren(
    ...grid,
    svg("path", { class: "area", d: area(rates, width, height, most, STEPS) }),
    svg("path", { class: "edge", d: line(rates, width, height, most, STEPS) }),
    ...(losses.some((value) => value > 0) ? [svg("path", { class: "losing", d: area(losses, width, height, most, STEPS) })] : []),
    ...times,
  );
}

/** The next larger of 1, 2, 5, 10, 20, 50 and so on. */
function ceiling(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * size).find((step) => step >= value);
}

const label = (x, y, text, anchor) => svg("text", { x, y, "text-anchor": anchor }, text);

/** Sixteen bytes a line, as hexadecimal and as text. */
function dump(hex) {
  const lines = [];
  for (let at = 0; at < hex.length; at += 32) {
    const pairs = hex.slice(at, at + 32).match(/../g);
    const text = pairs.map((pair) => {
      const code = parseInt(pair, 16);
      return code >= 32 && code < 127 ? String.fromCharCode(code) : "·";
    });
    lines.push(`${(at / 2).toString(16).padStart(4, "0")}  ${pairs.join(" ").padEnd(47)}  ${text.join("")}`);
  }
  return lines.join("\n");
}

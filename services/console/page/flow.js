// The diagram: exporters, streams, collectors; widths are rates, and what is lost leaves at its hop.

import { rate, say, spoken, svg } from "./drawing.js";

const THICKNESS = 210;
const BAR = 9;
const SLOT = 30;
const GAP = 8;
const TOP = 24;

export class Flow {
  constructor(place) {
    this.place = place;
    this.root = svg("svg", { role: "group", "aria-label": "Flow of datagrams from exporters by streams to collectors; the tables below have the same numbers" });
    this.bands = svg("g");
    this.nodes = svg("g");
    this.root.append(this.bands, this.nodes);
    place.append(this.root);
    this.kept = new Map();
    this.flow = null;
    this.width = place.clientWidth; // read while it is drawn, it would have the page laid out twice
    new ResizeObserver(() => {
      this.width = place.clientWidth;
      if (this.flow) this.draw(this.flow);
    }).observe(place);
  }

  draw(flow) {
    this.flow = flow;
    const width = Math.max(300, this.width - 20);
    const narrow = width < 560;
    const labels = narrow ? width * 0.27 : Math.min(250, width * 0.22);
    const left = labels;
    const middle = width / 2 - BAR / 2;
    const right = width - labels - BAR;
    const named = (name) => (name === null ? "(others)" : name);
    const incoming = flow.exporters.map((each) => ({ ...each, key: named(each.name), value: each.rate || 0 }));
    const streams = flow.streams.map((each) => {
      const out = flow.copies.filter((copy) => copy.from === each.name).reduce((sum, copy) => sum + copy.rate, 0);
      return { ...each, key: each.name, out, value: Math.max(each.rate || 0, out) };
    });
    const outgoing = flow.collectors.map((each) => ({ ...each, key: named(each.name), value: (each.rate || 0) + (each.losing || 0) }));
    const most = Math.max(1e-9, ...[incoming, streams, outgoing].map((column) => column.reduce((sum, each) => sum + each.value, 0)));
    const scale = THICKNESS / most;
    let height = 0;
    for (const column of [incoming, streams, outgoing]) {
      let y = TOP;
      const above = column === streams ? 18 : 0;
      for (const node of column) {
        node.height = Math.max(3, node.value * scale);
        node.slot = Math.max(SLOT, node.height);
        y += above;
        node.y = y + (node.slot - node.height) / 2;
        y += node.slot + GAP;
      }
      column.bottom = y;
      height = Math.max(height, y);
    }
    for (const column of [incoming, streams, outgoing]) {
      const shift = (height - column.bottom) / 2;
      for (const node of column) node.y += shift;
    }
    this.root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.root.setAttribute("height", height);
    this.drawBands(flow, { incoming, streams, outgoing }, { left: left + BAR, middle, right }, scale);
    this.drawNodes({ incoming, streams, outgoing }, { left, middle, right }, { labels, narrow, scale, width });
  }

  drawBands(flow, columns, at, scale) {
    const by = (column) => new Map(column.map((node) => [node.key, { ...node, used: 0, taken: 0 }]));
    const [incoming, streams, outgoing] = [columns.incoming, columns.streams, columns.outgoing].map(by);
    const used = new Set();
    const put = (key, from, to, x0, x1, value, tone) => {
      if (!from || !to) return;
      const width = Math.max(1.2, value * scale);
      const y0 = from.y + from.used + Math.min(width, from.height) / 2;
      const y1 = to.y + to.taken + Math.min(width, to.height) / 2;
      from.used += value * scale;
      to.taken += value * scale;
      const bend = (x0 + x1) / 2;
      const band = this.keep(key, this.bands, () => svg("path"));
      band.setAttribute("class", `band ${value > 0 ? tone : "none"}`);
      band.setAttribute("d", `M${x0} ${y0.toFixed(1)}C${bend} ${y0.toFixed(1)} ${bend} ${y1.toFixed(1)} ${x1} ${y1.toFixed(1)}`);
      band.setAttribute("stroke-width", width.toFixed(1));
      used.add(key);
    };
    const named = (name) => (name === null ? "(others)" : name);
    for (const link of flow.links) {
      put(`in ${named(link.from)} ${link.to}`, incoming.get(named(link.from)), streams.get(link.to), at.left, at.middle, link.rate || 0, "");
    }
    for (const copy of flow.copies) {
      const end = outgoing.get(named(copy.to));
      const bad = end && !["ok", "unknown", "slow", "withheld", "elsewhere"].includes(end.health);
      put(`out ${copy.from} ${named(copy.to)}`, streams.get(copy.from), end, at.middle + BAR, at.right, copy.rate || 0, bad ? "bad" : "");
    }
    this.drop(this.bands, used);
  }

  drawNodes(columns, at, { labels, narrow, scale, width }) {
    const used = new Set();
    const text = (key, x, y, content, kind, anchor, wider = 1) => {
      const node = this.keep(key, this.nodes, () => svg("text"));
      node.setAttribute("x", x);
      node.setAttribute("y", y.toFixed(1));
      node.setAttribute("text-anchor", anchor);
      node.setAttribute("class", kind);
      const room = Math.floor((wider * labels - 12) / (narrow ? 6.3 : 6.9));
      say(node, content.length > room ? `${content.slice(0, Math.max(3, room - 1))}…` : content);
      used.add(key);
    };
    const bar = (key, node, x, tone) => {
      const shape = this.keep(key, this.nodes, () => svg("rect", { rx: 2 }));
      for (const [name, value] of [["x", x], ["y", node.y.toFixed(1)], ["width", BAR], ["height", node.height.toFixed(1)]]) shape.setAttribute(name, value);
      shape.setAttribute("class", `node ${tone}`);
      used.add(key);
    };
    const leak = (key, x, y, value, kind) => {
      const path = this.keep(key, this.nodes, () => svg("path"));
      const thick = Math.min(9, Math.max(2, value * scale));
      path.setAttribute("class", `leak ${kind}`);
      path.setAttribute("d", `M${x} ${y.toFixed(1)}h3q9 0 9 9v11`);
      path.setAttribute("stroke-width", thick.toFixed(1));
      used.add(key);
    };
    text("head in", at.left + BAR, 12, "exporters", "head", "end");
    text("head stream", at.middle + BAR / 2, 12, "streams", "head", "middle");
    text("head out", at.right, 12, "collectors", "head", "start");
    for (const node of columns.incoming) {
      const middle = node.y + node.height / 2;
      bar(`bar in ${node.key}`, node, at.left, node.value ? "" : "idle");
      text(`name in ${node.key}`, at.left - 7, middle - 1, node.name === null ? "others" : node.name, "", "end");
      text(`rate in ${node.key}`, at.left - 7, middle + 12, rate(node.rate), "rate", "end");
    }
    if (!columns.incoming.length) text("none in", at.left - 7, 60, "unknown", "rate", "end");
    for (const node of columns.streams) {
      bar(`bar stream ${node.key}`, node, at.middle, node.takers ? "" : "idle");
      const label = `${node.name}  ${rate(node.rate)}${node.takers ? "" : narrow ? " untaken" : ", nobody takes it"}`;
      text(`name stream ${node.key}`, at.middle + BAR / 2, node.y - 5, label, "", "middle", 1.35);
      if (node.losing > 0) {
        leak(`leak stream ${node.key}`, at.middle + BAR, node.y + node.height, node.losing, "overflow");
        text(`lost stream ${node.key}`, at.middle + BAR + 20, node.y + node.height + 15, `−${rate(node.losing)} ${narrow ? "" : spoken(node.causes[0] || "lost")}`, "lost", "start");
      }
    }
    for (const node of columns.outgoing) {
      const middle = node.y + node.height / 2;
      const bad = !["ok", "unknown", "slow", "withheld", "elsewhere"].includes(node.health);
      bar(`bar out ${node.key}`, node, at.right, bad ? "bad" : node.value ? "" : "idle");
      const x = at.right + BAR + (node.losing > 0 ? 24 : 7);
      text(`name out ${node.key}`, x, middle - 1, node.name === null ? `${node.count} others` : node.name, "", "start");
      if (node.losing > 0) {
        leak(`leak out ${node.key}`, at.right + BAR, middle - 6, node.losing, node.kinds[0] || "unreachable");
        text(`rate out ${node.key}`, x, middle + 12, `−${rate(node.losing)} ${narrow ? "" : spoken(node.causes[0] || "lost")}`, "lost", "start");
      } else {
        text(`rate out ${node.key}`, x, middle + 12, bad || node.health === "withheld" ? node.health : rate(node.rate), bad ? "lost" : "rate", "start");
      }
    }
    if (!columns.outgoing.length) text("none out", at.right + BAR + 7, 60, "nobody", "rate", "start");
    this.drop(this.nodes, used);
    this.root.setAttribute("width", width);
  }

  keep(key, parent, create) {
    const id = `${parent === this.bands ? "b" : "n"} ${key}`;
    let element = this.kept.get(id);
    if (!element) {
      element = create();
      this.kept.set(id, element);
      parent.append(element);
    }
    return element;
  }

  drop(parent, used) {
    const mark = parent === this.bands ? "b " : "n ";
    for (const [id, element] of this.kept) {
      if (id.startsWith(mark) && !used.has(id.slice(2))) {
        element.remove();
        this.kept.delete(id);
      }
    }
  }
}

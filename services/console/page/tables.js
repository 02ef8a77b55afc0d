// Tables whose rows stay where they are while their numbers change.

import { UNKNOWN, STEPS, drawSpark, html, say, spark } from "./drawing.js";

/**
 * A column: its title, what it shows, and more. `text` returns a text, `node` an element that is made once and
 * brought up to date by `update(element, row)`; `sort` is the word by which the server sorts it.
 */
export class Table {
  constructor(section, caption, columns, { sorted = null, onSort = null, empty = "none" } = {}) {
    this.columns = columns;
    this.rows = new Map();
    this.pasts = new Map();
    this.head = html("tr");
    this.body = html("tbody");
    this.onSort = onSort;
    for (const column of columns) {
      const cell = html("th", { scope: "col", class: column.class });
      if (column.sort && onSort) {
        const button = html("button", { type: "button" }, column.title);
        button.addEventListener("click", () => onSort(column.sort));
        cell.append(button);
      } else cell.append(column.title);
      column.sort && (cell.dataset.sort = column.sort);
      this.head.append(cell);
    }
    this.table = html("table", {}, html("caption", {}, caption), html("thead", {}, this.head), this.body);
    this.scroll = html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${caption}, a table` }, this.table);
    this.none = html("p", { class: "empty", hidden: true });
    this.empty = empty;
    this.title = section.querySelector("h2 small");
    section.append(this.scroll, this.none);
    this.sortedBy(sorted);
  }

  sortedBy(word) {
    for (const cell of this.head.children) {
      if (cell.dataset.sort && cell.dataset.sort === word) cell.setAttribute("aria-sort", "descending");
      else cell.removeAttribute("aria-sort");
    }
  }

  /** Show rows, each with a `key`; null: not known. */
  show(rows, why = "unknown: nothing has reported yet") {
    const known = rows !== null && rows !== undefined;
    this.scroll.hidden = !known || rows.length === 0;
    this.none.hidden = !this.scroll.hidden;
    say(this.none, known ? this.empty : why);
    const wanted = new Map((rows || []).map((row) => [row.key, row]));
    for (const [key, shown] of this.rows) {
      if (!wanted.has(key)) {
        shown.element.remove();
        this.rows.delete(key);
      }
    }
    let before = null;
    for (const [key, row] of wanted) {
      let shown = this.rows.get(key);
      if (!shown) {
        shown = this.make();
        this.rows.set(key, shown);
      }
      const place = before ? before.nextSibling : this.body.firstChild;
      if (place !== shown.element) this.body.insertBefore(shown.element, place);
      before = shown.element;
      this.update(shown, row);
    }
  }

  make() {
    const cells = this.columns.map((column, at) => {
      const cell = html(at === 0 ? "th" : "td", { class: column.class, scope: at === 0 ? "row" : null });
      const node = column.make ? column.make() : null;
      if (node) cell.append(node.element || node);
      return { cell, node };
    });
    return { element: html("tr", {}, ...cells.map(({ cell }) => cell)), cells };
  }

  update(shown, row) {
    this.columns.forEach((column, at) => {
      const { cell, node } = shown.cells[at];
      if (column.update) column.update(node, row, cell);
      else {
        const text = column.text(row);
        say(cell, text);
        cell.classList.toggle("unknown", text === UNKNOWN);
        if (column.tone) {
          const tone = column.tone(row);
          cell.classList.toggle("bad", tone === "bad");
          cell.classList.toggle("warn", tone === "warn");
        }
        if (column.hint) cell.title = column.hint(row);
      }
    });
  }

  /** A column with the line of the last five minutes, which this table keeps for each row. */
  static past(keep) {
    return {
      title: "last 5 min",
      class: "medium",
      make: spark,
      update: (node, row) => drawSpark(node, keep.get(row.key) || []),
    };
  }
}

/** The rates of rows over the last five minutes: what the server tells at first, and then what comes. */
export class Pasts {
  constructor() {
    this.values = new Map();
    this.stepAt = 0;
  }

  get(key) {
    return this.values.get(key);
  }

  note(rows, at) {
    const step = at - this.stepAt >= 4.9;
    if (step) this.stepAt = at;
    const kept = new Map();
    for (const row of rows) {
      const values = row.past ? [...row.past, row.rate] : this.values.get(row.key) || [row.rate];
      if (!row.past) {
        if (step) values.push(row.rate);
        else values[values.length - 1] = row.rate;
      }
      kept.set(row.key, values.slice(-STEPS));
    }
    this.values = kept;
  }
}

/** A link to the page of a collector or an exporter. */
export function link(kind) {
  return {
    make: () => html("a"),
    update: (node, row, cell) => {
      say(node, row.name);
      cell.title = row.name;
      const target = `#/${kind}/${encodeURIComponent(row.name)}`;
      if (node.getAttribute("href") !== target) node.setAttribute("href", target);
    },
  };
}

/** A word of health with its mark. */
export const word = {
  make: () => html("span", { class: "word" }, html("span"), html("span", { class: "medium" })),
  update: (node, row) => {
    node.dataset.word = row.health;
    say(node.firstChild, row.healthText || row.health);
    say(node.lastChild, row.lasts || "");
  },
};

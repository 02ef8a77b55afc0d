// Elements, numbers and lines. Text is only ever set as text: names come from the network.

const SVG = "http://www.w3.org/2000/svg";

function make(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const html = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

/** Set a text, and touch the document only where it has changed. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const UNKNOWN = "unknown";

const figures = (value) => value.toFixed(value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2);

/** Three figures and a letter: 1234567 is "1.23 M". */
export function short(value) {
  if (value === null || value === undefined) return UNKNOWN;
  for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= 0.9995 * size) return `${figures(value / size)} ${letter}`;
  }
  return Number.isInteger(value) ? String(value) : value >= 9.95 ? String(Math.round(value)) : value.toFixed(1);
}

export const whole = (value) => (value === null || value === undefined ? UNKNOWN : value.toLocaleString("en-US"));
export const rate = (value) => (value === null || value === undefined ? UNKNOWN : `${short(value)}/s`.replace(" /s", "/s"));
export const bytes = (value) => (value === null || value === undefined ? UNKNOWN : `${short(value)}${value < 1000 ? " " : ""}B`);
export const share = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
/** A cause in words: "not_connected" is "not connected". */
export const spoken = (cause) => cause.replaceAll("_", " ");
export const moment = (seconds) => new Date(seconds * 1000).toLocaleString("en-GB");
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

/** "5 s", "12 min", "3 h", "2 d". */
export function duration(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.max(0, Math.floor(seconds))} s`;
}

/** The path of a line through values, with gaps where one is null. */
export function line(values, width, height, most, steps = values.length) {
  let path = "";
  let pen = "M";
  const first = steps - values.length;
  values.forEach((value, at) => {
    if (value === null) {
      pen = "M";
      return;
    }
    const x = steps > 1 ? ((first + at) / (steps - 1)) * width : width;
    path += `${pen}${x.toFixed(1)} ${(height - (value / most) * height).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

/** The same as an area down to the ground. */
export function area(values, width, height, most, steps = values.length) {
  const runs = [];
  values.forEach((value, at) => {
    if (value === null) return;
    if (at === 0 || values[at - 1] === null) runs.push([]);
    runs.at(-1).push([steps > 1 ? ((steps - values.length + at) / (steps - 1)) * width : width, value]);
  });
  return runs
    .map((run) => {
      const top = run.map(([x, value]) => `${x.toFixed(1)} ${(height - (value / most) * height).toFixed(1)}`);
      return `M${run[0][0].toFixed(1)} ${height}L${top.join("L")}L${run.at(-1)[0].toFixed(1)} ${height}Z`;
    })
    .join("");
}

export const STEPS = 60;

/** A small line of the last five minutes, for a row. */
export function spark() {
  const fill = svg("path", { class: "area" });
  const edge = svg("path");
  return { element: svg("svg", { class: "spark", viewBox: "0 0 108 22", preserveAspectRatio: "none", "aria-hidden": "true" }, fill, edge), fill, edge };
}

export function drawSpark(node, values) {
  const said = values.join();
  if (node.said === said) return;
  node.said = said;
  const { fill, edge } = node;
  const most = Math.max(1, ...values.filter((value) => value !== null)) * 1.08;
  fill.setAttribute("d", area(values, 108, 22, most, STEPS));
  edge.setAttribute("d", line(values, 108, 22, most, STEPS));
}

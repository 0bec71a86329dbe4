"use strict";
// Draws the charts of the page from the JSON beside it. Only text nodes and SVG attributes are made from data.

const DATA = JSON.parse(document.getElementById("report-data").textContent);
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const COLORS = 7;
const SMOOTHING = 25;
const MARGIN = { top: 8, right: 10, bottom: 24, left: 50 };
const SVG = "http://www.w3.org/2000/svg";

const shownStages = new Set(DATA.stages.flatMap((stage, index) => (stage.shown ? [index] : [])));

function make(name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return element;
}

function html(name, classes = "", text = "") {
  const element = document.createElement(name);
  if (classes) element.className = classes;
  if (text) element.textContent = text;
  return element;
}

function format(value) {
  if (value === null || value === undefined) return "no number";
  const size = Math.abs(value);
  if (size === 0) return "0"; // of minus zero too
  if (size < 1e-3 || size >= 1e7) return String(Number(value.toPrecision(3)).toExponential()).replace("e+", "e").replace(/^-/, "−");
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 4;
  return value.toLocaleString("en", { maximumFractionDigits: digits }).replace("-", "−");
}

// Ticks at 1, 2 or 5 times a power of ten.
function linearTicks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((width) => width >= raw * 0.999);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) ticks.push(index * step);
  return ticks;
}

function logTicks(low, high, count) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  if (last - first < 1) return linearTicks(low, high, count).filter((value) => value > 0);
  const every = Math.ceil((last - first + 1) / (count + 1));
  const ticks = [];
  for (let power = first; power <= last; power += every) ticks.push(10 ** power);
  return ticks;
}

function scale(low, high, start, end, logarithmic) {
  const turn = logarithmic ? Math.log : (value) => value;
  const from = turn(low), span = turn(high) - from;
  return (value) => start + ((turn(value) - from) / span) * (end - start);
}

function bounds(values, zero) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return null;
  if (zero) low = Math.min(0, low);
  if (low === high) {
    const room = Math.abs(low) * 0.1;
    return room === 0 ? [0, 1] : [low - room, high + room];
  }
  return [low, high];
}

function colorOf(series) {
  return "s" + ((series.stage ?? series.color) % COLORS);
}

class Chart {
  constructor(figure, data) {
    this.data = data;
    this.plot = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.title = figure.querySelector("h4 span").textContent;
    this.tip = html("div", "tip");
    this.tip.hidden = true;
    this.tip.setAttribute("role", "status");
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "group");
    this.plot.setAttribute("aria-label", `${this.title}: chart, arrow keys read it`);
    this.plot.addEventListener("pointermove", (event) => this.point(event.clientX - this.plot.getBoundingClientRect().left));
    this.plot.addEventListener("pointerleave", () => this.unpoint());
    this.plot.addEventListener("blur", () => this.unpoint());
    this.plot.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  series() {
    return this.data.series.filter((each) => each.stage === undefined || shownStages.has(each.stage));
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (width === 0) return; // folded away
    this.plot.replaceChildren(this.tip);
    this.svg = make("svg", { width, height, "aria-hidden": "true" });
    this.plot.append(this.svg);
    this.left = MARGIN.left;
    this.right = width - MARGIN.right;
    this.bottom = height - MARGIN.bottom;
    this.unpoint();
    if (this.data.kind === "bars") this.drawBars();
    else this.drawLines();
  }

  axes(x, y, xTicks, yTicks) {
    for (const value of yTicks) {
      this.svg.append(make("line", { class: "grid", x1: this.left, x2: this.right, y1: y(value), y2: y(value) }));
      this.svg.append(make("text", { class: "axis", x: this.left - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
    }
    const free = this.data.kind === "bars" ? -Infinity : this.nameOfX() + 18; // values of bars have the unit of the title
    for (const value of xTicks.filter((value) => x(value) > free)) {
      const label = make("text", { class: "axis", y: this.bottom + 16, "text-anchor": "middle" }, format(value));
      this.svg.append(label);
      label.setAttribute("x", Math.min(x(value), this.right + MARGIN.right - label.getComputedTextLength() / 2));
    }
  }

  nameOfX() { // left of the axis, or from the edge of the card on; gives where it ends, at least the axis' beginning
    const name = make("text", { class: "axis", y: this.bottom + 16, "text-anchor": "end" }, this.data.x_name);
    this.svg.append(name);
    const end = Math.max(this.left - 6, name.getComputedTextLength());
    name.setAttribute("x", end);
    return Math.max(this.left, end);
  }

  drawLines() {
    const visible = this.series();
    const xs = bounds(visible.flatMap((each) => each.x), false);
    const ys = bounds(visible.flatMap((each) => [...each.y, ...(each.low ?? []), ...(each.high ?? [])]), this.data.zero);
    this.drawLegend(visible);
    if (xs === null || ys === null) {
      const text = { class: "empty", x: (this.left + this.right) / 2, y: this.bottom / 2, "text-anchor": "middle" };
      this.svg.append(make("text", text, "nothing in the stages that are shown"));
      this.xs = null;
      return;
    }
    const logarithmic = this.data.log && ys[0] > 0;
    const x = scale(xs[0], xs[1], this.left, this.right, false);
    const y = scale(ys[0], ys[1], this.bottom, MARGIN.top, logarithmic);
    const yTicks = (logarithmic ? logTicks : linearTicks)(ys[0], ys[1], 4).filter((value) => !this.data.whole || Number.isInteger(value));
    this.axes(x, y, linearTicks(xs[0], xs[1], Math.max(2, (this.right - this.left) / 60)), yTicks);
    for (const each of visible) this.svg.append(this.curve(each, x, y, logarithmic));
    this.cursor = make("line", { class: "cursor", y1: MARGIN.top, y2: this.bottom, visibility: "hidden" });
    this.svg.append(this.cursor);
    this.xs = xs;
    this.x = x;
  }

  curve(series, x, y, logarithmic) {
    const group = make("g", { class: colorOf(series) });
    const place = (values, from) => values.map((value, index) => `${x(series.x[from + index]).toFixed(1)},${y(value).toFixed(1)}`);
    for (const [from, to] of runs(series.y)) {
      const values = series.y.slice(from, to);
      if (series.low?.length) {
        const outline = place(series.high.slice(from, to), from).concat(place(series.low.slice(from, to), from).reverse());
        group.append(make("polygon", { class: "band", points: outline.join(" ") }));
      }
      const half = series.stage === undefined ? 0 : Math.floor(values.length / SMOOTHING / 2);
      if (half > 0) group.append(make("polyline", { class: "raw", points: place(values, from).join(" ") }));
      const points = place(half > 0 ? smooth(values, half, logarithmic) : values, from);
      if (points.length === 1) points.push(points[0]); // a dot
      group.append(make("polyline", { class: "curve", points: points.join(" "), "stroke-dasharray": DASHES[series.dash % DASHES.length] }));
    }
    return group;
  }

  drawLegend(visible) {
    this.legend.replaceChildren();
    const entries = this.data.legend.length
      ? this.data.legend.flatMap((name, dash) => (visible.some((each) => each.dash === dash) ? [{ name, dash, classes: "" }] : []))
      : visible.map((each) => ({ name: each.name, dash: each.dash, classes: colorOf(each) }));
    if (entries.length < 2 && this.data.legend.length) return;
    for (const entry of entries) {
      const item = html("span");
      const line = make("svg", { viewBox: "0 0 26 8", class: entry.classes, "aria-hidden": "true" });
      line.append(make("line", { class: "curve", x1: 1, x2: 25, y1: 4, y2: 4, "stroke-dasharray": DASHES[entry.dash % DASHES.length] }));
      item.append(line, document.createTextNode(entry.name));
      this.legend.append(item);
    }
  }

  drawBars() {
    const { edges, counts } = this.data;
    const x = scale(edges[0], edges[edges.length - 1], this.left, this.right, false);
    const y = scale(0, Math.max(...counts), this.bottom, MARGIN.top, false);
    this.columns = counts.map((count, index) => {
      const width = Math.max(1, x(edges[index + 1]) - x(edges[index]) - 1);
      return make("rect", { class: "column", x: x(edges[index]), width, y: y(count), height: this.bottom - y(count) });
    });
    this.axes(x, y, linearTicks(edges[0], edges[edges.length - 1], Math.max(2, (this.right - this.left) / 60)).filter((value) => this.data.x_name === "s" || Number.isInteger(value)), linearTicks(0, Math.max(...counts), 4));
    this.svg.append(...this.columns);
    this.svg.append(make("line", { class: "marker", x1: x(this.data.mean), x2: x(this.data.mean), y1: MARGIN.top, y2: this.bottom }));
    this.xs = [edges[0], edges[edges.length - 1]];
    this.x = x;
  }

  point(pixel) {
    if (!this.xs || this.right <= this.left) return;
    const share = Math.min(1, Math.max(0, (pixel - this.left) / (this.right - this.left)));
    this.read(this.xs[0] + share * (this.xs[1] - this.xs[0]));
  }

  read(at) {
    this.at = at;
    const lines = this.data.kind === "bars" ? this.readBar(at) : this.readLines(at);
    if (lines.length === 0) return this.unpoint();
    this.tip.replaceChildren(...lines);
    this.tip.hidden = false;
    const pixel = this.x(at), width = this.tip.offsetWidth;
    const place = pixel + 12 + width > this.plot.clientWidth ? pixel - width - 12 : pixel + 12;
    this.tip.style.left = `${Math.max(0, place)}px`;
  }

  readLines(at) {
    const found = this.series().flatMap((each) => {
      const index = nearest(each.x, at);
      return index === null || each.x[index] < at - (this.xs[1] - this.xs[0]) / 20 ? [] : [{ each, index }];
    });
    if (found.length === 0) return [];
    const closest = found.reduce((best, next) => (Math.abs(next.each.x[next.index] - at) < Math.abs(best.each.x[best.index] - at) ? next : best));
    const where = closest.each.x[closest.index];
    this.cursor.setAttribute("visibility", "visible");
    for (const name of ["x1", "x2"]) this.cursor.setAttribute(name, this.x(where));
    const head = html("b", "", this.data.x_name === "s" ? `${format(where)} s` : `${this.data.x_name} ${format(where)}`);
    return [head, ...found.map(({ each, index }) => {
      const line = html("div");
      line.append(html("span", `swatch ${colorOf(each)}`));
      const name = each.stage === undefined ? each.name : [DATA.stages[each.stage].name, this.data.legend.length > 1 ? each.name : ""].filter(Boolean).join(", ");
      const spread = each.low?.length && each.low[index] !== null ? ` (${format(each.low[index])} to ${format(each.high[index])})` : "";
      line.append(document.createTextNode(`${name}: ${format(each.y[index])}${spread}`));
      return line;
    })];
  }

  readBar(at) {
    const { edges, counts, x_name: unit } = this.data;
    const index = Math.min(counts.length - 1, Math.max(0, edges.findIndex((edge) => edge > at) - 1));
    this.columns.forEach((column, each) => column.classList.toggle("on", each === index));
    const total = counts.reduce((sum, count) => sum + count, 0);
    const single = edges[index + 1] - edges[index] === 1 && !Number.isInteger(edges[index]);
    const where = single ? format(edges[index] + 0.5) : `${format(edges[index])} to ${format(edges[index + 1])}`;
    const share = ((100 * counts[index]) / total).toFixed(1);
    return [html("b", "", `${where} ${unit}`), html("div", "", `${format(counts[index])} ${this.data.unit}, ${share} %`)];
  }

  unpoint() {
    this.tip.hidden = true;
    this.cursor?.setAttribute("visibility", "hidden");
    this.columns?.forEach((column) => column.classList.remove("on"));
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (!this.xs || !(event.key in moves)) return;
    event.preventDefault();
    const step = this.data.kind === "bars" ? this.data.edges[1] - this.data.edges[0] : (this.xs[1] - this.xs[0]) / 50;
    const from = this.tip.hidden ? this.xs[moves[event.key] > 0 ? 0 : 1] - moves[event.key] * step * 0.5 : this.at;
    this.read(Math.min(this.xs[1], Math.max(this.xs[0], from + moves[event.key] * step)));
  }
}

// Running mean over `half` neighbours on each side, fewer at the ends; of logarithms where the axis is one of them.
function smooth(values, half, logarithmic) {
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + (logarithmic ? Math.log(value) : value));
  return values.map((_, index) => {
    const reach = Math.min(half, index, values.length - 1 - index); // even on both sides, so that a slope stays one
    const mean = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1);
    return logarithmic ? Math.exp(mean) : mean;
  });
}

// Stretches [from, to) without a missing number.
function runs(values) {
  const found = [];
  let from = null;
  values.forEach((value, index) => {
    if (value !== null && from === null) from = index;
    if (value === null && from !== null) {
      found.push([from, index]);
      from = null;
    }
  });
  if (from !== null) found.push([from, values.length]);
  return found;
}

// Index of the ascending number that is nearest to `at`, the last one of equals; null of none.
function nearest(numbers, at) {
  if (numbers.length === 0) return null;
  let low = 0, high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= at) low = middle + 1;
    else high = middle;
  }
  const before = Math.max(0, low - 1), after = Math.min(numbers.length - 1, low);
  return numbers[after] - at < at - numbers[before] ? after : before;
}

const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure, DATA.charts[figure.dataset.chart]));

function stageButton(stage, index) {
  const button = html("button");
  button.type = "button";
  button.append(html("span", `swatch s${index % COLORS}`), document.createTextNode(stage.name));
  button.setAttribute("aria-pressed", String(shownStages.has(index)));
  button.addEventListener("click", () => {
    if (!shownStages.delete(index)) shownStages.add(index);
    button.setAttribute("aria-pressed", String(shownStages.has(index)));
    for (const chart of charts) chart.draw();
  });
  return button;
}

document.getElementById("stages")?.append(...DATA.stages.map(stageButton));

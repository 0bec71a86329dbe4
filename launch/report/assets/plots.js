"use strict";
// Hides stages, and reads the numbers of a plot to pointer and keyboard. Only text nodes are made from data.

const COLORS = 7;
const hiddenStages = new Set();

function html(name, classes = "", text = "") {
  const element = document.createElement(name);
  if (classes) element.className = classes;
  if (text) element.textContent = text;
  return element;
}

function format(value) {
  if (value === null) return "no number";
  const size = Math.abs(value);
  if (size === 0) return "0"; // of minus zero too
  if (size < 1e-3 || size >= 1e7) return String(Number(value.toPrecision(3)).toExponential()).replace("e+", "e").replaceAll("-", "−");
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 4;
  return value.toLocaleString("en", { maximumFractionDigits: digits }).replace("-", "−");
}

for (const button of document.querySelectorAll("[data-stage]")) {
  button.addEventListener("click", () => {
    const stage = Number(button.dataset.stage), hide = !hiddenStages.delete(stage);
    if (hide) hiddenStages.add(stage);
    button.setAttribute("aria-pressed", String(!hide));
    for (const part of document.querySelectorAll(`#training svg .n${stage}`)) part.classList.toggle("hidden", hide);
  });
}

// Index of the value at a place: of the bin that holds it, or of the nearest point; -1 where the series does not reach.
function indexAt({ x, y }, at, span) {
  if (x.length > y.length) return at > x.at(-1) ? -1 : Math.min(y.length - 1, x.findLastIndex((edge) => edge <= at));
  const nearest = x.reduce((best, value, index) => (Math.abs(value - at) <= Math.abs(x[best] - at) ? index : best), 0);
  return x[nearest] < at - span / 20 ? -1 : nearest;
}

class Reader {
  constructor(figure) {
    this.plot = JSON.parse(figure.dataset.plot);
    this.drawing = figure.querySelector(".drawing");
    this.tip = figure.querySelector(".tip");
    this.cursor = figure.querySelector(".cursor");
    this.names = new Set(this.plot.series.map(({ name }) => name)).size;
    this.drawing.addEventListener("pointermove", (event) => {
      const { left, width } = this.drawing.getBoundingClientRect();
      this.read((event.clientX - left) / width);
    });
    this.drawing.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["pointerleave", "blur"]) this.drawing.addEventListener(name, () => this.show(false));
  }

  show(visible) {
    this.tip.hidden = this.cursor.hidden = !visible;
  }

  read(place) { // as a fraction of the drawing's width
    const { left, right, from, to } = this.plot;
    this.place = Math.min(right, Math.max(left, place));
    const at = from + ((this.place - left) / (right - left)) * (to - from);
    const found = this.plot.series
      .filter(({ stage, color }) => !stage || !hiddenStages.has(color))
      .map((series) => ({ series, index: indexAt(series, at, to - from) }))
      .filter(({ index }) => index >= 0);
    if (found.length === 0) return this.show(false);
    this.tip.replaceChildren(html("b", "", this.where(found, at)), ...found.map((each) => this.line(each)));
    this.show(true);
    const width = this.drawing.clientWidth, pixel = this.place * width, beside = pixel + 12 + this.tip.offsetWidth;
    this.cursor.style.left = `${pixel}px`;
    this.tip.style.left = `${Math.max(0, beside > width ? pixel - 12 - this.tip.offsetWidth : pixel + 12)}px`;
  }

  where([{ series, index }, ...others], at) {
    const { name, kind } = this.plot;
    if (kind === "bars") {
      const low = series.x[index], high = series.x[index + 1];
      return high - low === 1 && !Number.isInteger(low) ? `${format(low + 0.5)} ${name}` : `${format(low)} to ${format(high)} ${name}`;
    }
    if (kind === "stairs") return `${format(at)} ${name}`;
    const places = [{ series, index }, ...others].map((each) => each.series.x[each.index]);
    return `${name} ${format(places.reduce((best, next) => (Math.abs(next - at) < Math.abs(best - at) ? next : best)))}`;
  }

  line({ series, index }) {
    const { name, stage, color, y, low, high } = series;
    const label = stage ? [stage, this.names > 1 ? name : ""].filter(Boolean).join(", ") : name;
    const spread = low.length && low[index] !== null ? ` (${format(low[index])} to ${format(high[index])})` : "";
    const line = html("div");
    line.append(html("span", `swatch s${color % COLORS}`), `${label}: ${format(y[index])}${spread}`);
    return line;
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const { left, right } = this.plot;
    this.read(this.tip.hidden ? (step > 0 ? left : right) : this.place + (step * (right - left)) / 50);
  }
}

for (const figure of document.querySelectorAll("[data-plot]")) new Reader(figure);

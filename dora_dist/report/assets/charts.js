"use strict";
/* Draws the curves of the page's data as SVG, as wide as the page has room. All charts share one cursor. */

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 230;
const FORMS = {
  number: (v) => (v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4))),
  exponent: (v) => (v === 0 ? "0" : v.toExponential(2).replace(/\.?0+e/, "e")),
  count: (v) => v.toLocaleString("en-US", { maximumFractionDigits: v < 10 ? 2 : 0 }),
  percent: (v) => `${+(100 * v).toPrecision(3)} %`,
  gigabytes: (v) => `${+v.toPrecision(4)} GB`,
  seconds: (v) => `${+v.toPrecision(4)} s`,
};

function element(name, attributes = {}, children = []) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/* The least and the largest; a function does not take as many arguments as many runs have points. */
function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

/* Round numbers from low to high, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

function logTicks(low, high, count) {
  const digits = high - low > count ? [1] : high - low > 1.5 ? [1, 3] : [1, 2, 5];
  const found = [];
  for (let power = Math.floor(low); power <= high; power++)
    for (const digit of digits) {
      const value = digit * 10 ** power;
      if (Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9) found.push(value);
    }
  return found.length > 1 ? found : ticks(10 ** low, 10 ** high, count);
}

/* An exponential mean without the pull of its start. */
function smoothed(ys, weight) {
  let mean = 0, share = 0;
  return ys.map((y) => {
    if (y === null) return null;
    mean = weight * mean + (1 - weight) * y;
    share = weight * share + (1 - weight);
    return mean / share;
  });
}

class Chart {
  constructor(figure, data, page) {
    const before = page.chosen(data.name);
    Object.assign(this, { figure, data, page, off: new Set(before.off), log: data.log && before.log, at: null });
    this.plot = figure.querySelector(".plot");
    this.form = FORMS[data.form] || FORMS.number;
    this.steps = [...new Set(data.curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    this.readout = element("div", { class: "readout", hidden: "" });
    this.addLegend();
    this.addTools();
    this.addPointer();
    this.addKeys();
    this.name();
  }

  addLegend() {
    if (this.data.curves.length < 2) return;
    const legend = element("div", { class: "legend", role: "group", "aria-label": `Curves of ${this.data.title}` });
    for (const { name, colour } of this.data.curves) {
      const key = element("span", { class: `key c${colour % 8}`, "aria-hidden": "true" });
      const button = element("button", { type: "button", "aria-pressed": String(!this.off.has(name)) }, [key, name]);
      button.addEventListener("click", () => {
        this.off.has(name) ? this.off.delete(name) : this.off.add(name);
        button.setAttribute("aria-pressed", String(!this.off.has(name)));
        this.page.choose(this.data.name, { off: [...this.off] });
        this.draw();
      });
      legend.append(button);
    }
    this.plot.after(legend);
  }

  addTools() {
    if (!this.data.log) return;
    this.logButton = element("button", { type: "button", "aria-pressed": String(this.log), title: "Logarithmic axis" }, ["log"]);
    this.logButton.setAttribute("aria-label", `Logarithmic axis of ${this.data.title}`);
    this.logButton.addEventListener("click", () => this.setLog(!this.log));
    this.figure.append(element("div", { class: "tools" }, [this.logButton]));
  }

  setLog(log) {
    if (!this.data.log) return;
    this.log = log;
    this.logButton.setAttribute("aria-pressed", String(log));
    this.page.choose(this.data.name, { log });
    this.draw();
  }

  /* The plot is a slider over steps to those who use the keyboard or do not see it. */
  name() {
    const plot = this.plot;
    plot.tabIndex = 0;
    plot.setAttribute("role", "slider");
    plot.setAttribute("aria-label", `${this.data.title}, by step`);
    plot.setAttribute("aria-valuemin", this.steps[0]);
    plot.setAttribute("aria-valuemax", this.steps.at(-1));
    plot.setAttribute("aria-valuenow", this.steps.at(-1));
    plot.setAttribute("aria-valuetext", this.words(this.steps.at(-1)));
  }

  addPointer() {
    const move = (event) => {
      const box = this.plot.getBoundingClientRect();
      const x = this.low + ((event.clientX - box.left - this.left) / this.inner) * (this.high - this.low);
      this.page.pointAt(this, this.nearest(x));
    };
    this.plot.addEventListener("pointermove", move);
    this.plot.addEventListener("pointerdown", move);
    this.plot.addEventListener("pointerleave", () => this.page.pointAt(null, null));
    this.plot.addEventListener("blur", () => this.page.pointAt(null, null));
  }

  addKeys() {
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity };
    this.plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.page.pointAt(null, null);
      if (!(event.key in moves)) return;
      event.preventDefault();
      const last = this.steps.length - 1;
      const place = this.at === null ? last : this.steps.indexOf(this.nearest(this.at)) + moves[event.key];
      this.page.pointAt(this, this.steps[Math.min(Math.max(place, 0), last)]);
    });
  }

  nearest(x) {
    let best = this.steps[0];
    for (const step of this.steps) if (Math.abs(step - x) < Math.abs(best - x)) best = step;
    return best;
  }

  /* What each visible curve says at a step, or last before it. */
  valuesAt(step) {
    return this.shown().flatMap((curve) => {
      let place = -1;
      curve.x.forEach((x, n) => { if (x <= step && curve.y[n] !== null) place = n; });
      return place < 0 ? [] : [{ curve, x: curve.x[place], y: curve.y[place], line: (curve.line || curve.y)[place] }];
    });
  }

  words(step) {
    const texts = this.valuesAt(step).map(({ curve, y }) => `${curve.name} ${this.form(y)}`);
    return `step ${step.toLocaleString("en-US")}: ${texts.join(", ")}`;
  }

  shown() {
    return this.data.curves.filter((curve) => !this.off.has(curve.name));
  }

  draw() {
    this.width = this.plot.clientWidth;
    if (!this.width) return;
    const svg = drawn("svg", { width: this.width, height: HEIGHT, "aria-hidden": "true" });
    const curves = this.shown();
    for (const curve of curves) curve.line = curve.style === "noisy" && this.page.smoothing ? smoothed(curve.y, this.page.smoothing) : null;
    this.scale(curves);
    this.axes(svg);
    for (const curve of curves) this.curve(svg, curve);
    this.overlay = drawn("g", {});
    svg.append(this.overlay);
    this.plot.replaceChildren(svg, this.readout);
    this.point(this.at, false);
  }

  scale(curves) {
    const ys = curves.flatMap((curve) => curve.y).filter((y) => y !== null);
    let [low, high] = ys.length ? extent(ys) : this.log ? [1, 10] : [0, 1];
    const above = !this.log && low >= 0;
    if (this.log) [low, high] = [Math.log10(low), Math.log10(high)];
    if (low === high) [low, high] = [low - (Math.abs(low) * 0.05 || 0.5), high + (Math.abs(high) * 0.05 || 0.5)];
    const room = (high - low) * 0.06;
    this.bottom = above && low - room < 0 ? 0 : low - room;
    if (above && low < 0.35 * high) this.bottom = 0;
    this.top = high + room;
    this.low = 0;
    this.high = this.page.last;
    const rows = Math.floor(HEIGHT / 45);
    this.rows = this.log ? logTicks(this.bottom, this.top, rows) : ticks(this.bottom, this.top, rows);
    this.left = 10 + Math.max(25, 6.4 * Math.max(...this.rows.map((value) => this.form(value).length)));
    this.inner = this.width - this.left - 12;
    this.under = HEIGHT - 22;
  }

  x(step) { return this.left + ((step - this.low) / (this.high - this.low)) * this.inner; }

  y(value) {
    const place = this.log ? Math.log10(value) : value;
    return 8 + (1 - (place - this.bottom) / (this.top - this.bottom)) * (this.under - 8);
  }

  axes(svg) {
    for (const value of this.rows) {
      const y = this.y(value), right = this.width - 12;
      svg.append(drawn("line", { class: "grid", x1: this.left, x2: right, y1: y, y2: y }));
      const text = drawn("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" });
      text.textContent = this.form(value);
      svg.append(text);
    }
    for (const step of ticks(this.low, this.high, this.inner / 75).filter((step) => step && Number.isInteger(step))) {
      const text = drawn("text", { x: this.x(step), y: HEIGHT - 5, "text-anchor": "middle" });
      text.textContent = step.toLocaleString("en-US");
      svg.append(text);
    }
    const unit = drawn("text", { x: this.left - 6, y: HEIGHT - 5, "text-anchor": "end" });
    unit.textContent = "step";
    svg.append(unit);
    svg.append(drawn("line", { class: "axis", x1: this.left, x2: this.width - 12, y1: this.under, y2: this.under }));
    for (const step of this.data.marks.filter((s) => s >= this.low && s <= this.high)) {
      const mark = drawn("line", { class: "mark", x1: this.x(step), x2: this.x(step), y1: 8, y2: this.under });
      const title = drawn("title", {});
      title.textContent = `went on after step ${step}`;
      mark.append(title);
      svg.append(mark);
    }
  }

  curve(svg, curve) {
    const again = curve.colour >= 8 ? " again" : "";
    const own = (extra) => `${extra} c${curve.colour % 8}${again}`;
    if (curve.line) svg.append(drawn("path", { class: own("curve raw"), d: this.path(curve.x, curve.y) }));
    svg.append(drawn("path", { class: own("curve"), d: this.path(curve.x, curve.line || curve.y, curve.style === "stairs") }));
    const few = curve.x.length === 1 || (curve.style === "points" && curve.x.length <= 60);
    if (few) curve.x.forEach((x, n) => { if (curve.y[n] !== null) svg.append(this.dot(curve, x, curve.y[n])); });
  }

  dot(curve, x, y) {
    return drawn("circle", { class: `point c${curve.colour % 8}`, cx: this.x(x), cy: this.y(y), r: 3.5 });
  }

  path(xs, ys, stairs = false) {
    let text = "", pen = "M";
    xs.forEach((x, n) => {
      if (ys[n] === null) { pen = "M"; return; }
      const px = this.x(x).toFixed(1), py = this.y(ys[n]).toFixed(1);
      text += stairs && pen === "L" ? `H${px}V${py}` : `${pen}${px} ${py}`;
      pen = "L";
    });
    return stairs ? `${text}H${this.x(this.high).toFixed(1)}` : text;
  }

  /* Show the cursor at a step; told: with the values in words. */
  point(step, told) {
    this.at = step;
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    this.readout.hidden = true;
    if (step === null) return;
    const x = this.x(step);
    this.overlay.append(drawn("line", { class: "cursor", x1: x, x2: x, y1: 8, y2: this.under }));
    if (!told) return;
    const found = this.valuesAt(step);
    for (const { curve, x: at, line } of found) this.overlay.append(this.dot(curve, at, line));
    const lines = found.map(({ curve, y }) => {
      const key = element("span", { class: `key c${curve.colour % 8}` });
      return element("div", {}, [element("b", {}, [this.form(y)]), key, curve.name]);
    });
    this.readout.replaceChildren(`step ${step.toLocaleString("en-US")}`, ...lines);
    this.readout.hidden = false;
    const wide = this.readout.offsetWidth, right = x + 12 + wide > this.width;
    this.readout.style.left = `${Math.max(0, right ? Math.max(x - 12 - wide, 0) : x + 12)}px`;
    this.readout.style.top = "8px";
    this.plot.setAttribute("aria-valuenow", step);
    this.plot.setAttribute("aria-valuetext", this.words(step));
  }
}

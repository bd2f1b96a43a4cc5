// Panels of curves. A metric has a colour, a run has a dash pattern; targets are wide and pale.

const CHART = { width: 400, height: 200, left: 44, right: 8, top: 10, bottom: 24 };
const DASHES = ["none", "7 4", "2 3", "11 3 2 3"];
const MANY_RUNS = 2; // from here on the values before smoothing would only be clutter

function colourOf(metric, number, tiers) {
  const tier = tiers.find((name) => metric.endsWith(`/${name}`));
  return `var(--${tier || (number < 0 ? "target" : `line-${number}`)})`;
}

function smoothed(points, smoothing) {
  let weight = 0, total = 0;
  return points.map(([step, value]) => {
    total = smoothing * total + value;
    weight = smoothing * weight + 1;
    return [step, total / weight];
  });
}

// Round numbers in [low, high], about `wanted` of them.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((factor) => factor * unit).find((step) => step >= rough);
  const found = [];
  for (let k = Math.ceil(low / size - 1e-9); k * size <= high + 1e-9 * size; k++) {
    found.push(k * size);
  }
  return found;
}

function tickLabel(value) {
  if (Math.abs(value) >= 10000) return `${+(value / 1000).toPrecision(3)}k`;
  return String(+value.toPrecision(3));
}

// The last value at or before a step.
function valueAt(points, step) {
  let low = 0, high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle + 1;
    else high = middle;
  }
  return low ? points[low - 1][1] : null;
}

class Chart {
  // One panel. `visible` holds the numbers of the runs that are drawn; all panels share it.
  constructor(panel, data, visible) {
    Object.assign(this, { panel, data, visible, hidden: new Set(), at: null });
    this.names = [...panel.targets, ...panel.metrics];
    this.canvas = svg("svg", {
      viewBox: `0 0 ${CHART.width} ${CHART.height}`, tabindex: 0, role: "slider",
      "aria-label": `${panel.title}: read a step`,
      onpointermove: (event) => this.point(event), onpointerdown: (event) => this.point(event),
      onpointerleave: () => this.show(null), onkeydown: (event) => this.key(event),
      onblur: () => this.show(null),
    });
    this.cross = svg("line.cross", { y1: CHART.top, y2: CHART.height - CHART.bottom });
    this.where = element("span.where");
    this.legend = element("div.legend");
    const caption = element("figcaption", element("h3", panel.title),
      element("span.unit", panel.unit), this.where);
    this.figure = element("figure.panel", caption, this.canvas, this.legend, note(panel.healthy));
    this.draw();
  }

  lines() {
    return this.names.flatMap((name) => this.data.runs.flatMap((run, number) =>
      run.series[name] && this.visible.has(number) && !this.hidden.has(name)
        ? [{ name, number, points: run.series[name] }] : []));
  }

  draw() {
    const lines = this.lines();
    this.scale(lines);
    this.canvas.replaceChildren(
      ...this.axes(), ...lines.flatMap((line) => this.curve(line, this.visible.size)), this.cross);
    if (!lines.length) {
      const middle = [CHART.width / 2, CHART.height / 2];
      this.canvas.append(this.word(...middle, "nothing is shown", "middle"));
    }
    this.makeLegend();
    this.show(null);
  }

  scale(lines) {
    const points = lines.length ? lines.flatMap((line) => line.points) : [[0, 0], [1, 1]];
    const least = (place) => points.reduce((low, point) => Math.min(low, point[place]), Infinity);
    const most = (place) => points.reduce((high, point) => Math.max(high, point[place]), -Infinity);
    [this.first, this.last] = [least(0), most(0)];
    let low = this.panel.low ?? least(1), high = this.panel.high ?? most(1);
    if (low >= high) [low, high] = [low - 0.5, low + 0.5];
    const room = 0.06 * (high - low);
    this.low = this.panel.low === null ? low - room : low;
    this.high = this.panel.high === null ? high + room : high;
    const span = Math.max(1, this.last - this.first);
    const wide = CHART.width - CHART.left - CHART.right;
    const tall = CHART.height - CHART.top - CHART.bottom;
    this.x = (step) => CHART.left + wide * (step - this.first) / span;
    this.y = (value) => CHART.top + tall * (1 - (value - this.low) / (this.high - this.low));
    const part = (x) => Math.min(1, Math.max(0, (x - CHART.left) / wide));
    this.step = (x) => Math.min(this.last, Math.round(this.first + span * part(x)));
  }

  word(x, y, text, anchor) {
    return svg("text", { x, y, "text-anchor": anchor }, text);
  }

  axes() {
    const floor = CHART.height - CHART.bottom, right = CHART.width - CHART.right;
    const across = ticks(this.low, this.high, 4).map((value) => [this.y(value), value]);
    const grid = across.flatMap(([y, value]) => [
      svg("line.grid", { x1: CHART.left, x2: right, y1: y, y2: y }),
      this.word(CHART.left - 6, y + 4, tickLabel(value), "end")]);
    const along = ticks(this.first, this.last, 5).filter(Number.isInteger)
      .map((step) => this.word(this.x(step), floor + 16, tickLabel(step), "middle"));
    return [...grid, ...along];
  }

  curve({ name, number, points }, runs) {
    const target = this.panel.targets.includes(name);
    const colour = colourOf(name, this.panel.metrics.indexOf(name), this.data.tiers);
    const dash = DASHES[number % DASHES.length];
    const place = ([step, value]) => `${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
    const one = (list, kind) => svg(`path.${kind}`, {
      d: `M${list.map(place).join("L")}`, style: `stroke:${colour}`, "stroke-dasharray": dash,
    });
    if (target) return [one(points, "target")];
    if (!this.panel.smooth) return [one(points, "line")];
    const raw = runs < MANY_RUNS ? [one(points, "raw")] : [];
    return [...raw, one(smoothed(points, this.data.smoothing), "line")];
  }

  makeLegend() {
    this.values = new Map();
    const present = this.names.filter((name) => this.data.runs.some((run) => run.series[name]));
    const buttons = present.map((name) => {
      const target = this.panel.targets.includes(name);
      const colour = colourOf(name, this.panel.metrics.indexOf(name), this.data.tiers);
      const value = element("span.value");
      const swatch = element(target ? "span.swatch.wide" : "span.swatch", {
        style: `background:${colour}`,
      });
      this.values.set(name, value);
      return element("button", {
        type: "button", "aria-pressed": String(!this.hidden.has(name)),
        onclick: () => this.toggle(name),
      }, swatch, name, value);
    });
    this.legend.replaceChildren(...buttons);
  }

  toggle(name) {
    if (!this.hidden.delete(name)) this.hidden.add(name);
    this.draw();
    this.values.get(name).parentElement.focus(); // a new button: it keeps the focus of the old one
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    this.show(this.step((event.clientX - box.left) * CHART.width / box.width));
  }

  key(event) {
    const keys = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -1e9, End: 1e9 };
    const by = keys[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const from = this.at ?? (by > 0 ? this.first : this.last);
    this.show(Math.min(this.last, Math.max(this.first, from + by)));
  }

  // Values at a step (null: the last one) beside the names.
  show(step) {
    this.at = step;
    const read = step ?? this.last;
    this.cross.style.display = step === null ? "none" : "";
    if (step !== null) for (const end of ["x1", "x2"]) this.cross.setAttribute(end, this.x(step));
    this.where.textContent = `step ${read}`;
    for (const [name, node] of this.values) {
      const of = this.data.runs.filter((_, number) => this.visible.has(number))
        .map((run) => shown(valueAt(run.series[name] || [], read)));
      node.textContent = of.join(" · ");
    }
    const said = [...this.values].map(([name, node]) => `${name} ${node.textContent}`).join(", ");
    const state = { min: this.first, max: this.last, now: read, text: `step ${read}: ${said}` };
    for (const [part, value] of Object.entries(state)) {
      this.canvas.setAttribute(`aria-value${part}`, value);
    }
  }
}

// All panels that have data, and with several runs the switches that hide and show one.
function drawCurves(place, data) {
  const visible = new Set(data.runs.keys());
  const measured = (name) => data.runs.some((run) => run.series[name]);
  const panels = data.panels.filter((panel) => panel.metrics.some(measured));
  const charts = panels.map((panel) => new Chart(panel, data, visible));
  if (data.runs.length > 1) place.append(runSwitches(data, visible, charts));
  place.append(element("div.panels", ...charts.map((chart) => chart.figure)));
}

function runSwitches(data, visible, charts) {
  const buttons = data.runs.map((run, number) => {
    const sample = svg("svg.dash", { viewBox: "0 0 40 8", "aria-hidden": "true" },
      svg("path.line", {
        d: "M0 4L40 4", style: "stroke:currentColor",
        "stroke-dasharray": DASHES[number % DASHES.length],
      }));
    const toggle = () => {
      if (!visible.delete(number)) visible.add(number);
      press(button, visible.has(number));
      charts.forEach((chart) => chart.draw());
    };
    const button = element(
      "button", { type: "button", "aria-pressed": "true", onclick: toggle }, sample, run.name);
    return button;
  });
  return element("div.choices", { role: "group", "aria-label": "Runs" }, ...buttons);
}

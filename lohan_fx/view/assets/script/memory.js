// Memory over time by tier, as stacked areas with the budget as a line.

const MEMORY_ORDER = ["optimizer", "weights", "gradients", "activations", "workspace", "buffers"];
// Room on the left: the lanes below have as much, so that times are above each other.
const GUTTER = 164;

const memory = {
  charts: [],

  build() {
    if (!model.sources.length) {
      return section(
        "memory",
        "Memory",
        "",
        make("p", { class: "faint" }, "No plan on this page has a timeline: nothing fits."),
      );
    }
    const used = new Set();
    for (const source of model.sources) {
      for (const tier of TIERS)
        Object.keys(source.timeline.memory[tier].bytes).forEach((name) => used.add(name));
    }
    const box = make("div", { class: "memory" });
    this.node = section(
      "memory",
      "Memory",
      "bytes in use over the simulated step, stacked by class, under each tier's budget; what a plan reserves, above, has windows and buffers at their fullest",
      palette.legend(MEMORY_ORDER.filter((name) => used.has(name))),
      box,
      make(
        "p",
        { class: "faint small" },
        "Drag zooms in, wheel zooms, double click shows the whole step; with a chart focused ",
        make("kbd", {}, "\u2190"),
        " ",
        make("kbd", {}, "\u2192"),
        " move the marker and ",
        make("kbd", {}, "0"),
        " shows the whole step.",
      ),
    );
    for (const tier of TIERS) {
      const shown = model.sources.filter((source) => peakOf(source, tier) > 0);
      const top = Math.max(...shown.map((source) => chartTop(source, tier)));
      for (const source of shown) this.charts.push(new MemoryChart(source, tier, top, box));
    }
    // Times are written once, under the last chart.
    if (this.charts.length) this.charts[this.charts.length - 1].last = true;
    const redraw = onceAFrame(() => this.charts.forEach((chart) => chart.follow()));
    range.listen(redraw);
    palette.listen(() => this.charts.forEach((chart) => chart.rebuild()));
    new ResizeObserver(onceAFrame(() => this.charts.forEach((chart) => chart.resize()))).observe(
      box,
    );
    return this.node;
  },

  start() {
    this.charts.forEach((chart) => chart.rebuild());
  },
};

function peakOf(source, tier) {
  const curve = source.timeline.memory[tier];
  let peak = 0;
  for (let k = 0; k < curve.times_s.length; k++) {
    let sum = 0;
    for (const row of Object.values(curve.bytes)) sum += row[k];
    peak = Math.max(peak, sum);
  }
  return peak;
}

// The budget where it can be drawn without flattening the areas, else a little over the peak.
function chartTop(source, tier) {
  const peak = peakOf(source, tier);
  const budget = source.plan.budget[tier];
  return (budget > 2.5 * peak ? peak * 1.15 : Math.max(peak, budget)) * 1.06;
}

class MemoryChart {
  constructor(source, tier, top, box) {
    this.source = source;
    this.tier = tier;
    this.top = top;
    this.classes = MEMORY_ORDER.filter((name) => source.timeline.memory[tier].bytes[name]);
    this.columns = this.stacked();
    this.now = make("div", { class: "now", hidden: true });
    this.node = make(
      "div",
      {
        class: "tier",
        tabindex: 0,
        role: "group",
        "aria-roledescription": "chart",
        "aria-label": this.words(),
      },
      make(
        "div",
        { class: "who" },
        make("b", {}, TIER_NAMES[tier]),
        model.sources.length > 1 ? [source.label, make("br")] : null,
        make(
          "span",
          { class: "faint" },
          `peak ${bytesText(peakOf(source, tier))}`,
          make("br"),
          this.budgetWords(),
        ),
      ),
      this.now,
    );
    box.append(this.node);
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.node.addEventListener(
      "wheel",
      (event) => {
        const left = event.clientX - this.node.getBoundingClientRect().left - GUTTER;
        range.wheel(event, Math.max(0, Math.min(1, left / (this.node.clientWidth - GUTTER - 14))));
      },
      { passive: false },
    );
  }

  budgetWords() {
    return `of ${bytesText(this.source.plan.budget[this.tier])}`;
  }

  words() {
    const last = this.columns[this.columns.length - 1];
    let at = 0;
    last.forEach((sum, k) => (at = sum > last[at] ? k : at));
    return `${TIER_NAMES[this.tier]} memory ${this.source.label}: peak ${bytesText(last[at])} of ${bytesText(this.source.plan.budget[this.tier])} at ${secondsText(this.columns[0][at])}: ${this.parts(at)}`;
  }

  // Times and, for each class, the sum up to it; the last value holds to the end of the step.
  stacked() {
    const curve = this.source.timeline.memory[this.tier];
    const times = [...curve.times_s, this.source.timeline.step_s];
    const columns = [times];
    let below = new Array(times.length).fill(0);
    for (const name of this.classes) {
      const row = curve.bytes[name];
      below = below.map((sum, k) => sum + row[Math.min(k, row.length - 1)]);
      columns.push(below);
    }
    return columns;
  }

  parts(k) {
    return this.classes
      .map(
        (name, c) =>
          `${STYLES[name].label} ${bytesText(this.columns[c + 1][k] - (c ? this.columns[c][k] : 0))}`,
      )
      .join(", ");
  }

  get height() {
    return (model.sources.length > 1 ? 96 : 124) + (this.last ? 28 : 6);
  }

  rebuild() {
    this.plot?.destroy();
    const stepped = uPlot.paths.stepped({ align: 1 });
    // The largest sum is painted first, the next over it, so that each class shows its own band.
    const order = this.classes.map((_, c) => c).reverse();
    const text = palette.colour("faint");
    const grid = { stroke: palette.colour("soft"), width: 1 };
    this.plot = new uPlot(
      {
        width: this.node.clientWidth || 800,
        height: this.height,
        padding: [8, 14, 0, 0],
        legend: { show: false },
        cursor: {
          y: false,
          points: { show: false },
          sync: { key: "memory" },
          drag: { x: true, y: false, setScale: false },
          bind: { dblclick: () => () => range.reset() },
        },
        scales: {
          x: { time: false, range: () => [range.start, range.end] },
          y: { range: () => [0, this.top] },
        },
        axes: [
          {
            stroke: text,
            grid,
            ticks: grid,
            size: this.last ? 28 : 6,
            font: "11px system-ui, sans-serif",
            values: (plot, ticks) => ticks.map((t) => (this.last ? `${+t.toPrecision(8)} s` : "")),
          },
          {
            stroke: text,
            grid,
            ticks: grid,
            size: GUTTER,
            font: "11px system-ui, sans-serif",
            space: 34,
            splits: () => this.ticks(),
            values: (plot, ticks) => ticks.map((bytes) => bytesText(bytes).replace(".0 ", " ")),
          },
        ],
        series: [
          {},
          ...order.map((c) => ({
            label: this.classes[c],
            paths: stepped,
            points: { show: false },
            width: 0,
            fill: () => palette.fill(this.classes[c]),
          })),
        ],
        hooks: {
          draw: [(plot) => this.budgetLine(plot)],
          setCursor: [(plot) => this.read(plot)],
          setSelect: [(plot) => this.zoomTo(plot)],
        },
      },
      [this.columns[0], ...order.map((c) => this.columns[c + 1])],
      this.node,
    );
    this.plot.root.setAttribute("aria-hidden", "true");
  }

  ticks() {
    const power = 10 ** Math.floor(Math.log10(this.top / 2));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => this.top / s <= 4) ?? power * 10;
    const found = [];
    for (let at = 0; at <= this.top; at += step) found.push(at);
    return found;
  }

  budgetLine(plot) {
    const budget = this.source.plan.budget[this.tier];
    const pen = plot.ctx;
    const { left, top, width } = plot.bbox;
    const scale = devicePixelRatio || 1;
    pen.save();
    pen.font = `${11 * scale}px system-ui, sans-serif`;
    pen.fillStyle = pen.strokeStyle = palette.colour("bad");
    pen.textAlign = "left";
    if (budget > this.top) {
      pen.fillText(
        `\u2191 budget ${bytesText(budget)}, above this chart`,
        left + 6 * scale,
        top + 12 * scale,
      );
    } else if (budget > 0) {
      const y = Math.round(plot.valToPos(budget, "y", true));
      pen.lineWidth = 1.5 * scale;
      pen.setLineDash([6 * scale, 4 * scale]);
      pen.beginPath();
      pen.moveTo(left, y);
      pen.lineTo(left + width, y);
      pen.stroke();
    }
    pen.restore();
  }

  read(plot) {
    const k = this.at(plot.cursor.left);
    this.now.hidden = k < 0;
    if (k >= 0) this.now.textContent = `${secondsText(this.seconds)}: ${this.parts(k)}`;
  }

  // The row that holds where the cursor is.
  at(left) {
    if (left === null || left === undefined || left < 0) return -1;
    this.seconds = this.plot.posToVal(left, "x");
    const times = this.columns[0];
    let low = 0;
    let high = times.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle] <= this.seconds) low = middle + 1;
      else high = middle;
    }
    return low >= times.length ? -1 : low - 1;
  }

  zoomTo(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    const from = plot.posToVal(left, "x");
    const to = plot.posToVal(left + width, "x");
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    range.set(from, to);
  }

  follow() {
    this.plot?.setScale("x", { min: range.start, max: range.end });
  }

  resize() {
    const width = this.node.clientWidth;
    if (this.plot && width && width !== this.plot.width)
      this.plot.setSize({ width, height: this.height });
  }

  key(event) {
    const { over } = this.plot;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "0") range.reset();
    else if (event.key === "+" || event.key === "=") range.zoom(0.5, this.seconds);
    else if (event.key === "-") range.zoom(2, this.seconds);
    else if (by && event.shiftKey) range.pan((by * range.width) / 4);
    else if (by) {
      const left = Math.max(
        0,
        Math.min(
          (this.plot.cursor.left ?? -1) + by * (over.clientWidth / 100),
          over.clientWidth - 1,
        ),
      );
      this.plot.setCursor({ left, top: 10 });
      say(this.now.textContent);
    } else return;
    event.preventDefault();
  }
}

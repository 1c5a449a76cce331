// The lanes over time, drawn on a canvas: thousands of spans at every zoom.

const BUSY =
  "busy: the share of the step in which a lane has work, at its full rate or, where lanes share a device, at a part of it";

const lanes = {
  axisHeight: 26,
  focus: null, // [row, entry] that the keyboard is at
  hover: null,

  build() {
    const many = model.sources.length > 1;
    this.rowHeight = many ? 20 : 28;
    this.tops = [];
    let y = this.axisHeight + 4;
    const labels = make("div", { class: "labels" });
    model.rows.forEach((row, k) => {
      const first = k === 0 || model.rows[k - 1].lane !== row.lane;
      if (many && first) {
        labels.append(this.label(y, 18, make("span", { class: "lane" }, laneName(row.lane)), null));
        y += 18;
      }
      this.tops.push(y);
      const share = row.source.timeline.step_s ? row.busy / row.source.timeline.step_s : 0;
      const name = many
        ? make("span", { class: "faint" }, row.source.label)
        : make("span", { class: "lane" }, laneName(row.lane));
      labels.append(
        this.label(
          y,
          this.rowHeight - 2,
          name,
          make("span", { class: "faint" }, percentText(share)),
        ),
      );
      y += this.rowHeight + (many && model.rows[k + 1]?.lane === row.lane ? 0 : 8);
    });
    this.height = y;
    labels.style.height = `${y}px`;
    labels.append(
      this.label(
        2,
        22,
        make("span", { class: "faint" }, "lane"),
        make("span", { class: "faint", title: BUSY }, "busy"),
      ),
    );
    this.canvas = make("canvas", {
      tabindex: 0,
      role: "application",
      id: "lanes-canvas",
      style: { height: `${y}px` },
      "aria-label":
        "Timeline of lanes. Left and right go from span to span, up and down from lane to lane, enter selects, plus and minus zoom, shift with left and right pans, 0 shows the whole step.",
    });
    this.text = make("span", { class: "faint small", id: "range-text" });
    const used = new Set(model.rows.flatMap((row) => row.style));
    const button = (text, label, work) =>
      make("button", { type: "button", "aria-label": label, title: label, onclick: work }, text);
    const node = section(
      "lanes",
      "Timeline",
      this.words(),
      make(
        "div",
        { class: "tools" },
        button("+", "zoom in", () => range.zoom(0.5)),
        button("\u2212", "zoom out", () => range.zoom(2)),
        button("\u25c0", "earlier", () => range.pan(-range.width / 3)),
        button("\u25b6", "later", () => range.pan(range.width / 3)),
        button("whole step", "show the whole step", () => range.reset()),
        this.text,
      ),
      palette.legend(STYLE_NAMES.filter((name) => used.has(name))),
      make("div", { class: "lanes" }, labels, this.canvas),
      make(
        "p",
        { class: "faint small" },
        "Wheel zooms, drag pans, ",
        make("kbd", {}, "shift"),
        " drag zooms into a stretch, click selects. Keys: ",
        make("kbd", {}, "\u2190"),
        " ",
        make("kbd", {}, "\u2192"),
        " spans, ",
        make("kbd", {}, "\u2191"),
        " ",
        make("kbd", {}, "\u2193"),
        " lanes, ",
        make("kbd", {}, "enter"),
        " selects, ",
        make("kbd", {}, "+"),
        " ",
        make("kbd", {}, "\u2212"),
        " zoom, ",
        make("kbd", {}, "shift"),
        " ",
        make("kbd", {}, "\u2190"),
        " ",
        make("kbd", {}, "\u2192"),
        " pan, ",
        make("kbd", {}, "0"),
        " whole step. ",
        `${BUSY}.`,
        model.plans.length === 1 ? " The dotted line is where backward begins." : "",
      ),
    );
    if (!model.sources.length) {
      return section(
        "lanes",
        "Timeline",
        "",
        make("p", { class: "faint" }, "No plan on this page has a timeline: nothing fits."),
      );
    }
    this.redraw = onceAFrame(() => this.paint());
    range.listen(() => {
      this.text.textContent = range.text();
      this.redraw();
    });
    this.text.textContent = range.text();
    selection.listen((from) => this.follow(from));
    palette.listen(this.redraw);
    new ResizeObserver(this.redraw).observe(this.canvas);
    this.point();
    this.keys();
    return node;
  },

  words() {
    if (model.measured) return "one step, predicted above measured, lane by lane";
    if (model.sources.length > 1) return "one step of each plan, lane by lane";
    return "one simulated step";
  },

  label(top, height, ...parts) {
    return make("div", { style: { top: `${top}px`, height: `${height}px` } }, parts);
  },

  x(seconds) {
    return ((seconds - range.start) / range.width) * this.canvas.clientWidth;
  },

  seconds(x) {
    return range.start + (x / this.canvas.clientWidth) * range.width;
  },

  paint() {
    const { canvas } = this;
    const width = canvas.clientWidth;
    const scale = devicePixelRatio || 1;
    if (
      canvas.width !== Math.round(width * scale) ||
      canvas.height !== Math.round(this.height * scale)
    ) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(this.height * scale);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, this.height);
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    this.axis(pen, width);
    model.rows.forEach((row, k) => this.row(pen, row, this.tops[k], width));
    for (const [at, colour] of [
      [this.hover, "text"],
      [this.focus, "focus"],
    ]) {
      if (at) this.frame(pen, at, palette.colour(colour));
    }
    if (this.band) {
      pen.fillStyle = palette.colour("focus");
      pen.globalAlpha = 0.2;
      pen.fillRect(Math.min(...this.band), 0, Math.abs(this.band[1] - this.band[0]), this.height);
      pen.globalAlpha = 1;
    }
  },

  axis(pen, width) {
    const wanted = range.width / Math.max(2, width / 84);
    const power = 10 ** Math.floor(Math.log10(wanted));
    const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= wanted * 0.999);
    const digits = Math.max(
      0,
      Math.ceil(-Math.log10(power) - 1e-9) + (step === 2.5 * power ? 1 : 0),
    );
    pen.strokeStyle = palette.colour("line");
    pen.fillStyle = palette.colour("faint");
    pen.lineWidth = 1;
    pen.beginPath();
    for (let k = Math.ceil(range.start / step - 1e-9); k * step <= range.end; k++) {
      const x = Math.round(this.x(k * step)) + 0.5;
      pen.moveTo(x, 18);
      pen.lineTo(x, this.height);
      const text = `${(k * step).toFixed(digits)} s`;
      if (x + 4 + pen.measureText(text).width < width) pen.fillText(text, x + 4, 12);
    }
    pen.stroke();
    // Where backward begins, for a single plan.
    const turn = model.plans.length === 1 ? (model.plans[0].predicted?.forward_s ?? 0) : 0;
    if (turn > 0 && turn > range.start && turn < range.end) {
      pen.fillStyle = palette.colour("text");
      for (let y = 18; y < this.height; y += 6) pen.fillRect(this.x(turn) - 0.5, y, 1, 3);
    }
    for (const source of model.sources) {
      const x = this.x(source.timeline.step_s);
      if (model.sources.length > 1 && x >= 0 && x < width) {
        pen.fillStyle = palette.colour("text");
        pen.fillRect(x - 0.5, 18, 1.5, this.height);
      }
    }
  },

  row(pen, row, top, width) {
    const height = this.rowHeight - 2;
    const chosen = selection.rowIn(row.source.plan);
    let covered = -1;
    let last = "";
    pen.fillStyle = palette.colour("soft");
    pen.fillRect(0, top + height, width, 1);
    for (let k = row.after(range.start); k < row.length && row.start[k] < range.end; k++) {
      const from = Math.max(-2, this.x(row.start[k]));
      const to = Math.min(width + 2, this.x(row.end[k]));
      const on = row.item[k] === chosen;
      // Many spans in one pixel: one of a kind is enough.
      if (to < covered && row.style[k] === last && !on) continue;
      const wide = Math.max(to - from, 0.8);
      pen.globalAlpha = chosen < 0 || on ? 1 : 0.3;
      pen.fillStyle = palette.fill(row.style[k]);
      pen.fillRect(from, top, wide > 3 ? wide - 0.7 : wide, height);
      if (wide > 34) this.name(pen, row, k, from, top, wide, height);
      if (on) {
        pen.strokeStyle = palette.colour("text");
        pen.lineWidth = 2;
        pen.strokeRect(from, top + 1, Math.max(wide, 3), height - 2);
      }
      covered = Math.floor(from) + 1;
      last = row.style[k];
    }
    pen.globalAlpha = 1;
  },

  // What a wide span is, inside it.
  name(pen, row, k, from, top, wide, height) {
    const left = Math.max(from, 0);
    const room = Math.min(from + wide, this.canvas.clientWidth) - left - 8;
    const waits = row.cause[k] >= 0;
    const texts = waits
      ? [`waits for ${laneName(LANES[row.cause[k]])}`, laneName(LANES[row.cause[k]])]
      : this.names(row, k);
    const shown = texts.find(
      (text) => text.length * 4 < room && pen.measureText(text).width <= room,
    );
    if (!shown) return;
    if (STYLES[row.style[k]].pattern !== "plain") {
      pen.fillStyle = palette.colour(row.style[k]);
      pen.fillRect(left + 2, top + height / 2 - 7, pen.measureText(shown).width + 4, 14);
    }
    pen.fillStyle = palette.colour(waits ? "text" : "ink");
    pen.fillText(shown, left + 4, top + height / 2 + 0.5);
  },

  // What a span does to what, from long to short; the end of a name says most.
  names(row, k) {
    const name = shortName(row.source.plan.items[row.item[k]]);
    const parts = name.split(".");
    const what = row.what[k];
    const tails = [0, 1, 2, 3]
      .filter((cut) => cut < parts.length)
      .map((cut) => parts.slice(cut).join("."));
    return [...tails.map((tail) => `${what} ${tail}`), ...tails.slice(1), what];
  },

  frame(pen, [number, k], colour) {
    const row = model.rows[number];
    const from = this.x(row.start[k]);
    pen.strokeStyle = colour;
    pen.lineWidth = 2.5;
    pen.strokeRect(
      from - 1,
      this.tops[number] - 1,
      Math.max(this.x(row.end[k]) - from, 2) + 2,
      this.rowHeight,
    );
  },

  // [row, entry] at a point of the canvas, or null.
  hit(x, y) {
    const number = this.tops.findIndex((top) => y >= top && y < top + this.rowHeight);
    if (number < 0) return null;
    const entry = model.rows[number].at(
      this.seconds(x),
      (3 / this.canvas.clientWidth) * range.width,
    );
    return entry < 0 ? null : [number, entry];
  },

  point() {
    const { canvas } = this;
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      drag = { x: event.offsetX, start: range.start, moved: false, band: event.shiftKey };
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag !== null) {
        drag.moved ||= Math.abs(event.offsetX - drag.x) > 3;
        if (!drag.moved) return;
        tip.hide();
        canvas.classList.add("dragging");
        if (drag.band) {
          this.band = [drag.x, event.offsetX];
          this.redraw();
        } else {
          const start = drag.start - ((event.offsetX - drag.x) / canvas.clientWidth) * range.width;
          range.pan(start - range.start);
        }
        return;
      }
      this.hover = this.hit(event.offsetX, event.offsetY);
      if (this.hover)
        tip.show(model.rows[this.hover[0]].lines(this.hover[1]), event.clientX, event.clientY);
      else tip.hide();
      this.redraw();
    });
    canvas.addEventListener("pointerup", (event) => {
      if (drag === null) return;
      if (this.band) {
        const [from, to] = this.band.map((x) => this.seconds(x)).sort((a, b) => a - b);
        this.band = null;
        range.set(from, to);
      } else if (!drag.moved) {
        const at = this.hit(event.offsetX, event.offsetY);
        if (at) this.choose(at);
        else selection.clear();
      }
      drag = null;
      canvas.classList.remove("dragging");
      this.redraw();
    });
    canvas.addEventListener("pointercancel", () => {
      drag = null;
      this.band = null;
      canvas.classList.remove("dragging");
    });
    canvas.addEventListener("pointerleave", () => {
      this.hover = null;
      tip.hide();
      this.redraw();
    });
    canvas.addEventListener("dblclick", (event) => range.zoom(0.4, this.seconds(event.offsetX)));
    canvas.addEventListener(
      "wheel",
      (event) => range.wheel(event, event.offsetX / canvas.clientWidth),
      { passive: false },
    );
  },

  choose(at) {
    this.focus = at;
    const row = model.rows[at[0]];
    selection.select(row.source.plan, row.item[at[1]], "lanes");
  },

  keys() {
    const work = {
      ArrowRight: (shift) => (shift ? range.pan(range.width / 4) : this.step(1)),
      ArrowLeft: (shift) => (shift ? range.pan(-range.width / 4) : this.step(-1)),
      ArrowDown: () => this.change(1),
      ArrowUp: () => this.change(-1),
      Home: () => this.go(this.focus?.[0] ?? 0, 0),
      End: () => this.go(this.focus?.[0] ?? 0, Infinity),
      Enter: () => this.focus && this.choose(this.focus),
      " ": () => this.focus && this.choose(this.focus),
      Escape: () => selection.clear(),
      "+": () => range.zoom(0.5, this.middle()),
      "=": () => range.zoom(0.5, this.middle()),
      "-": () => range.zoom(2, this.middle()),
      0: () => range.reset(),
    };
    this.canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !work[event.key]) return;
      event.preventDefault();
      work[event.key](event.shiftKey);
      this.redraw();
    });
    this.canvas.addEventListener("blur", () => {
      tip.hide();
      this.redraw();
    });
  },

  // The moment to zoom around: the focused entry where it is in view.
  middle() {
    const row = this.focus && model.rows[this.focus[0]];
    const at = row ? (row.start[this.focus[1]] + row.end[this.focus[1]]) / 2 : -1;
    return at >= range.start && at <= range.end ? at : (range.start + range.end) / 2;
  },

  step(by) {
    if (this.focus) this.go(this.focus[0], this.focus[1] + by);
    else this.go(0, model.rows[0].after(range.start));
  },

  change(by) {
    if (!this.focus) return this.step(0);
    const at = this.middle();
    for (let number = this.focus[0] + by; model.rows[number]; number += by) {
      const row = model.rows[number];
      if (row.length) return this.go(number, row.at(at, range.full));
    }
  },

  go(number, entry) {
    const row = model.rows[number];
    if (!row.length) return;
    const k = Math.max(0, Math.min(entry, row.length - 1));
    this.focus = [number, k];
    if (row.end[k] < range.start || row.start[k] > range.end)
      range.reveal(row.start[k], row.end[k]);
    const box = this.canvas.getBoundingClientRect();
    const lines = row.lines(k);
    const x = Math.max(0, Math.min(this.x(row.start[k]), box.width));
    tip.show(lines, box.left + x, box.top + this.tops[number] + this.rowHeight - 8);
    say(lines.join(", "));
  },

  // Something was selected elsewhere: show where it is first.
  follow(from) {
    if (from !== "lanes" && selection.any) {
      const first = this.occurrences()[0];
      if (first) {
        this.focus = first;
        const row = model.rows[first[0]];
        range.reveal(row.start[first[1]], row.end[first[1]]);
      }
    }
    if (!selection.any) this.focus = null;
    this.redraw();
  },

  // [row, entry] of all the selected item does, in order of time; waiting for it comes last.
  occurrences() {
    const found = [];
    model.rows.forEach((row, number) => {
      const item = selection.rowIn(row.source.plan);
      if (item >= 0) row.item.forEach((at, k) => at === item && found.push([number, k]));
    });
    const key = ([number, k]) => [
      model.rows[number].cause[k] >= 0 ? 1 : 0,
      model.rows[number].start[k],
    ];
    return found.sort((a, b) => key(a)[0] - key(b)[0] || key(a)[1] - key(b)[1]);
  },
};

// The table of tensors: only the lines in sight are in the document, however many there are.

const LINE = 26; // height of a line, as in the style sheet
const CLASSES = ["weight16", "master32", "moments32", "gradient", "activation", "workspace"];

// Columns of the table. `rank` gives numbers to sort by, `text` what a cell shows.
const COLUMNS = [
  { id: "name", title: "name", width: "minmax(220px, 2.2fr)" },
  { id: "layer", title: "layer", width: "minmax(110px, 1fr)" },
  { id: "class", title: "class", width: "96px" },
  { id: "shape", title: "shape", width: "130px" },
  { id: "dtype", title: "dtype", width: "80px" },
  { id: "bytes", title: "bytes", width: "86px", number: true },
  { id: "placement", title: "placement", width: "108px" },
  { id: "recompute_s", title: "recompute", width: "104px", number: true },
  { id: "reason", title: "reason", width: "minmax(220px, 2fr)" },
];

class TensorTable {
  build() {
    this.plan = model.plans[0];
    this.sorting = { column: null, down: false };
    this.only = null; // [words, tensors] that a list elsewhere asks for
    this.search = make("input", {
      type: "search",
      id: "search",
      placeholder: "name, layer, shape, reason",
      "aria-label": "search tensors",
      oninput: () => this.refresh(),
    });
    this.count = make("span", { class: "faint", role: "status", id: "count" });
    this.chip = make("button", {
      type: "button",
      hidden: true,
      onclick: () => this.showOnly(null),
    });
    this.places = this.boxes("placement", PLACES, placeWord);
    this.classes = this.boxes(
      "class",
      CLASSES.filter((name) => model.plans.some((plan) => plan.tables.class.includes(name))),
      (name) => name,
    );
    this.titles = make("div", { class: "line titles", role: "row", "aria-rowindex": 1 });
    this.tall = make("div", { class: "tall", role: "rowgroup" });
    this.wide = make("div", { class: "wide", role: "presentation" }, this.titles, this.tall);
    this.scroll = make(
      "div",
      {
        class: "scroll",
        tabindex: 0,
        role: "grid",
        id: "grid",
        "aria-label":
          "Tensors. Up and down go from line to line, enter shows the tensor in the timeline.",
      },
      this.wide,
    );
    this.at = 0;
    this.lines = new Map(); // those in sight, by position
    const moved = onceAFrame(() => this.moved());
    this.scroll.addEventListener("scroll", moved);
    this.scroll.addEventListener("keydown", (event) => this.key(event));
    this.tall.addEventListener("click", (event) => {
      const line = event.target.closest(".data");
      if (line) this.choose(Number(line.dataset.position));
    });
    new ResizeObserver(moved).observe(this.scroll);
    selection.listen((from) => this.follow(from));
    const choice = planChoice("tensors-plan", (plan) => this.showPlan(plan));
    const node = section(
      "tensors",
      "Tensors",
      "a click shows a tensor in the timeline, and a span there its tensors here",
      make(
        "div",
        { class: "filters" },
        choice,
        this.search,
        this.places.node,
        this.classes.node,
        this.chip,
        this.count,
      ),
      make("div", { class: "grid" }, this.scroll),
    );
    this.showPlan(this.plan);
    return node;
  }

  boxes(name, values, word) {
    const inputs = values.map((value) =>
      make("input", { type: "checkbox", value, checked: true, onchange: () => this.refresh() }),
    );
    const node = make(
      "fieldset",
      {},
      make("legend", { class: "faint" }, name),
      inputs.map((input, k) => make("label", {}, input, word(values[k]))),
    );
    return {
      node,
      inputs,
      chosen: () => new Set(inputs.filter((input) => input.checked).map((input) => input.value)),
    };
  }

  showPlan(plan) {
    this.plan = plan;
    this.others = model.plans.filter((other) => other !== plan);
    const more = this.others
      .slice(0, 3)
      .map((other) => ({
        id: `in ${other.letter}`,
        title: `in ${other.letter}`,
        width: "100px",
        other,
      }));
    const at = COLUMNS.findIndex((column) => column.id === "placement") + 1;
    this.columns = [...COLUMNS.slice(0, at), ...more, ...COLUMNS.slice(at)];
    this.ranks = new Map();
    this.only = null;
    this.template = this.columns.map((column) => column.width).join(" ");
    this.scroll.setAttribute("aria-colcount", this.columns.length);
    this.heads();
    this.refresh();
  }

  heads() {
    this.titles.style.gridTemplateColumns = this.template;
    const sorted = (column) =>
      this.sorting.column !== column.id ? "none" : this.sorting.down ? "descending" : "ascending";
    const mark = { none: "", ascending: " \u25b2", descending: " \u25bc" };
    const focused = this.titles.contains(document.activeElement)
      ? document.activeElement.dataset.column
      : null;
    this.titles.replaceChildren(
      ...this.columns.map((column) =>
        make(
          "span",
          {
            role: "columnheader",
            class: column.number ? "number" : "",
            "aria-sort": sorted(column),
          },
          make(
            "button",
            { type: "button", "data-column": column.id, onclick: () => this.sort(column) },
            column.title,
            mark[sorted(column)],
          ),
        ),
      ),
    );
    if (focused !== null)
      [...this.titles.querySelectorAll("button")]
        .find((button) => button.dataset.column === focused)
        ?.focus();
  }

  // Numbers that sort as the column does, one per tensor.
  rank(column) {
    let ranks = this.ranks.get(column.id);
    if (ranks === undefined) {
      ranks = this.ranked(column);
      this.ranks.set(column.id, ranks);
    }
    return ranks;
  }

  ranked(column) {
    const { columns, tables, numTensors } = this.plan;
    if (column.number) return Float64Array.from(columns[column.id], (value) => value ?? -1);
    if (column.other)
      return Float64Array.from({ length: numTensors }, (_, tensor) =>
        PLACES.indexOf(this.elsewhere(column.other, tensor)),
      );
    const table = tables[column.id];
    const order =
      column.id === "placement" ? (a, b) => PLACES.indexOf(a) - PLACES.indexOf(b) : byName;
    const place = new Float64Array(table.length);
    table
      .map((_, k) => k)
      .sort((a, b) => order(table[a], table[b]))
      .forEach((k, rank) => (place[k] = rank));
    return Float64Array.from(columns[column.id], (k) => place[k]);
  }

  // Where another plan has a tensor: a place, or "" where it has no such tensor.
  elsewhere(other, tensor) {
    const found = other.tensorByKey.get(this.plan.keyOf(tensor));
    return found === undefined ? "" : other.word("placement", found);
  }

  sort(column) {
    // Large things first; a third click is the plan's own order again.
    const first = Boolean(column.number);
    if (this.sorting.column !== column.id) this.sorting = { column: column.id, down: first };
    else if (this.sorting.down === first) this.sorting.down = !first;
    else this.sorting = { column: null, down: false };
    this.heads();
    this.refresh();
    say(
      this.sorting.column
        ? `sorted by ${column.title}, ${this.sorting.down ? "descending" : "ascending"}`
        : "in the order of the plan",
    );
  }

  refresh() {
    const { columns, tables, numTensors } = this.plan;
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = (column, keep) => tables[column].map(keep);
    const places = this.places.chosen();
    const classes = this.classes.chosen();
    const placed = matching("placement", (place) => places.has(place));
    const classed = matching("class", (name) => classes.has(name));
    // Each word of the search is looked for in each table once, not in each tensor.
    const hits = words.map((word) =>
      ["name", "layer", "class", "shape", "dtype", "placement", "reason"].map((column) => [
        columns[column],
        matching(column, (text) => text.toLowerCase().includes(word)),
      ]),
    );
    const kept = [];
    const only = this.only && new Set(this.only[1]);
    for (let tensor = 0; tensor < numTensors; tensor++) {
      if (only && !only.has(tensor)) continue;
      if (!placed[columns.placement[tensor]] || !classed[columns.class[tensor]]) continue;
      if (hits.every((tablesHit) => tablesHit.some(([column, hit]) => hit[column[tensor]])))
        kept.push(tensor);
    }
    const column = this.columns.find(({ id }) => id === this.sorting.column);
    if (column) {
      const rank = this.rank(column);
      const sign = this.sorting.down ? -1 : 1;
      kept.sort((a, b) => sign * (rank[a] - rank[b]) || a - b);
    }
    this.shown = kept;
    let bytes = 0;
    for (const tensor of kept) bytes += columns.bytes[tensor];
    this.count.textContent = `${kept.length === numTensors ? countOf(numTensors, "tensor") : `${countText(kept.length)} of ${countOf(numTensors, "tensor")}`}, ${bytesText(bytes)}`;
    this.chip.hidden = this.only === null;
    this.chip.textContent = this.only ? `${this.only[0]} \u2715` : "";
    this.tall.style.height = `${kept.length * LINE}px`;
    this.scroll.setAttribute("aria-rowcount", kept.length + 1);
    this.at = Math.max(0, Math.min(this.at, kept.length - 1));
    this.paint();
  }

  showOnly(words, tensors, plan = this.plan) {
    if (plan !== this.plan) this.showPlan(plan);
    this.only = words === null ? null : [words, tensors];
    this.scroll.scrollTop = 0;
    this.refresh();
  }

  paint() {
    this.lines.clear();
    this.moved();
  }

  // A line that stays in sight is not made anew: somebody may be about to click on it.
  moved() {
    const { scrollTop, clientHeight } = this.scroll;
    const from = Math.max(0, Math.floor(scrollTop / LINE) - 6);
    const to = Math.min(this.shown.length, Math.ceil((scrollTop + clientHeight) / LINE) + 6);
    const item = selection.rowIn(this.plan);
    const chosen = new Set(item >= 0 ? this.plan.tensorsIn(item) : []);
    if (selection.plan === this.plan && selection.tensor >= 0) chosen.add(selection.tensor);
    const before = this.lines;
    this.lines = new Map();
    for (let position = from; position < to; position++)
      this.lines.set(position, before.get(position) ?? this.line(position, chosen));
    this.tall.replaceChildren(...this.lines.values());
    const active = this.at >= from && this.at < to ? `line-${this.at}` : null;
    if (active) this.scroll.setAttribute("aria-activedescendant", active);
    else this.scroll.removeAttribute("aria-activedescendant");
  }

  line(position, chosen) {
    const tensor = this.shown[position];
    const on = chosen.has(tensor);
    return make(
      "div",
      {
        class: `line data${on ? " on" : ""}${position === this.at ? " at" : ""}`,
        id: `line-${position}`,
        role: "row",
        "aria-rowindex": position + 2,
        "aria-selected": on ? "true" : "false",
        "data-position": position,
        "data-tensor": tensor,
        style: { top: `${position * LINE}px`, gridTemplateColumns: this.template },
      },
      this.columns.map((column) => this.cell(column, tensor)),
    );
  }

  cell(column, tensor) {
    const { plan } = this;
    const attributes = { role: "gridcell", class: column.number ? "number" : "" };
    if (column.other) {
      const place = this.elsewhere(column.other, tensor);
      const same = place === plan.word("placement", tensor);
      return make(
        "span",
        attributes,
        place === ""
          ? "not there"
          : same
            ? make("span", { class: "faint" }, "same")
            : placeWord(place),
      );
    }
    const value = plan.columns[column.id][tensor];
    if (column.id === "bytes")
      return make("span", { ...attributes, title: `${countText(value)} bytes` }, bytesText(value));
    if (column.id === "recompute_s")
      return make("span", attributes, value === null ? "" : secondsText(value));
    const text = plan.tables[column.id][value];
    if (column.id === "placement") return make("span", attributes, placeWord(text));
    return make("span", { ...attributes, title: text }, text);
  }

  key(event) {
    if (event.target !== this.scroll) return;
    const page = Math.max(1, Math.floor(this.scroll.clientHeight / LINE) - 2);
    const to = {
      ArrowDown: this.at + 1,
      ArrowUp: this.at - 1,
      PageDown: this.at + page,
      PageUp: this.at - page,
      Home: 0,
      End: this.shown.length - 1,
    }[event.key];
    if (to !== undefined) this.go(to);
    else if (event.key === "Enter" || event.key === " ") this.choose(this.at);
    else if (event.key === "Escape") selection.clear();
    else return;
    event.preventDefault();
  }

  go(position) {
    if (!this.shown.length) return;
    this.at = Math.max(0, Math.min(position, this.shown.length - 1));
    const top = this.at * LINE;
    const room = this.scroll.clientHeight - this.titles.offsetHeight;
    if (top < this.scroll.scrollTop) this.scroll.scrollTop = top;
    else if (top + LINE > this.scroll.scrollTop + room) this.scroll.scrollTop = top + LINE - room;
    this.paint();
  }

  choose(position) {
    const tensor = this.shown[position];
    if (tensor === undefined) return;
    this.at = position;
    selection.select(this.plan, this.plan.columns.item[tensor], "table", tensor);
  }

  // Something was selected elsewhere: its first tensor comes into sight.
  follow(from) {
    if (from !== "table" && selection.any) {
      const item = selection.rowIn(this.plan);
      const wanted = new Set(item >= 0 ? this.plan.tensorsIn(item) : []);
      const position = this.shown.findIndex((tensor) => wanted.has(tensor));
      if (position >= 0) {
        this.at = position;
        this.scroll.scrollTop = Math.max(0, position * LINE - 60);
      }
    }
    this.paint();
  }
}
const table = new TensorTable();

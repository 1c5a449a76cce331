// The graph of stages: forward on top, backward below, what is saved between them in the middle.

const PLACES = ["gpu", "dram", "ssd", "recompute"];
const STAGE_BANDS = [
  { group: "weights", top: 40, height: 46, title: "forward", words: "where weights rest" },
  { group: "activations", top: 96, height: 62, title: "saved", words: "where activations go" },
  { group: "states", top: 168, height: 46, title: "backward", words: "where states rest" },
];

// The stages of all plans, one graph under the other.
const stages = {
  build() {
    const box = make("div", {});
    const graphs = model.plans.map((plan) => new StageGraph(plan, box));
    selection.listen(() => graphs.forEach((graph) => graph.mark()));
    let width = 0;
    new ResizeObserver(
      onceAFrame(() => {
        if (Math.abs(box.clientWidth - width) > 1) graphs.forEach((graph) => graph.show());
        width = box.clientWidth;
      }),
    ).observe(box);
    return section(
      "stages",
      "Stages",
      "each a slice of forward and the slice of backward that undoes it; colours are shares of bytes",
      make(
        "div",
        { class: "legend" },
        PLACES.map((place) => placeWord(place)),
        make("span", {}, "arcs: values and weights that later stages read too"),
      ),
      box,
    );
  },
};

class StageGraph {
  constructor(plan, box) {
    this.plan = plan;
    this.nodes = [];
    this.box = make("div", { class: "stages" });
    if (model.plans.length > 1)
      box.append(make("h3", {}, make("span", { class: "tag" }, plan.letter), " ", plan.label));
    box.append(this.box);
    this.show();
  }

  show() {
    const graph = this.plan.stages;
    const count = graph.names.length;
    const room = Math.max((this.box.clientWidth || 1200) - 152, 200);
    const step = Math.max(11, Math.min(130, room / Math.max(count, 1)));
    const width = 140 + step * count + 12;
    const svg = draw(
      "svg",
      { width, height: 250, role: "group", "aria-label": `${count} stages of ${this.plan.label}` },
      this.patterns(),
    );
    for (const band of STAGE_BANDS) {
      const middle = band.top + band.height / 2;
      svg.append(
        draw("text", { x: 10, y: middle - 3, "font-weight": 600 }, band.title),
        draw("text", { x: 10, y: middle + 11, class: "faint" }, band.words),
      );
    }
    if (count) svg.append(this.edges(step, count));
    this.nodes = graph.names.map((name, index) => this.stage(graph, name, index, step));
    svg.append(...this.links(graph, step), ...this.nodes);
    this.nodes[0]?.setAttribute("tabindex", "0");
    this.box.replaceChildren(svg);
    this.mark();
  }

  patterns() {
    const tile = (id, place, path) =>
      draw(
        "pattern",
        { id: `${id}-${this.plan.number}`, width: 6, height: 6, patternUnits: "userSpaceOnUse" },
        draw("rect", { width: 6, height: 6, fill: `var(--${place})` }),
        draw("path", { d: path, stroke: "var(--stroke)", fill: "none" }),
      );
    return draw(
      "defs",
      {},
      tile("ssd-fill", "ssd", "M-1 5L5 -1M1 7L7 1"),
      tile("recompute-fill", "recomputed", "M-1 1L5 7M1 -1L7 5M0 3h6"),
      draw(
        "marker",
        {
          id: `arrow-${this.plan.number}`,
          viewBox: "0 0 8 8",
          refX: 7,
          refY: 4,
          markerWidth: 7,
          markerHeight: 7,
          orient: "auto",
        },
        draw("path", { d: "M0 0L8 4L0 8z", fill: "var(--faint)" }),
      ),
    );
  }

  // The way of a step: forward to the right, backward to the left.
  edges(step, count) {
    const left = 140;
    const right = 140 + step * count;
    const path = `M${left} 34H${right + 4}V220H${left}`;
    return draw("path", {
      class: "edge",
      d: path,
      "marker-end": `url(#arrow-${this.plan.number})`,
    });
  }

  links(graph, step) {
    const at = (index) => 140 + step * (index + 0.5);
    return graph.links.map(([from, to, kind, size]) => {
      const rise = Math.min(26, 8 + (to - from) * 0.4);
      const words =
        kind === "weights"
          ? `${graph.names[from]} and ${graph.names[to]} read the same weights, ${countText(size)} elements`
          : `${graph.names[to]} reads ${bytesText(size)} that ${graph.names[from]} makes`;
      return draw(
        "path",
        {
          class: `link ${kind}`,
          d: `M${at(from)} 34C${at(from)} ${34 - rise * 1.3} ${at(to)} ${34 - rise * 1.3} ${at(to)} 34`,
        },
        draw("title", {}, words),
      );
    });
  }

  stage(graph, name, index, step) {
    const x = 140 + step * index;
    const wide = Math.max(step - Math.min(3, step * 0.15), 2);
    const node = draw("g", {
      class: "stage",
      tabindex: -1,
      role: "button",
      "data-stage": index,
      "aria-label": `stage ${index}: ${this.lines(graph, index).join(", ")}`,
    });
    for (const band of STAGE_BANDS) {
      const held = graph.held[band.group][index];
      const total = held.reduce((a, b) => a + b, 0);
      node.append(
        draw("rect", { x, y: band.top, width: wide, height: band.height, fill: "var(--soft)" }),
      );
      let y = band.top;
      held.forEach((bytes, place) => {
        if (!bytes) return;
        const height = (bytes / total) * band.height;
        const fill = ["ssd", "recompute"].includes(PLACES[place])
          ? `url(#${PLACES[place]}-fill-${this.plan.number})`
          : `var(--${PLACES[place]})`;
        node.append(draw("rect", { x, y, width: wide, height, fill }));
        y += height;
      });
    }
    node.append(
      draw("rect", { class: "frame", x: x - 1, y: 38, width: wide + 2, height: 178, rx: 2 }),
    );
    const every = Math.max(1, Math.ceil(34 / step));
    if (index % every === 0) {
      const short = step > 60 ? name.split(".").slice(-2).join(".") : String(index);
      node.append(
        draw(
          "text",
          { x: x + wide / 2, y: 238, "text-anchor": "middle", class: "faint" },
          short.slice(0, Math.max(3, Math.floor(step / 6))),
        ),
      );
    }
    node.addEventListener("click", () => this.choose(index));
    node.addEventListener("keydown", (event) => this.key(event, index));
    node.addEventListener("pointermove", (event) =>
      tip.show(this.lines(graph, index), event.clientX, event.clientY),
    );
    node.addEventListener("pointerleave", () => tip.hide());
    node.addEventListener("focus", () => {
      const box = node.getBoundingClientRect();
      tip.show(this.lines(graph, index), box.right, box.top + 40);
    });
    node.addEventListener("blur", () => tip.hide());
    return node;
  }

  lines(graph, index) {
    const [forward, recompute, backward] = graph.seconds[index];
    const part = (group) =>
      graph.held[group][index]
        .map((bytes, place) => (bytes ? `${PLACE_NAMES[PLACES[place]]} ${bytesText(bytes)}` : ""))
        .filter(Boolean)
        .join(", ") || "none";
    return [
      graph.names[index],
      `forward ${secondsText(forward)}, recompute ${secondsText(recompute)}, backward ${secondsText(backward)}`,
      `weights: ${part("weights")}`,
      `activations: ${part("activations")}`,
      `optimizer states: ${part("states")}`,
    ];
  }

  choose(index) {
    const item = this.plan.itemRow.get(`stage:${index}`);
    if (item !== undefined) selection.select(this.plan, item, "stages");
  }

  key(event, index) {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: this.nodes.length - 1 }[
      event.key
    ];
    if (event.key === "Enter" || event.key === " ") this.choose(index);
    else if (to !== undefined && this.nodes[to]) {
      this.nodes[index].setAttribute("tabindex", "-1");
      this.nodes[to].setAttribute("tabindex", "0");
      this.nodes[to].focus();
    } else return;
    event.preventDefault();
  }

  mark() {
    const row = selection.rowIn(this.plan);
    const [kind, index] = row >= 0 ? this.plan.items[row] : [];
    const layers = new Set(
      row >= 0 && kind !== "stage"
        ? this.plan.tensorsIn(row).map((t) => this.plan.word("layer", t))
        : [],
    );
    this.nodes.forEach((node, at) => {
      const on = kind === "stage" ? index === at : layers.has(this.plan.stages.names[at]);
      node.classList.toggle("on", on);
    });
  }
}

// A place as a word with its mark.
function placeWord(place) {
  return make("span", { class: "place" }, make("i", { class: place }), PLACE_NAMES[place]);
}

// A choice of plan, where there are several.
function planChoice(id, chosen) {
  if (model.plans.length < 2) return null;
  return make(
    "label",
    {},
    "plan ",
    make(
      "select",
      { id, onchange: (event) => chosen(model.plans[Number(event.target.value)]) },
      model.plans.map((plan) =>
        make("option", { value: plan.number }, `${plan.letter}: ${plan.label}`),
      ),
    ),
  );
}

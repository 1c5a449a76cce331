// Colours from the style sheet, and a pattern for each, so that colour alone says nothing.

const STYLES = {
  forward: { label: "forward", pattern: "plain" },
  backward: { label: "backward", pattern: "plain" },
  recompute: { label: "recompute", pattern: "back" },
  weights: { label: "weights", pattern: "plain" },
  gradients: { label: "gradients", pattern: "vertical" },
  optimizer: { label: "optimizer states", pattern: "dots" },
  activations: { label: "activations", pattern: "diagonal" },
  workspace: { label: "workspace", pattern: "cross" },
  buffers: { label: "staging buffers", pattern: "horizontal" },
  other: { label: "other work", pattern: "plain" },
  stall: { label: "GPU waits", pattern: "sparse" },
};
const STYLE_NAMES = Object.keys(STYLES);

const palette = {
  colours: new Map(),
  patterns: new Map(),
  listeners: [],

  colour(name) {
    let colour = this.colours.get(name);
    if (colour === undefined) {
      colour = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
      this.colours.set(name, colour);
    }
    return colour;
  },

  // A fill for a canvas: the colour of a class with its pattern over it.
  fill(name) {
    let found = this.patterns.get(name);
    if (found === undefined) {
      found = this.tiled(name);
      this.patterns.set(name, found);
    }
    return found;
  },

  tiled(name) {
    const kind = STYLES[name].pattern;
    if (kind === "plain") return this.colour(name);
    const size = kind === "sparse" ? 10 : 8;
    const tile = make("canvas", { width: size, height: size });
    const pen = tile.getContext("2d");
    pen.fillStyle = this.colour(name);
    pen.fillRect(0, 0, size, size);
    pen.strokeStyle = this.colour("stroke");
    pen.fillStyle = this.colour("stroke");
    pen.lineWidth = 1;
    pen.beginPath();
    const line = (x0, y0, x1, y1) => {
      pen.moveTo(x0, y0);
      pen.lineTo(x1, y1);
    };
    // A diagonal goes on in the neighbouring tiles, so its corners are drawn three times.
    for (const shift of [-size, 0, size]) {
      if (kind === "diagonal" || kind === "cross" || kind === "sparse")
        line(shift, size, shift + size, 0);
      if (kind === "back" || kind === "cross") line(shift, 0, shift + size, size);
    }
    if (kind === "vertical") line(4.5, 0, 4.5, size);
    if (kind === "horizontal") line(0, 4.5, size, 4.5);
    pen.stroke();
    if (kind === "dots") for (const at of [1, 5]) pen.fillRect(at, at, 2, 2);
    return pen.createPattern(tile, "repeat");
  },

  // A swatch for a legend, drawn as the areas are.
  swatch(name) {
    const canvas = make("canvas", { width: 32, height: 24, "aria-hidden": "true" });
    const paint = () => {
      const pen = canvas.getContext("2d");
      pen.fillStyle = this.fill(name);
      pen.fillRect(0, 0, 32, 24);
    };
    paint();
    this.listen(paint);
    return canvas;
  },

  legend(names) {
    return make(
      "div",
      { class: "legend", "aria-label": "legend" },
      names.map((name) => make("span", {}, this.swatch(name), STYLES[name].label)),
    );
  },

  listen(listener) {
    this.listeners.push(listener);
  },

  forget() {
    this.colours.clear();
    this.patterns.clear();
    for (const listener of this.listeners) listener();
  },
};

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => palette.forget());

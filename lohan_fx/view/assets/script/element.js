// Elements are made of attributes and text only: nothing that a plan holds is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  const there = (child) => child !== null && child !== undefined && child !== false;
  node.append(...children.flat(Infinity).filter(there));
  return node;
}

function make(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// A section with a heading that the navigation can point to.
function section(id, title, words, ...children) {
  return make(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    make(
      "div",
      { class: "head" },
      make("h2", { id: `${id}-title` }, title),
      make("span", { class: "faint small" }, words),
    ),
    ...children,
  );
}

// Calls `work` at the next frame, once, however often it was asked for.
function onceAFrame(work) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      work();
    });
  };
}

// One tooltip for the page.
const tip = {
  node: make("div", { class: "tip", hidden: true, role: "tooltip" }),
  show(lines, x, y) {
    this.node.replaceChildren(...lines.map((line, k) => make(k ? "div" : "b", {}, line)));
    this.node.hidden = false;
    const { width, height } = this.node.getBoundingClientRect();
    const left = Math.max(8, Math.min(x + 14, innerWidth - width - 8));
    const below = y + 18 + height < innerHeight;
    this.node.style.left = `${left}px`;
    this.node.style.top = `${below ? y + 18 : Math.max(8, y - height - 12)}px`;
  },
  hide() {
    this.node.hidden = true;
  },
};

// What changed, for those who do not see it.
const voice = make("div", { class: "hidden", role: "status", "aria-live": "polite", id: "voice" });

function say(text) {
  voice.textContent = text;
}

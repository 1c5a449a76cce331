// What is selected, at the foot of the window: where it is, why, and all it does in the step.

const detail = {
  build() {
    this.node = make("aside", { class: "drawer", hidden: true, "aria-label": "what is selected" });
    selection.listen(() => this.show());
    return this.node;
  },

  show() {
    this.node.hidden = !selection.any;
    document.body.classList.toggle("chosen", selection.any);
    if (!selection.any) return;
    const { plan, item } = selection;
    const [kind] = plan.items[item];
    const name = shortName(plan.items[item]);
    tip.hide();
    const jump = (text, id) => make("button", { type: "button", onclick: () => document.getElementById(id).scrollIntoView() }, text);
    this.node.replaceChildren(
      make("div", { class: "head" },
        make("b", {}, `${kind} ${name}`),
        make("span", { class: "tools" }, jump("timeline", "lanes"), kind === "stage" ? jump("stages", "stages") : null, jump("tensors", "tensors"),
          make("button", { type: "button", onclick: () => selection.clear() }, "clear"))),
      make("div", { class: "parts" }, this.held(plan, item, kind), this.work()),
    );
    say(`selected ${kind} ${name}`);
  },

  // Bytes by class and place, and why.
  held(plan, item, kind) {
    const sums = new Map();
    for (const tensor of plan.tensorsIn(item)) {
      const key = `${plan.word("class", tensor)}\n${plan.word("placement", tensor)}`;
      sums.set(key, (sums.get(key) ?? 0) + plan.columns.bytes[tensor]);
    }
    const tensors = plan.tensorsIn(item);
    const rows = [...sums].map(([key, bytes]) => {
      const [name, place] = key.split("\n");
      return make("li", {}, `${name} `, placeWord(place), ` ${bytesText(bytes)}`);
    });
    const note = plan.item_notes[item];
    return make("div", { class: "holds" },
      make("div", { class: "faint" }, kind === "stage" ? `${countOf(tensors.length, "tensor")} of this layer` : countOf(tensors.length, "tensor")),
      make("ul", {}, rows), note ? make("div", {}, `why: ${note}`) : null);
  },

  // All it does, with predicted and measured seconds side by side where both are there.
  work() {
    const found = lanes.occurrences();
    const rows = found.slice(0, 40).map(([number, k]) => {
      const row = model.rows[number];
      const what = row.cause[k] >= 0 ? `GPU waits for it (${laneName(LANES[row.cause[k]])})` : `${row.what[k]}, ${laneName(row.lane)}`;
      const show = () => {
        range.reveal(row.start[k], row.end[k]);
        lanes.focus = [number, k];
        lanes.redraw();
      };
      return make("li", {},
        make("button", { type: "button", class: "jump", onclick: show }, model.sources.length > 1 ? `${what}, ${row.source.label}` : what),
        ` ${secondsText(row.end[k] - row.start[k])} `, make("span", { class: "faint" }, `at ${secondsText(row.start[k])}`));
    });
    if (!rows.length) return make("div", { class: "faint" }, "It stays where it is: nothing moves it during the step.");
    const more = found.length - rows.length;
    return make("div", { class: "does" }, make("ul", { class: "flow" }, rows), more > 0 ? make("div", { class: "faint" }, `and ${countText(more)} more`) : null);
  },
};

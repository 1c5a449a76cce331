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
    tip.hide();
    const { plan, item, tensor } = selection;
    const kind = item < 0 ? "tensor" : plan.items[item][0];
    const jump = (text, id) =>
      make(
        "button",
        { type: "button", onclick: () => document.getElementById(id).scrollIntoView() },
        text,
      );
    const title = this.title(plan, item, tensor, kind);
    this.node.replaceChildren(
      make(
        "div",
        { class: "head" },
        make("b", {}, title),
        make(
          "span",
          { class: "tools" },
          jump("timeline", "lanes"),
          kind === "stage" ? jump("stages", "stages") : null,
          jump("tensors", "tensors"),
          make("button", { type: "button", onclick: () => selection.clear() }, "clear"),
        ),
      ),
      make(
        "div",
        { class: "parts" },
        this.held(plan, item < 0 ? [tensor] : plan.tensorsIn(item), kind, item),
        this.work(plan, tensor),
      ),
    );
    say(`selected ${title}`);
  },

  // The tensor that was chosen, and what it moves with; else the item that was.
  title(plan, item, tensor, kind) {
    const name = item < 0 ? "" : shortName(plan.items[item]);
    if (tensor < 0) return `${kind} ${name}`;
    const words = `${plan.word("name", tensor)} (${plan.word("class", tensor)}, ${plan.word("shape", tensor)}, ${plan.word("dtype", tensor)})`;
    return kind === "bucket" && plan.namesIn(item).length > 1
      ? `${words} in bucket ${name}`
      : words;
  },

  // Bytes by class and place, and why.
  held(plan, tensors, kind, item) {
    const sums = new Map();
    for (const tensor of tensors) {
      const key = `${plan.word("class", tensor)}\n${plan.word("placement", tensor)}`;
      sums.set(key, (sums.get(key) ?? 0) + plan.columns.bytes[tensor]);
    }
    const rows = [...sums].map(([key, bytes]) => {
      const [name, place] = key.split("\n");
      return make("li", {}, `${name} `, placeWord(place), ` ${bytesText(bytes)}`);
    });
    const note = item >= 0 ? plan.item_notes[item] : plan.word("reason", tensors[0]);
    return make(
      "div",
      { class: "holds" },
      make(
        "div",
        { class: "faint" },
        kind === "stage"
          ? `${countOf(tensors.length, "tensor")} of this layer`
          : countOf(tensors.length, "tensor"),
      ),
      make("ul", {}, rows),
      note ? make("div", {}, `why: ${note}`) : null,
    );
  },

  // What happens to what never moves.
  still(plan, tensor) {
    const known = tensor >= 0 ? tensor : (plan.tensorsIn(selection.item)[0] ?? -1);
    if (known < 0 || plan.word("placement", known) !== "recompute")
      return "It stays where it is: nothing moves it during the step.";
    const seconds = plan.columns.recompute_s[known];
    return `Forward does not keep it: backward makes it again${seconds === null ? "" : `, in ${secondsText(seconds)}`}.`;
  },

  // All it does, with predicted and measured seconds side by side where both are there.
  work(plan, tensor) {
    const found = lanes.occurrences();
    const rows = found.slice(0, 40).map(([number, k]) => {
      const row = model.rows[number];
      const what =
        row.cause[k] >= 0
          ? `GPU waits for it (${laneName(LANES[row.cause[k]])})`
          : `${row.what[k]}, ${laneName(row.lane)}`;
      const show = () => {
        range.reveal(row.start[k], row.end[k]);
        lanes.focus = [number, k];
        lanes.redraw();
      };
      return make(
        "li",
        {},
        make(
          "button",
          { type: "button", class: "jump", onclick: show },
          model.sources.length > 1 ? `${what}, ${row.source.label}` : what,
        ),
        ` ${secondsText(row.end[k] - row.start[k])} `,
        make("span", { class: "faint" }, `at ${secondsText(row.start[k])}`),
      );
    });
    if (!rows.length) return make("div", { class: "faint" }, this.still(plan, tensor));
    const more = found.length - rows.length;
    return make(
      "div",
      { class: "does" },
      make("ul", { class: "flow" }, rows),
      more > 0 ? make("div", { class: "faint" }, `and ${countText(more)} more`) : null,
    );
  },
};

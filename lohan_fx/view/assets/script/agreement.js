// A measured step beside its prediction: where they disagree, largest first.

const agreement = {
  build() {
    const trace = model.measured;
    const { step, lanes: byLane, waits, work, items } = trace.disagreements;
    this.plan = model.plans[trace.plan];
    const notes = [];
    if (!trace.same_graph)
      notes.push(
        make(
          "p",
          { class: "note" },
          `This run of ${trace.model} followed a plan of another graph: items of one name may not be the same.`,
        ),
      );
    return section(
      "agreement",
      "Measured beside predicted",
      `last of ${countOf(trace.steps_s.length, "step")} on ${trace.device}`,
      notes,
      make("p", { id: "agreement-words" }, this.words(step, byLane, work)),
      make(
        "div",
        { class: "columns" },
        this.rows("Lanes, busy", ["lane"], byLane, ([lane]) => [laneName(lane)]),
        waits.length ? this.rows("GPU waits", ["for"], waits, ([lane]) => [laneName(lane)]) : null,
        this.rows("Work", ["lane", "work"], work, ([lane, what]) => [laneName(lane), what]),
        this.rows(
          "Items, the largest",
          ["lane", "work", "item"],
          items,
          ([lane, what, kind, index, name]) => [laneName(lane), what, this.item(kind, index, name)],
        ),
      ),
    );
  },

  words(step, byLane, work) {
    const difference = (before, now) =>
      `${secondsText(Math.abs(now - before))} ${now >= before ? "more" : "less"} than predicted (${changeText(before, now)})`;
    const parts = [`The step took ${secondsText(step[1])}, ${difference(...step)}.`];
    const [lane, ...seconds] = byLane[0] ?? [];
    if (lane !== undefined && seconds[0] !== seconds[1])
      parts.push(
        `Of the lanes, ${laneName(lane)} is furthest off: busy ${secondsText(seconds[1])}, ${difference(...seconds)}.`,
      );
    const [where, what, ...times] = work[0] ?? [];
    if (where !== undefined && times[0] !== times[1])
      parts.push(
        `Of the kinds of work, ${what} on ${laneName(where)} is: ${secondsText(times[1])}, ${difference(...times)}.`,
      );
    return parts.join(" ");
  },

  item(kind, index, name) {
    const row = this.plan.itemRow.get(`${kind}:${index}`);
    if (row === undefined) return name;
    return make(
      "button",
      {
        type: "button",
        class: "jump",
        onclick: () => selection.select(this.plan, row, "agreement"),
      },
      name,
    );
  },

  rows(title, heads, rows, cells) {
    return make(
      "div",
      {},
      make("h3", {}, title),
      make(
        "table",
        { class: "plain" },
        make(
          "thead",
          {},
          make(
            "tr",
            {},
            heads.map((head) => make("th", { scope: "col", class: "text" }, head)),
            ["predicted", "measured", "difference"].map((head) =>
              make("th", { scope: "col" }, head),
            ),
          ),
        ),
        make(
          "tbody",
          {},
          rows.slice(0, 12).map((row) => {
            const [before, now] = row.slice(-2);
            return make(
              "tr",
              {},
              cells(row).map((cell) => make("td", { class: "text" }, cell)),
              make("td", {}, secondsText(before)),
              make("td", {}, secondsText(now)),
              make(
                "td",
                {},
                `${now > before ? "+" : ""}${secondsText(now - before)} (${changeText(before, now)})`,
              ),
            );
          }),
        ),
      ),
    );
  },
};

// Two or more plans side by side: their numbers, and what each places elsewhere than the first.

const SMALLER_IS_BETTER = new Set([
  "step",
  "forward",
  "backward",
  "update",
  "busiest lane alone",
  "SSD writes a step",
]);
const LARGER_IS_BETTER = new Set(["tokens/s", "model TFLOP/s (6P)"]);

const comparison = {
  build() {
    const { rows, others } = model.differences;
    const shown = rows.filter(([, , ...values]) =>
      values.some((value) => value !== null && value !== 0),
    );
    const equal = shown.filter(([, , ...values]) => new Set(values).size === 1);
    const differing = shown.filter((row) => !equal.includes(row));
    return section(
      "differences",
      "Differences",
      `of ${model.plans
        .slice(1)
        .map((plan) => plan.letter)
        .join(", ")} to A`,
      make(
        "div",
        { class: "columns" },
        make("div", {}, this.numbers(differing), this.same(equal)),
        others.map((other, k) => this.moved(other, model.plans[k + 1])),
      ),
    );
  },

  numbers(rows) {
    const heads = model.plans.map((plan) =>
      make(
        "th",
        { class: "text", scope: "col" },
        make("span", { class: "tag" }, plan.letter),
        " ",
        plan.label,
      ),
    );
    return make(
      "table",
      { class: "plain", id: "difference-numbers" },
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "figure"), heads)),
      make(
        "tbody",
        {},
        rows.map(([name, unit, ...values]) =>
          make(
            "tr",
            {},
            make("th", { scope: "row" }, this.title(name)),
            values.map((value, k) => this.value(name, unit, value, values[0], k)),
          ),
        ),
      ),
    );
  },

  title(name) {
    return name.replace(/(gpu|h2d|d2h|ssd_read|ssd_write|cpu_adam|dram|ssd)\b/g, (lane) =>
      laneName(lane) === lane ? (TIER_NAMES[lane] ?? lane) : laneName(lane),
    );
  },

  value(name, unit, value, first, k) {
    if (value === null) return make("td", {}, "-");
    if (unit === "text") return make("td", { class: "text" }, value);
    const text = {
      s: secondsText,
      bytes: bytesText,
      rate: rateText,
      lane: laneName,
    }[unit](value);
    if (k === 0 || unit === "lane" || first === null)
      return make("td", { class: unit === "lane" ? "text" : "" }, text);
    const change = changeText(first, value);
    const good = SMALLER_IS_BETTER.has(name)
      ? value < first
      : LARGER_IS_BETTER.has(name)
        ? value > first
        : null;
    const tone = good === null || change === "same" ? "" : good ? "better" : "worse";
    const sign = tone === "" ? "" : tone === "better" ? " \u2713" : " \u2717";
    return make("td", { class: tone }, `${text} (${change})${sign}`);
  },

  same(rows) {
    if (!rows.length) return null;
    const words = rows.map(
      ([name, unit, value]) =>
        `${this.title(name)} ${({ s: secondsText, bytes: bytesText, rate: rateText, lane: laneName }[unit] ?? String)(value)}`,
    );
    return make("p", { class: "faint small" }, `The same in all: ${words.join("; ")}.`);
  },

  moved(other, plan) {
    const first = model.plans[0];
    const [ours, theirs] = other.only;
    const words = [`${countOf(other.same, "tensor")} placed alike`];
    if (ours) words.push(`${countText(ours)} in A only`);
    if (theirs) words.push(`${countText(theirs)} in ${plan.letter} only`);
    const rows = other.moved.map(([name, from, to, count, bytes]) =>
      make(
        "tr",
        {},
        make(
          "td",
          {},
          make(
            "button",
            {
              type: "button",
              class: "jump",
              "aria-label": `show ${name} ${from} to ${to}`,
              onclick: () => this.list(plan, name, from, to),
            },
            name,
          ),
        ),
        make("td", { class: "text" }, placeWord(from)),
        make("td", { class: "text" }, placeWord(to)),
        make("td", {}, countText(count)),
        make("td", {}, bytesText(bytes)),
      ),
    );
    const table = !rows.length
      ? null
      : make(
          "table",
          { class: "plain" },
          make(
            "thead",
            {},
            make(
              "tr",
              {},
              ["class", "in A", `in ${plan.letter}`, "tensors", "bytes"].map((head, k) =>
                make("th", { scope: "col", class: k && k < 3 ? "text" : "" }, head),
              ),
            ),
          ),
          make("tbody", {}, rows),
        );
    return make(
      "div",
      {},
      make("h3", {}, `Placed elsewhere in ${plan.letter}`),
      make(
        "p",
        { class: "faint small" },
        `${words.join(", ")}.`,
        first.fingerprint === plan.fingerprint ? "" : " The plans are of different graphs.",
      ),
      table,
    );
  },

  // The tensors of one row, in the table below.
  list(plan, name, from, to) {
    const first = model.plans[0];
    const tensors = [];
    for (let tensor = 0; tensor < first.numTensors; tensor++) {
      if (first.word("class", tensor) !== name || first.word("placement", tensor) !== from)
        continue;
      const there = plan.tensorByKey.get(first.keyOf(tensor));
      if (there !== undefined && plan.word("placement", there) === to) tensors.push(tensor);
    }
    table.showOnly(
      `${name}: ${PLACE_NAMES[from]} in A, ${PLACE_NAMES[to]} in ${plan.letter}`,
      tensors,
      first,
    );
    document.getElementById("tensors").scrollIntoView();
  },
};

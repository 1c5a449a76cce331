// What a plan comes to: a card of figures for each.

function figure(name, value, more) {
  return make(
    "div",
    {},
    make("dt", {}, name),
    make("dd", {}, value, more ? make("span", { class: "faint" }, ` ${more}`) : null),
  );
}

// How much of a budget a tier needs, and what is left of it.
function meter(plan, tier) {
  const peak = plan.predicted.peak_bytes[tier];
  const budget = plan.budget[tier];
  const left = budget - peak;
  const words =
    budget === 0 && peak === 0
      ? "not used"
      : `${bytesText(peak)} of ${bytesText(budget)}, ${left >= 0 ? `${bytesText(left)} left` : `${bytesText(-left)} too much`}`;
  const share = budget > 0 ? Math.min(1, peak / budget) : peak > 0 ? 1 : 0;
  return [
    make("span", {}, TIER_NAMES[tier]),
    make(
      "span",
      { class: "meter", role: "img", "aria-label": `${TIER_NAMES[tier]}: ${words}` },
      make("i", { class: left < 0 ? "over" : "", style: { width: `${share * 100}%` } }),
    ),
    make("span", {}, words),
  ];
}

function measuredFigures(plan) {
  const trace = model.measured;
  if (trace !== null && trace.plan === plan.number) {
    const seconds = trace.timeline.step_s;
    const change = plan.predicted
      ? `${changeText(plan.predicted.step_s, seconds)} to predicted`
      : "";
    return [
      figure(
        `measured step, last of ${trace.steps_s.length} on ${trace.device}`,
        secondsText(seconds),
        change,
      ),
    ];
  }
  const seconds = plan.measured?.step_s;
  if (typeof seconds !== "number") return [];
  return [
    figure(
      "measured step",
      secondsText(seconds),
      plan.predicted ? changeText(plan.predicted.step_s, seconds) : "",
    ),
  ];
}

function provedWords({ optimality }) {
  if (!optimality) return "";
  if (optimality.gap < 0.0005) return "; proved to be the best placement, by the cost model";
  return `; proved to be within ${percentText(optimality.gap)} of the best placement, by the cost model`;
}

function planCard(plan) {
  const { predicted } = plan;
  const many = model.plans.length > 1;
  const title = make(
    "h1",
    {},
    many ? [make("span", { class: "tag" }, plan.letter), " "] : null,
    many ? plan.label : plan.model,
  );
  const sub = [
    many ? plan.model : null,
    `${parametersText(plan.num_params)} parameters`,
    plan.hardware,
    `policy ${plan.policy}`,
    `optimizer in ${plan.overlap}`,
    `seconds ${plan.seconds_from}`,
  ].filter(Boolean);
  const card = make(
    "article",
    { class: "card", "aria-label": plan.label },
    title,
    make(
      "div",
      { class: "sub" },
      sub.join(" \u00b7 "),
      make("br"),
      `budget ${plan.budget.text || "all of the machine"}`,
    ),
  );
  if (predicted === null) {
    card.append(make("p", { class: "no" }, "Nothing fits this budget."));
  } else {
    const rates = [];
    if (predicted.tokens_per_s !== null)
      rates.push(figure("tokens/s", rateText(predicted.tokens_per_s)));
    if (predicted.model_tflops !== null)
      rates.push(figure("model TFLOP/s (6P)", rateText(predicted.model_tflops)));
    const parts =
      `${secondsText(predicted.forward_s)} forward, ${secondsText(predicted.backward_s)} backward` +
      (predicted.update_s ? `, ${secondsText(predicted.update_s)} update` : "");
    card.append(
      make(
        "dl",
        { class: "figures" },
        figure("predicted step", secondsText(predicted.step_s)),
        measuredFigures(plan),
        rates,
        figure(
          "limited by",
          laneName(predicted.bottleneck),
          `busiest lane ${percentText(predicted.bound_s / (predicted.step_s || 1))} of the step`,
        ),
      ),
      make("p", { class: "faint small" }, parts, provedWords(plan)),
      make(
        "div",
        { class: "meters" },
        TIERS.map((tier) => meter(plan, tier)),
      ),
    );
  }
  card.append(
    make(
      "ul",
      { class: "reasons small" },
      plan.reasons.map((reason) => make("li", {}, reason)),
    ),
  );
  return card;
}

function header() {
  const names = [...new Set(model.plans.map((plan) => plan.model))];
  const links = [
    model.differences ? ["differences", "Differences"] : null,
    model.measured ? ["agreement", "Measured"] : null,
    ["lanes", "Timeline"],
    ["memory", "Memory"],
    ["stages", "Stages"],
    ["tensors", "Tensors"],
  ].filter(Boolean);
  return [
    make(
      "nav",
      { "aria-label": "parts of this page" },
      make("span", { class: "name" }, names.join(", ")),
      links.map(([id, text]) => make("a", { href: `#${id}` }, text)),
    ),
    make("header", { class: "cards" }, model.plans.map(planCard)),
  ];
}

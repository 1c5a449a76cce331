// The page's data: plans, their items and tensors, and the timelines that are shown.
//
// An item is what moves as one: a bucket of parameters, an activation, or a stage that computes.
// A source is a timeline that is shown: that of each plan, and that of the measured step.

const LANES = ["gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam", "dram"];
const PASSES = ["forward", "backward", "update"];
const TIERS = ["gpu", "dram", "ssd"];

// The classes of tensors that a piece of work moves or changes, by item and work.
const CARRIED = {
  fetch: ["weight16"],
  upload: ["weight16"],
  read: ["weight16"],
  write: ["weight16"],
  gradient: ["gradient"],
  adam: ["master32", "moments32"],
  "read state": ["master32", "moments32"],
  "write state": ["master32", "moments32"],
  "state in": ["master32", "moments32"],
  "state out": ["master32", "moments32", "weight16"],
};

function styleOf(what, kind) {
  if (kind === "stage") return STYLES[what] ? what : "other";
  if (kind === "activation") return "activations";
  if (what === "gradient") return "gradients";
  if (what === "adam" || what.includes("state")) return "optimizer";
  return kind === "bucket" ? "weights" : "other";
}

class PlanData {
  constructor(raw, number) {
    Object.assign(this, raw);
    this.number = number;
    this.letter = String.fromCharCode(65 + (number % 26));
    const columns = raw.tensors.columns;
    this.columns = columns;
    this.tables = raw.tensors.tables;
    this.numTensors = columns.bytes.length;
    this.tensorsOf = new Map();
    columns.item.forEach((item, tensor) => {
      if (item < 0) return;
      if (!this.tensorsOf.has(item)) this.tensorsOf.set(item, []);
      this.tensorsOf.get(item).push(tensor);
    });
    this.itemRow = new Map(raw.items.map(([kind, index], row) => [`${kind}:${index}`, row]));
  }

  word(column, tensor) {
    return this.tables[column][this.columns[column][tensor]];
  }

  // Tensors of an item; those of its layer for a stage.
  tensorsIn(item) {
    const [kind, , name] = this.items[item];
    if (kind !== "stage") return this.tensorsOf.get(item) ?? [];
    const layer = this.tables.layer.indexOf(name);
    const found = [];
    if (layer >= 0) this.columns.layer.forEach((at, tensor) => at === layer && found.push(tensor));
    return found;
  }

  namesIn(item) {
    return [...new Set(this.tensorsIn(item).map((tensor) => this.word("name", tensor)))];
  }

  bytesByClass(item) {
    const sums = new Map();
    for (const tensor of this.tensorsIn(item)) {
      const name = this.word("class", tensor);
      sums.set(name, (sums.get(name) ?? 0) + this.columns.bytes[tensor]);
    }
    return sums;
  }

  // Bytes that a piece of work moves or changes; null where the plan does not say.
  bytesOf(what, item) {
    const kind = this.items[item][0];
    if (kind === "stage") return null;
    const sums = this.bytesByClass(item);
    if (kind === "activation") return sums.get("activation") ?? null;
    let bytes = 0;
    for (const name of CARRIED[what] ?? []) bytes += sums.get(name) ?? 0;
    // Weights that have no 16-bit copy are their own masters.
    if (!bytes && CARRIED[what]?.[0] === "weight16") bytes = sums.get("master32") ?? 0;
    return bytes || null;
  }

  // Tells a tensor from others, in this plan and in others of the model.
  keyOf(tensor) {
    return [this.word("name", tensor), this.word("class", tensor), this.word("layer", tensor)].join(
      "\n",
    );
  }

  get tensorByKey() {
    if (!this.keys) {
      this.keys = new Map();
      for (let tensor = 0; tensor < this.numTensors; tensor++)
        this.keys.set(this.keyOf(tensor), tensor);
    }
    return this.keys;
  }
}

// The work of one lane in one source, in order of time, and what the GPU waits for in its lane.
class LaneRow {
  constructor(source, lane) {
    this.source = source;
    this.lane = lane;
    const { spans, stalls, whats } = source.timeline;
    const items = source.plan.items;
    const number = LANES.indexOf(lane);
    const entries = [];
    spans.lane.forEach((at, k) => {
      if (at === number) {
        const what = whats[spans.what[k]];
        entries.push([spans.start_s[k], spans.end_s[k], spans.item[k], what, spans.pass[k], -1]);
      }
    });
    this.busy = busySeconds(entries);
    if (lane === "gpu") {
      stalls.lane.forEach((cause, k) => {
        entries.push([stalls.start_s[k], stalls.end_s[k], stalls.item[k], "", -1, cause]);
      });
      entries.sort((a, b) => a[0] - b[0]);
    }
    this.length = entries.length;
    this.start = Float64Array.from(entries, (e) => e[0]);
    this.end = Float64Array.from(entries, (e) => e[1]);
    this.item = Int32Array.from(entries, (e) => e[2]);
    this.what = entries.map((e) => e[3]);
    this.pass = entries.map((e) => e[4]);
    this.cause = entries.map((e) => e[5]);
    this.style = entries.map((e) => (e[5] < 0 ? styleOf(e[3], items[e[2]][0]) : "stall"));
    // Ends that never fall, for binary search where spans overlap.
    this.reach = Float64Array.from(this.end);
    for (let k = 1; k < this.length; k++)
      this.reach[k] = Math.max(this.reach[k], this.reach[k - 1]);
  }

  // The first entry that ends after `seconds`.
  after(seconds) {
    let low = 0;
    let high = this.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.reach[middle] > seconds) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  // The entry at `seconds`, or the nearest one not further away than `slack`; -1 where there is none.
  at(seconds, slack) {
    let best = -1;
    let least = slack;
    for (
      let k = this.after(seconds - slack);
      k < this.length && this.start[k] <= seconds + slack;
      k++
    ) {
      const away = Math.max(this.start[k] - seconds, seconds - this.end[k], 0);
      if (away < least || best < 0) {
        best = k;
        least = away;
      }
      if (away === 0) break;
    }
    return best;
  }

  // Lines about an entry: what, where, how much, how long, why.
  lines(k) {
    const plan = this.source.plan;
    const [kind] = plan.items[this.item[k]];
    const name = shortName(plan.items[this.item[k]]);
    const seconds = this.end[k] - this.start[k];
    const when = `${secondsText(this.start[k])} to ${secondsText(this.end[k])}`;
    const who = model.sources.length > 1 ? `${this.source.label}: ` : "";
    if (this.cause[k] >= 0) {
      return [
        `GPU waits ${secondsText(seconds)} for ${laneName(LANES[this.cause[k]])}`,
        `${who}${when}`,
        `until ${kind} ${name} is there`,
      ];
    }
    const lines = [
      `${this.what[k]}: ${name}`,
      `${who}${laneName(this.lane)}, ${PASSES[this.pass[k]]}`,
    ];
    const together = kind === "bucket" ? plan.namesIn(this.item[k]).length : 0;
    if (together > 1) lines.push(`with ${countOf(together - 1, "other parameter")}`);
    const bytes = plan.bytesOf(this.what[k], this.item[k]);
    const rate = bytes && seconds > 0 ? `, ${bytesText(bytes / seconds)}/s` : "";
    lines.push(`${secondsText(seconds)} (${when})`);
    if (bytes) lines.push(`${bytesText(bytes)}${rate}`);
    const note = plan.item_notes[this.item[k]];
    if (note) lines.push(`why: ${note}`);
    return lines;
  }
}

function busySeconds(entries) {
  let busy = 0;
  let until = 0;
  for (const [start, end] of entries) {
    busy += Math.max(0, end - Math.max(start, until));
    until = Math.max(until, end);
  }
  return busy;
}

const model = (() => {
  const raw = JSON.parse(document.getElementById("data").textContent);
  const plans = raw.plans.map((plan, number) => new PlanData(plan, number));
  const sources = [];
  for (const plan of plans) {
    const measured = raw.measured !== null && raw.measured.plan === plan.number;
    const name = plans.length > 1 ? plan.letter : "";
    if (plan.timeline) {
      const label = measured ? `${name} predicted`.trim() : name || "predicted";
      sources.push({ plan, timeline: plan.timeline, label, measured: false });
    }
    if (measured) {
      const label = `${name} measured`.trim();
      sources.push({ plan, timeline: raw.measured.timeline, label, measured: true });
    }
  }
  const rows = [];
  for (const lane of LANES) {
    const found = sources.map((source) => new LaneRow(source, lane));
    if (lane !== "dram" || found.some((row) => row.length)) rows.push(...found);
  }
  return { plans, sources, rows, measured: raw.measured, differences: raw.differences };
})();

// Numbers and names in words. GB is 1e9 bytes.

const LANE_NAMES = {
  gpu: "GPU",
  h2d: "H2D copy",
  d2h: "D2H copy",
  ssd_read: "SSD read",
  ssd_write: "SSD write",
  cpu_adam: "CPU Adam",
  dram: "DRAM",
};
const TIER_NAMES = { gpu: "GPU", dram: "DRAM", ssd: "SSD" };
const PLACE_NAMES = { ...TIER_NAMES, recompute: "recompute" };

function laneName(lane) {
  return LANE_NAMES[lane] ?? lane;
}

// A bucket is named after its stage and its first parameter, which usually names the stage too.
function shortName([kind, , name]) {
  const colon = kind === "bucket" ? name.indexOf(":") : -1;
  return colon > 0 && name.slice(colon + 1).startsWith(name.slice(0, colon))
    ? name.slice(colon + 1)
    : name;
}

function bytesText(bytes) {
  const size = Math.abs(bytes);
  for (const [scale, unit] of [
    [1e15, "PB"],
    [1e12, "TB"],
    [1e9, "GB"],
    [1e6, "MB"],
    [1e3, "kB"],
  ]) {
    if (size >= scale * 0.99995) return `${(bytes / scale).toFixed(1)} ${unit}`;
  }
  return `${bytes} B`;
}

function secondsText(seconds) {
  const size = Math.abs(seconds);
  if (size === 0) return "0 s";
  for (const [scale, unit] of [
    [1, "s"],
    [1e-3, "ms"],
    [1e-6, "us"],
  ]) {
    if (size >= scale * 0.9995) {
      const value = seconds / scale;
      return `${value.toFixed(Math.abs(value) >= 99.95 ? 1 : Math.abs(value) >= 9.995 ? 2 : 3)} ${unit}`;
    }
  }
  return `${(seconds * 1e9).toFixed(0)} ns`;
}

function countText(count) {
  return count.toLocaleString("en-US");
}

// "1 tensor", "5,885 tensors".
function countOf(count, noun) {
  return `${countText(count)} ${noun}${count === 1 ? "" : "s"}`;
}

function percentText(share) {
  const percent = share * 100;
  return `${percent.toFixed(Math.abs(percent) < 9.95 && percent !== 0 ? 1 : 0)} %`;
}

// How much larger `now` is than `before`: "+8.2 %", "12 times", or "new" where there was nothing.
function changeText(before, now) {
  if (before === now) return "same";
  if (!before) return "new";
  const share = now / before - 1;
  if (share >= 9) return `${countText(Math.round(share + 1))} times`;
  if (Math.abs(share) < 0.0005) return "same";
  return `${share > 0 ? "+" : ""}${percentText(share)}`;
}

// A rate of about four digits, or more where they are whole: never with an exponent.
function rateText(rate) {
  return rate >= 1000 ? countText(Math.round(rate)) : rate.toPrecision(4);
}

function parametersText(count) {
  for (const [scale, word] of [
    [1e12, "trillion"],
    [1e9, "billion"],
    [1e6, "million"],
  ]) {
    if (count >= scale) return `${(count / scale).toPrecision(3)} ${word}`;
  }
  return countText(count);
}

// Names such as h.2 and h.10 in the order of their numbers.
const byName = new Intl.Collator("en", { numeric: true }).compare;

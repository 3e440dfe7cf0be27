// Building blocks: elements made without markup strings, and numbers as a person reads them.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function formatNumber(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replaceAll("-", "−");
  for (const [unit, factor] of [["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (size >= factor) return trim((value / (unit === "k" ? 1e3 : factor)).toPrecision(3)) + unit;
  }
  return trim(value.toPrecision(4));
}

function trim(text) {
  const plain = text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
  return plain.replace(/^-/, "−");
}

function formatSeconds(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 1e-3) return `${trim((seconds * 1e6).toPrecision(3))} µs`;
  if (seconds < 1) return `${trim((seconds * 1e3).toPrecision(3))} ms`;
  if (seconds < 60) return `${trim(seconds.toPrecision(3))} s`;
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${rest} s`;
}

// A tick of a time axis that reaches to `highest`: the whole axis in one unit.
function secondsTick(tick, highest) {
  if (tick === 0) return "0";
  return highest >= 1 && highest < 120 ? `${trim(tick.toPrecision(3))} s` : formatSeconds(tick);
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// About `count` round values that cover low to high.
function niceTicks(low, high, count, whole = false) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.7);
  if (whole) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let count = Math.ceil(low / step - 1e-9); count <= high / step + 1e-9; count++) {
    ticks.push(+(count * step).toPrecision(12));
  }
  return ticks;
}

// Draws now and again whenever the element's width changes.
function onWidth(node, draw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.round(node.clientWidth);
    if (now > 0 && now !== width) draw((width = now));
  }).observe(node);
}

// The page: header, headline numbers, the sections in order, plan and configuration.

const STATUS = { finished: "finished", stopped: "stopped", failed: "failed", unfinished: "not finished" };

function drawHeader(header, numbers) {
  const facts = [
    ["Model", header.model], ["Pipeline", header.pipeline], ["Device", header.device], ["Workers", header.workers],
    ["Steps", header.steps || null], ["Duration", header.seconds === null ? null : formatSeconds(header.seconds)],
  ].filter(([, value]) => value !== null && value !== undefined);
  const status = STATUS[header.status] ? header.status : "unfinished";
  const chip = el("span", { class: `status ${status}` }, STATUS[header.status] ?? header.status);
  const fact = ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)));
  document.getElementById("header").append(
    el("div", { class: "headline" }, el("h1", {}, header.name), chip),
    el("dl", { class: "facts" }, ...facts.map(fact)),
    header.error ? el("p", { class: "error" }, header.error) : "",
    el("dl", { class: "tiles" }, ...numbers.map(drawTile)));
}

function drawTile(tile) {
  const was = tile.was !== undefined ? `${formatNumber(tile.was)} at first` : (tile.note ?? "");
  const label = tile.unit ? `${tile.label}, ${tile.unit}` : tile.label;
  const value = el("div", { class: "value" }, formatNumber(tile.value));
  return el("div", { class: "tile" }, el("dt", {}, label), el("dd", {}, value, el("div", { class: "was" }, was)));
}

function condition(step) {
  const parts = [];
  if (step.every && step.every !== 1) parts.push(`every ${step.every} steps`);
  if (step.when) parts.push(`when ${step.when}`);
  return parts.join("; ");
}

const split = (layout) => layout?.split ?? "";
const names = (columns) => Object.values(columns ?? {}).join(", ");

// What stands in a row's cells beside its number and id: op, how, reads, writes.
function planCells(step) {
  const fields = (step.fields ?? []).join(", ");
  if (step.kind === "drop") return ["drop", "", fields, ""];
  if (step.kind === "redistribute") return [step.kind, `${split(step.source)} → ${split(step.target)}`, fields, ""];
  return [[step.op, step.model].filter(Boolean).join(" · "), condition(step), names(step.reads), names(step.writes)];
}

function planRow(step, index) {
  const classes = ["number", null, "mono", "kind", "fields", "fields"];
  const cells = [String(index + 1), step.id, ...planCells(step)];
  return el("tr", { class: step.kind === "redistribute" ? "moved" : null },
    ...cells.map((text, column) => el("td", { class: classes[column] }, text)));
}

function planCard(stage, plan) {
  const who = /^\d+$/.test(plan.ranks) ? `worker ${plan.ranks}` : `workers ${plan.ranks}`;
  const columns = ["", "Step", "Op", "How", "Reads", "Writes"].map((name) => el("th", { scope: "col" }, name));
  const table = el("table", { class: "plan" },
    el("thead", {}, el("tr", {}, ...columns)), el("tbody", {}, ...plan.steps.map(planRow)));
  return el("div", { class: "card spaced" },
    el("div", { class: "card-head" }, el("h3", {}, stage), el("span", { class: "note" }, who)),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Plan of ${stage}, ${who}` }, table));
}

function planSection(plan) {
  const section = el("section", { id: "plan" }, el("div", { class: "section-head" }, el("h2", {}, "Plan")));
  if (!plan.stages.length) section.append(el("p", { class: "empty" }, "No plan was recorded."));
  for (const { stage, plans, left_out } of plan.stages) {
    section.append(...plans.map((distinct) => planCard(stage, distinct)));
    if (left_out) section.append(el("p", { class: "note" }, `${stage}: ${plural(left_out, "further plan")} left out`));
  }
  return section;
}

function configSection(config) {
  const section = el("section", { id: "config" }, el("div", { class: "section-head" }, el("h2", {}, "Configuration")));
  const label = { tabindex: 0, role: "region", "aria-label": "Resolved configuration" };
  section.append(config
    ? el("pre", { class: "card config scroll", ...label }, config)
    : el("p", { class: "empty" }, "No configuration was recorded."));
  return section;
}

const data = JSON.parse(document.getElementById("report-data").textContent);
drawHeader(data.header, data.numbers);
const sections = [
  curvesSection(data.curves, data.stages),
  timeSection(data.time, data.stages),
  new Samples(data.samples, data.stages).root,
  planSection(data.plan),
  configSection(data.config),
];
document.getElementById("main").append(...sections);
const link = (section) => el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent);
document.getElementById("sections").append(...sections.map(link));

// Where the time went: a bar of nodes for every step, and one step's timeline by worker.

const TONES = 12;
const BARS_HEIGHT = 210;
const ROW = { label: 76, height: 30, lane: 20, axis: 24 };

const tone = (node) => `n${node % TONES}`;

function timeSection(time, stages) {
  const section = el("section", { id: "time" }, el("div", { class: "section-head" }, el("h2", {}, "Time")));
  if (!time.bars.length) {
    section.append(el("p", { class: "empty" }, "No times were recorded."));
    return section;
  }
  const timeline = time.traced ? new Timeline(time) : null;
  const bars = new TimeBars(time, stages, (stage, step) => timeline?.show(stage, step));
  section.append(bars.root);
  if (timeline) section.append(timeline.root);
  return section;
}

class TimeBars {
  constructor(time, stages, choose) {
    this.time = time;
    this.choose = choose;
    this.picked = null;
    const names = stages.map((stage) => stage.name);
    const own = [...new Set(time.bars.map((bar) => bar.stage))].filter((name) => !names.includes(name));
    this.names = [...names, ...own];
    const ranges = this.names.map((name) => {
      const bars = time.bars.filter((bar) => bar.stage === name);
      return { name, first: Math.min(...bars.map((bar) => bar.step)), last: Math.max(...bars.map((bar) => bar.last)) };
    });
    this.axis = new StepAxis(ranges, new Set(time.bars.map((bar) => this.names.indexOf(bar.stage))));
    this.tip = el("div", { class: "tip", hidden: "" });
    const label = "Seconds of every node in each step, stacked. Arrow keys choose a step, Enter shows its timeline.";
    this.picture = svg("svg", { height: BARS_HEIGHT, tabindex: 0, role: "img", "aria-label": label });
    const source = time.traced ? "own time of every node, mean over workers" : "from the metrics; there are no traces";
    this.root = el("div", { class: "card", id: "time-bars" },
      el("h3", {}, "Time per step"), el("p", { class: "chart-note" }, source), this.picture,
      legend(time.nodes.map((node, index) => [node, tone(index)])), this.tip);
    this.picture.addEventListener("pointermove", (event) => this.point(this.barAt(event)));
    this.picture.addEventListener("pointerleave", () => this.point(null));
    this.picture.addEventListener("blur", () => this.point(null));
    this.picture.addEventListener("click", (event) => {
      const bar = this.barAt(event);
      this.choose(bar.stage, bar.last);
    });
    this.picture.addEventListener("keydown", (event) => {
      const bars = this.time.bars;
      const now = this.picked ? bars.indexOf(this.picked) : bars.length;
      const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: bars.length - 1 }[event.key];
      if (next !== undefined) {
        event.preventDefault();
        this.point(bars[Math.min(bars.length - 1, Math.max(0, next))]);
      } else if (event.key === "Enter" && this.picked) this.choose(this.picked.stage, this.picked.last);
    });
    onWidth(this.root, () => this.draw());
  }

  barAt(event) {
    const at = this.axis.find(event.clientX - this.picture.getBoundingClientRect().left);
    const name = this.names[at.stage];
    const own = this.time.bars.filter((bar) => bar.stage === name);
    return own.findLast((bar) => bar.step <= at.step) ?? own[0];
  }

  place(bar) {
    const stage = this.names.indexOf(bar.stage);
    const [left, right] = [this.axis.slot(stage, bar.step)[0], this.axis.slot(stage, bar.last)[1]];
    const gap = Math.min(2, (right - left) * 0.2);
    return [left + gap / 2, Math.max(0.5, Math.min(60, right - left - gap))];
  }

  draw() {
    const width = this.picture.getBoundingClientRect().width;
    const { bars, nodes } = this.time;
    const bottom = BARS_HEIGHT - MARGIN.bottom;
    const highest = Math.max(...bars.map((bar) => bar.seconds.reduce((sum, value) => sum + value, 0))) || 1;
    const y = (seconds) => bottom - ((bottom - MARGIN.top) * seconds) / (highest * 1.04);
    this.picture.replaceChildren();
    this.picture.setAttribute("viewBox", `0 0 ${width} ${BARS_HEIGHT}`);
    this.axis.resize(MARGIN.left, width - MARGIN.right);
    this.axis.draw(this.picture, BARS_HEIGHT);
    for (const tick of niceTicks(0, highest, 4)) {
      const line = { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) };
      const place = { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" };
      const label = svg("text", place, secondsTick(tick, highest));
      this.picture.append(svg("line", { class: "grid", ...line }), label);
    }
    const bases = bars.map(() => 0);
    nodes.forEach((_, node) => {
      let path = "";
      bars.forEach((bar, index) => {
        if (!bar.seconds[node]) return;
        const [x, wide] = this.place(bar);
        const [from, to] = [y(bases[index]), y((bases[index] += bar.seconds[node]))];
        path += `M${x.toFixed(2)} ${from.toFixed(2)}h${wide.toFixed(2)}V${to.toFixed(2)}h${(-wide).toFixed(2)}Z`;
      });
      this.picture.append(svg("path", { class: `area ${tone(node)}`, d: path }));
    });
    const tall = bottom - MARGIN.top;
    this.outline = svg("rect", { class: "picked", visibility: "hidden", y: MARGIN.top, height: tall });
    this.picture.append(svg("rect", { class: "bars-hit", x: 0, y: 0, width, height: BARS_HEIGHT }), this.outline);
  }

  point(bar) {
    this.picked = bar;
    this.tip.hidden = bar === null;
    this.outline.setAttribute("visibility", bar ? "visible" : "hidden");
    if (!bar) return;
    const [x, wide] = this.place(bar);
    fill(this.outline, { x, width: wide }, []);
    const total = bar.seconds.reduce((sum, value) => sum + value, 0);
    const shares = bar.seconds.map((value, node) => [value, this.time.nodes[node]]).filter(([value]) => value > 0);
    const longest = shares.sort((a, b) => b[0] - a[0]).slice(0, 8);
    const steps = bar.last > bar.step ? `steps ${bar.step} to ${bar.last}, mean` : `step ${bar.step}`;
    const title = `${bar.stage}, ${steps}: ${formatSeconds(total)}`;
    const lines = longest.map(([value, node]) => `${node}  ${formatSeconds(value)}`);
    placeTip(this.tip, this.picture, x + wide / 2, MARGIN.top, [title, ...lines].join("\n"));
  }
}

// Puts the tip beside a point of the picture, inside its card.
function placeTip(tip, picture, x, y, text) {
  tip.textContent = text;
  tip.hidden = false;
  const [card, box] = [tip.parentElement.getBoundingClientRect(), picture.getBoundingClientRect()];
  const left = box.left - card.left + x;
  const fits = left + 12 + tip.offsetWidth < card.width;
  tip.style.left = `${fits ? left + 12 : Math.max(4, left - 12 - tip.offsetWidth)}px`;
  tip.style.top = `${box.top - card.top + y}px`;
}

class Timeline {
  constructor(time) {
    this.time = time;
    const range = { min: 0, max: time.timeline.length - 1, step: 1, "aria-label": "Step of the timeline" };
    this.slider = el("input", { type: "range", id: "timeline-step", ...range });
    this.back = el("button", { type: "button", "aria-label": "Step before" }, "‹");
    this.on = el("button", { type: "button", "aria-label": "Next step" }, "›");
    this.output = el("output", { for: "timeline-step" });
    this.picture = svg("svg", { role: "img" });
    this.table = el("tbody");
    this.tip = el("div", { class: "tip", hidden: "" });
    this.note = el("p", { class: "chart-note" });
    const column = (name, index) => el("th", { scope: "col", class: index ? "number" : null }, name);
    const columns = ["Node", "Mean", "Slowest", "Share"].map(column);
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...columns)), this.table);
    const stepper = el("div", { class: "stepper" }, this.back, this.slider, this.on, this.output);
    this.root = el("div", { class: "card spaced", id: "timeline" },
      el("div", { class: "card-head" }, el("h3", {}, "Timeline"), stepper), this.note, this.picture,
      el("details", {}, el("summary", { class: "note" }, "As a table"), el("div", { class: "scroll" }, table)),
      this.tip);
    this.slider.addEventListener("input", () => this.select(+this.slider.value));
    this.back.addEventListener("click", () => this.select(this.index - 1));
    this.on.addEventListener("click", () => this.select(this.index + 1));
    this.picture.addEventListener("pointermove", (event) => this.hover(event));
    this.picture.addEventListener("pointerleave", () => (this.tip.hidden = true));
    this.index = time.timeline.length - 1;
    onWidth(this.root, () => this.select(this.index));
  }

  show(stage, step) {
    const index = this.time.timeline.findIndex((entry) => entry.stage === stage && entry.step === step);
    if (index >= 0) this.select(index);
    else this.note.textContent = `step ${step} of ${stage} is older than what the timeline keeps`;
  }

  select(index) {
    this.index = index;
    const entry = this.time.timeline[index];
    this.slider.value = index;
    this.slider.setAttribute("aria-valuetext", `${entry.stage}, step ${entry.step}`);
    this.back.disabled = index === 0;
    this.on.disabled = index === this.time.timeline.length - 1;
    const ends = entry.rows.flatMap((row) => row.spans.map(([, start, duration]) => start + duration));
    this.length = Math.max(1e-9, ...ends);
    this.output.textContent = `${entry.stage}, step ${entry.step}, ${formatSeconds(this.length)}`;
    this.note.textContent = this.leftOut(entry);
    this.tip.hidden = true;
    this.draw(entry);
    this.fillTable(entry);
  }

  leftOut(entry) {
    const parts = [];
    if (this.time.steps_left_out) parts.push(`${plural(this.time.steps_left_out, "older step")} left out`);
    if (this.time.workers_left_out) parts.push(`${plural(this.time.workers_left_out, "worker")} left out`);
    const spans = entry.rows.reduce((sum, row) => sum + row.left_out, 0);
    if (spans) parts.push(`${plural(spans, "short span")} left out`);
    return parts.join("; ");
  }

  draw(entry) {
    const width = this.picture.getBoundingClientRect().width;
    const narrow = width < 480;
    const left = narrow ? 24 : ROW.label;
    this.x = (seconds) => left + ((width - left - 2) * seconds) / this.length;
    this.picture.replaceChildren();
    this.boxes = [];
    let top = 4;
    for (const row of entry.rows) {
      const name = narrow ? String(row.rank) : `worker ${row.rank}`;
      this.picture.append(svg("text", { class: "row", x: 0, y: top + ROW.lane / 2 + 4 }, name));
      row.spans.forEach((span) => this.drawSpan(span, row.rank, top));
      const lanes = 1 + Math.max(0, ...row.spans.map((span) => span[3]));
      top += (lanes - 1) * ROW.lane + ROW.height;
    }
    for (const tick of niceTicks(0, this.length, Math.max(2, width / 120))) {
      const x = this.x(tick);
      const anchor = x > width - 24 ? "end" : "middle";
      this.picture.prepend(svg("line", { class: "grid", x1: x, x2: x, y1: 0, y2: top }));
      this.picture.append(svg("text", { x, y: top + 14, "text-anchor": anchor }, secondsTick(tick, this.length)));
    }
    this.picture.setAttribute("height", top + ROW.axis);
    this.picture.setAttribute("viewBox", `0 0 ${width} ${top + ROW.axis}`);
    const what = `What each of ${plural(entry.rows.length, "worker")} did in step ${entry.step} of ${entry.stage}`;
    this.picture.setAttribute("aria-label", `${what}; the table below sums it up.`);
  }

  drawSpan([node, start, duration, depth], rank, top) {
    const [x, y] = [this.x(start), top + depth * ROW.lane];
    const width = Math.max(1, this.x(start + duration) - x);
    this.boxes.push({ node, start, duration, rank, x, y, width });
    const shape = { x, y, width, height: ROW.lane, rx: Math.min(3, width / 2) };
    this.picture.append(svg("rect", { class: `span ${tone(node)}`, ...shape }));
    const name = this.time.nodes[node];
    if (width > name.length * 7 + 8) {
      this.picture.append(svg("text", { class: "inside", x: x + 6, y: y + ROW.lane / 2 + 4 }, name));
    }
  }

  fillTable(entry) {
    const byNode = new Map(); // each worker's seconds in the node, and its rank
    for (const row of entry.rows) {
      const own = new Map();
      for (const [node, , duration] of row.spans) own.set(node, (own.get(node) ?? 0) + duration);
      for (const [node, seconds] of own) byNode.set(node, [...(byNode.get(node) ?? []), [seconds, row.rank]]);
    }
    const number = (text) => el("td", { class: "number" }, text);
    const rows = [...byNode].map(([node, seconds]) => {
      const mean = seconds.reduce((sum, [value]) => sum + value, 0) / entry.rows.length;
      const [most, rank] = seconds.reduce((best, next) => (next[0] > best[0] ? next : best));
      const name = el("td", {}, el("span", { class: `swatch ${tone(node)}` }), this.time.nodes[node]);
      const slowest = `${formatSeconds(most)} (worker ${rank})`;
      const share = `${Math.round((100 * mean) / this.length)} %`;
      return el("tr", {}, name, number(formatSeconds(mean)), number(slowest), number(share));
    });
    this.table.replaceChildren(...rows);
  }

  hover(event) {
    const frame = this.picture.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    const inside = (box) => x >= box.x && x <= box.x + box.width && y >= box.y && y <= box.y + ROW.lane;
    const box = this.boxes.findLast(inside);
    if (!box) {
      this.tip.hidden = true;
      return;
    }
    const name = `${this.time.nodes[box.node]}, worker ${box.rank}: ${formatSeconds(box.duration)}`;
    placeTip(this.tip, this.picture, x, box.y + ROW.lane + 4, `${name}\nfrom ${formatSeconds(box.start)}`);
  }
}

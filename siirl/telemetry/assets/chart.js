// Curves over steps. All charts share one cursor: a step pointed at in one of them is read in all of them.

const HEIGHT = 190;
const MARGIN = { left: 46, right: 10, top: 20, bottom: 24 };
const FEW = 24; // so few points are drawn as dots and not smoothed
const cursor = {
  at: null,
  listeners: new Set(),
  set(at) {
    this.at = at;
    this.listeners.forEach((listener) => listener());
  },
};

// Stages that share an axis, one after another. Each is as wide as its steps are many, but a short stage beside a long
// one stays wide enough to be read.
class StepAxis {
  constructor(stages, used) {
    const indices = [...used].sort((a, b) => a - b);
    const steps = (index) => stages[index].last - stages[index].first + 1;
    const total = indices.reduce((sum, index) => sum + steps(index), 0);
    const wide = indices.map((index) => Math.max(steps(index) / total, 0.6 / indices.length));
    const sum = wide.reduce((a, b) => a + b, 0);
    const part = (index, order) => ({ index, ...stages[index], steps: steps(index), share: wide[order] / sum });
    this.parts = indices.map(part);
  }

  resize(left, right) {
    const width = right - left;
    for (const part of this.parts) {
      part.left = left;
      part.unit = (width * part.share) / part.steps;
      left += part.unit * part.steps;
      part.right = left;
    }
  }

  // The left and the right edge of a step's slot.
  slot(stage, step) {
    const part = this.parts.find((candidate) => candidate.index === stage);
    const left = part.left + (step - part.first) * part.unit;
    return [left, left + part.unit];
  }

  // The middle of a step's slot.
  x(stage, step) {
    const [left, right] = this.slot(stage, step);
    return (left + right) / 2;
  }

  // The stage and the step whose slot holds x.
  find(x) {
    const part = this.parts.findLast((candidate) => candidate.left <= x) ?? this.parts[0];
    const step = part.first + Math.floor((x - part.left) / part.unit);
    return { stage: part.index, step: Math.min(part.last, Math.max(part.first, step)) };
  }

  draw(root, height) {
    this.parts.forEach((part, order) => {
      const { left, right } = part;
      if (this.parts.length > 1) {
        if (order % 2 === 0) {
          const [y, tall] = [MARGIN.top, height - MARGIN.top - MARGIN.bottom];
          root.append(svg("rect", { class: "shade", x: left, y, width: right - left, height: tall }));
        }
        if (right - left > part.name.length * 6.5) {
          root.append(svg("text", { x: left + 4, y: MARGIN.top - 6 }, part.name));
        }
      }
      const ticks = niceTicks(part.first, part.last, Math.max(1, (right - left) / 55), true);
      for (const step of ticks) {
        root.append(svg("text", { x: this.x(part.index, step), y: height - 6, "text-anchor": "middle" }, String(step)));
      }
    });
  }
}

// The mean over the neighbouring points on both sides, of the same stage: unlike a running average it does not lag.
function smoothed(series) {
  const reach = Math.max(2, Math.round(series.value.length / 20));
  return series.value.map((_, index) => {
    // At a stage's ends both sides shrink alike, so that the mean stays centred.
    let side = 0;
    const same = (at) => series.stage[at] === series.stage[index];
    while (side < reach && same(index - side - 1) && same(index + side + 1)) side++;
    const near = series.value.slice(index - side, index + side + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

class Chart {
  constructor(spec, stages, options) {
    this.spec = spec;
    this.options = options;
    this.axis = new StepAxis(stages, new Set(spec.series.flatMap((series) => series.stage)));
    this.stages = stages;
    this.readout = el("div", { class: "readout", "aria-live": "off" });
    this.picture = svg("svg", { height: HEIGHT, tabindex: 0, role: "img", "aria-label": this.describe() });
    const names = spec.series.map((series, index) => [series.key.replace(/^.*_/, ""), `s${index}`]);
    const note = el("div", { class: "chart-note" }, spec.note, names.length > 1 ? legend(names) : null);
    const title = el("h3", { class: spec.title === spec.series[0].key ? "mono" : null }, spec.title);
    this.root = el("figure", { class: "card chart", "data-key": spec.series[0].key },
      el("div", { class: "chart-head" }, title, this.readout), note, this.picture);
    this.picture.addEventListener("pointermove", (event) => {
      const near = this.nearest(event.clientX - this.picture.getBoundingClientRect().left);
      cursor.set(near);
    });
    this.picture.addEventListener("pointerleave", () => cursor.set(null));
    this.picture.addEventListener("blur", () => cursor.set(null));
    this.picture.addEventListener("keydown", (event) => this.onKey(event));
    cursor.listeners.add(() => this.showCursor());
    onWidth(this.root, () => this.draw());
  }

  describe() {
    const { stage, step, value } = this.spec.series[0];
    const last = value.length - 1;
    const where = (index) => `step ${step[index]} of ${this.stages[stage[index]].name}`;
    const ends = [0, last].map((index) => `${formatNumber(value[index])} at ${where(index)}`);
    return `${this.spec.title}: ${ends.join(", ")}. Arrow keys read the values.`;
  }

  range() {
    let [low, high] = [Infinity, -Infinity];
    for (const series of this.spec.series) {
      series.value.forEach((value, index) => {
        if (this.log && value <= 0) return;
        const spread = series.band?.[index] ?? 0;
        low = Math.min(low, value - spread);
        high = Math.max(high, value + spread);
      });
    }
    return [low, high];
  }

  scale() {
    this.log = this.spec.log && this.spec.series.some((series) => series.value.some((value) => value > 0));
    let [low, high] = this.range();
    const bottom = HEIGHT - MARGIN.bottom;
    if (this.log) {
      // A value of 0 has no logarithm: it lies on the lower edge.
      const [from, to] = [Math.floor(Math.log10(low) - 0.05), Math.ceil(Math.log10(high) + 0.05)];
      const decades = (value) => (value > 0 ? Math.max(0, Math.log10(value) - from) : 0);
      this.y = (value) => bottom - ((bottom - MARGIN.top) * decades(value)) / (to - from);
      const label = (power) => (Math.abs(power) < 3 ? formatNumber(10 ** power) : `1e${power}`.replace("-", "−"));
      this.ticks = [];
      const every = Math.ceil((to - from) / 5);
      for (let power = from; power <= to; power += every) this.ticks.push([10 ** power, label(power)]);
      return;
    }
    // Never so narrow that the ticks' labels, of four digits, could not differ.
    const pad = high > low ? Math.max((high - low) * 0.06, Math.abs(high) * 2e-3) : Math.abs(high) * 0.1 || 1;
    [low, high] = [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
    this.y = (value) => bottom - ((bottom - MARGIN.top) * (value - low)) / (high - low);
    this.ticks = niceTicks(low, high, 4).map((tick) => [tick, formatNumber(tick)]);
  }

  draw() {
    const width = this.picture.getBoundingClientRect().width;
    this.picture.replaceChildren();
    this.picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.scale();
    this.axis.resize(MARGIN.left, width - MARGIN.right);
    this.axis.draw(this.picture, HEIGHT);
    for (const [value, label] of this.ticks) {
      const y = this.y(value);
      this.picture.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, label));
    }
    this.spec.series.forEach((series, index) => this.picture.append(this.drawSeries(series, index)));
    this.overlay = svg("g");
    this.picture.append(svg("rect", { x: 0, y: 0, width, height: HEIGHT, fill: "transparent" }), this.overlay);
    this.showCursor();
  }

  drawSeries(series, index) {
    const smooth = this.options.smooth && series.value.length > FEW;
    const group = svg("g", { class: `series s${index}` });
    if (series.band) group.append(svg("path", { class: "band", d: this.bandPath(series) }));
    group.append(svg("path", { class: smooth ? "curve raw" : "curve", d: this.linePath(series, series.value) }));
    if (smooth) group.append(svg("path", { class: "curve", d: this.linePath(series, smoothed(series)) }));
    if (series.value.length <= FEW) {
      const dot = (value, at) => svg("circle", { class: "dot", cx: this.x(series, at), cy: this.y(value), r: 2.5 });
      group.append(...series.value.map(dot));
    }
    return group;
  }

  x(series, index) {
    return this.axis.x(series.stage[index], series.step[index]);
  }

  linePath(series, values) {
    return values.map((value, index) => {
      const start = index === 0 || series.stage[index] !== series.stage[index - 1];
      return `${start ? "M" : "L"}${this.x(series, index).toFixed(1)} ${this.y(value).toFixed(1)}`;
    }).join("");
  }

  bandPath(series) {
    const point = (index, sign) => {
      const y = this.y(series.value[index] + sign * (series.band[index] ?? 0));
      return `${this.x(series, index).toFixed(1)} ${y.toFixed(1)}`;
    };
    return this.axis.parts.map((part) => {
      const indices = [...series.stage.keys()].filter((index) => series.stage[index] === part.index);
      if (!indices.length) return "";
      const upper = indices.map((index) => point(index, 1));
      const lower = indices.reverse().map((index) => point(index, -1));
      return `M${[...upper, ...lower].join("L")}Z`;
    }).join("");
  }

  // The index of the series' point nearest to a place on the axis; null where its stage has none.
  indexAt(series, at) {
    let best = null;
    series.step.forEach((step, index) => {
      if (series.stage[index] !== at.stage) return;
      if (best === null || Math.abs(step - at.step) < Math.abs(series.step[best] - at.step)) best = index;
    });
    return best;
  }

  nearest(x) {
    const series = this.spec.series[0];
    const index = this.indexAt(series, this.axis.find(x));
    return index === null ? null : { stage: series.stage[index], step: series.step[index] };
  }

  onKey(event) {
    const series = this.spec.series[0];
    const last = series.value.length - 1;
    const now = cursor.at ? this.indexAt(series, cursor.at) ?? last : last + 1;
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last, Escape: null }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    this.readout.setAttribute("aria-live", "polite");
    const index = next === null ? null : Math.min(last, Math.max(0, next));
    cursor.set(index === null ? null : { stage: series.stage[index], step: series.step[index] });
  }

  showCursor() {
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    const lead = this.spec.series[0];
    const { series: all } = this.spec;
    const indices = all.map((series) => (cursor.at ? this.indexAt(series, cursor.at) : series.value.length - 1));
    if (indices[0] === null) {
      this.readout.replaceChildren();
      return;
    }
    const values = all.map((series, order) => {
      const band = series.band?.[indices[order]] ?? null;
      return formatNumber(series.value[indices[order]]) + (band === null ? "" : ` ± ${formatNumber(band)}`);
    });
    const place = `step ${lead.step[indices[0]]}`;
    this.readout.replaceChildren(el("span", { class: "unseen" }, `${place}: `), values.join(" · "));
    if (!cursor.at) return;
    const x = this.x(lead, indices[0]);
    const line = svg("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    const label = svg("text", { class: "place", y: HEIGHT - 6, "text-anchor": "middle" }, place);
    this.overlay.append(line, label);
    const half = label.getComputedTextLength() / 2 + 4;
    const middle = Math.min(x, this.picture.clientWidth - half);
    label.setAttribute("x", middle);
    label.before(svg("rect", { class: "behind", x: middle - half, y: HEIGHT - 18, width: 2 * half, height: 16 }));
    all.forEach((series, order) => {
      const index = indices[order];
      if (index === null) return;
      const [cx, cy] = [this.x(series, index), this.y(series.value[index])];
      this.overlay.append(svg("circle", { class: `mark s${order}`, cx, cy, r: 3.5 }));
    });
  }
}

function legend(entries) {
  const entry = ([label, tone]) => el("li", {}, el("span", { class: `swatch ${tone}` }), label);
  return el("ul", { class: "legend" }, ...entries.map(entry));
}

function curvesSection(curves, stages) {
  const options = { smooth: false };
  const charts = [];
  const grid = (specs) => {
    const made = specs.map((spec) => new Chart(spec, stages, options));
    charts.push(...made);
    return el("div", { class: "charts" }, ...made.map((chart) => chart.root));
  };
  const smooth = el("input", { type: "checkbox", id: "smooth" });
  smooth.addEventListener("change", () => {
    options.smooth = smooth.checked;
    charts.forEach((chart) => chart.overlay && chart.draw());
  });
  const toggle = el("label", { class: "toggle" }, smooth, "Smooth");
  const section = el("section", { id: "curves" },
    el("div", { class: "section-head" }, el("h2", {}, "Curves"), toggle));
  section.append(curves.main.length ? grid(curves.main) : el("p", { class: "empty" }, "No step has ended yet."));
  if (curves.more.length) {
    const count = curves.more.length + curves.left_out.length;
    const more = el("details", { class: "more" }, el("summary", {}, `All other metrics (${count})`));
    more.addEventListener("toggle", () => {
      more.append(grid(curves.more));
      if (curves.left_out.length) more.append(el("p", { class: "note" }, `Not drawn: ${curves.left_out.join(", ")}`));
    }, { once: true });
    section.append(more);
  }
  return section;
}

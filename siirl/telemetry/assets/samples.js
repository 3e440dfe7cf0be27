// Samples to browse. A model's text is only ever put into the document as text.

const GROUPS_PER_PAGE = 8;

// The text exactly as it is; an arrow marks every newline and is no part of what is copied.
function textBlock(text, label) {
  const name = text === "" ? "text blank" : "text";
  const block = el("pre", { class: name, tabindex: 0, "aria-label": label, role: "region" });
  text.split("\n").forEach((line, index) => {
    if (index) block.append(el("span", { class: "newline" }, "\n"));
    block.append(line);
  });
  return block;
}

class Samples {
  constructor(samples, stages) {
    this.files = samples.files;
    const several = stages.length > 1 || new Set(this.files.map((file) => file.stage)).size > 1;
    const option = (file, index) =>
      el("option", { value: index }, several ? `${file.stage}, step ${file.step}` : `step ${file.step}`);
    this.step = el("select", { id: "sample-step" }, ...this.files.map(option));
    this.reward = el("select", { id: "sample-reward" });
    this.search = el("input", { type: "search", id: "sample-search", placeholder: "in prompt or response" });
    this.count = el("p", { class: "note", role: "status" });
    this.list = el("div");
    this.more = el("button", { type: "button", class: "more-button" }, "Show more");
    const field = (label, control) => el("label", {}, label, control);
    this.root = el("section", { id: "samples" }, el("div", { class: "section-head" }, el("h2", {}, "Samples")));
    if (!this.files.length) {
      this.root.append(el("p", { class: "empty" }, "No samples were recorded."));
      return;
    }
    const controls = [field("Step", this.step), field("Reward", this.reward), field("Contains", this.search)];
    this.root.append(el("div", { class: "controls" }, ...controls), this.count);
    if (samples.files_left_out) {
      const shown = `The newest ${plural(this.files.length, "step")} with samples`;
      const older = plural(samples.files_left_out, "older file");
      this.root.append(el("p", { class: "note" }, `${shown}; ${older} left out.`));
    }
    this.root.append(this.list, this.more);
    this.step.value = this.files.length - 1;
    this.step.addEventListener("change", () => this.open());
    this.reward.addEventListener("change", () => this.show());
    this.search.addEventListener("input", () => this.show());
    this.more.addEventListener("click", () => this.page());
    this.open();
  }

  open() {
    this.file = this.files[+this.step.value];
    const choices = this.rewardChoices();
    const before = this.reward.selectedOptions[0]?.textContent;
    this.choices = choices.map(([, test]) => test);
    this.reward.replaceChildren(...choices.map(([label], index) => el("option", { value: index }, label)));
    this.reward.value = Math.max(0, choices.findIndex(([label]) => label === before));
    this.show();
  }

  // What the rewards can be filtered by, each a label and a test: every value where they are few, else high and low.
  rewardChoices() {
    const rewards = this.file.samples.map((sample) => sample.reward).filter((reward) => reward !== null);
    const distinct = [...new Set(rewards)].sort((a, b) => a - b);
    const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
    [this.low, this.high] = [distinct[0], distinct[distinct.length - 1]];
    const choices = [["any", () => true]];
    if (distinct.length > 6) {
      choices.push([`above the mean (${formatNumber(mean)})`, (reward) => reward !== null && reward > mean]);
      choices.push(["at or below the mean", (reward) => reward !== null && reward <= mean]);
    } else if (distinct.length > 1) {
      distinct.forEach((value) => choices.push([formatNumber(value), (reward) => reward === value]));
    }
    if (rewards.length < this.file.samples.length) choices.push(["no reward", (reward) => reward === null]);
    return choices;
  }

  show() {
    const wanted = this.search.value;
    const fits = this.choices[+this.reward.value];
    const contains = (sample) => sample.prompt.includes(wanted) || sample.response.includes(wanted);
    const chosen = this.file.samples.filter((sample) => fits(sample.reward) && contains(sample));
    const groups = new Map();
    for (const sample of chosen) {
      const key = JSON.stringify([sample.prompt, sample.answer]);
      groups.set(key, [...(groups.get(key) ?? []), sample]);
    }
    this.groups = [...groups.values()];
    this.shown = 0;
    const left = this.file.left_out ? `; ${plural(this.file.left_out, "further sample")} of this step left out` : "";
    const count = `${chosen.length} of ${plural(this.file.samples.length, "sample")}`;
    this.count.textContent = `${count}, ${plural(this.groups.length, "prompt")}${left}`;
    this.list.replaceChildren();
    this.page();
  }

  page() {
    const next = this.groups.slice(this.shown, this.shown + GROUPS_PER_PAGE);
    this.list.append(...next.map((group) => this.group(group)));
    this.shown += next.length;
    this.more.hidden = this.shown >= this.groups.length;
  }

  group(samples) {
    const { prompt, answer } = samples[0];
    const given = el("div", { class: "given" }, el("div", { class: "label" }, "Prompt"), textBlock(prompt, "Prompt"));
    if (answer !== null) {
      const text = typeof answer === "string" ? answer : JSON.stringify(answer);
      given.append(el("div", { class: "label" }, "Answer"), textBlock(text, "Answer"));
    }
    return el("div", { class: "card group" }, given,
      el("ul", { class: "responses" }, ...samples.map((sample) => this.response(sample))));
  }

  response({ sample_id, response, reward }) {
    const length = plural([...response].length, "character");
    return el("li", { class: "sample", "data-sample": sample_id },
      el("div", { class: "label" }, this.badge(reward), length), textBlock(response, "Response"));
  }

  badge(reward) {
    if (reward === null) return el("span", { class: "reward none" }, "no reward");
    const share = this.high > this.low ? (reward - this.low) / (this.high - this.low) : 0.5;
    const level = share > 0.67 ? "high" : share < 0.33 ? "low" : "middle";
    return el("span", { class: `reward ${level}` }, `reward ${formatNumber(reward)}`);
  }
}

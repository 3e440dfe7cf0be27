"""The report: one file that shows a run, opened in Chromium, and never runs what a model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siirl.errors import RequestError, SiirlError
from siirl.telemetry.report import embed_json, report_data, write_report
from siirl.telemetry.report_curves import curves, downsample, headline_numbers

MakeRun = Callable[..., Path]

HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<!--<script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "<style>*{display:none}</style><base href='https://example.com/'>",
    "{{config}} {{script}} ${1} $& \\1 &lt;b&gt; &amp;",
    "line one\nline two\r\n\ttabbed \u2028 separator \u2029 paragraph",
    "lone \udc00 surrogate, right \u202eto left, nul \x00, bell \x07",
    "汉字 é 😀",
    "",
    "100 kB: " + "<b>long</b>\n" * 9000,
]


def hostile_samples() -> list[dict[str, Any]]:
    place = {"stage": "main", "step": 61, "prompt": HOSTILE[0], "answer": HOSTILE[2]}
    return [
        place | {"sample_id": (1 << 62) + number, "response": text, "reward": None if number == 1 else number / 10}
        for number, text in enumerate(HOSTILE)
    ]


def chart(key: str) -> str:
    return f'.chart[data-key="{key}"]'


@pytest.fixture
def opened(browser: Any, make_run: MakeRun) -> Any:
    """The browser with a hostile run's report open."""
    browser.open(write_report(make_run(extra_samples=hostile_samples())))
    return browser


def test_the_page_opens_without_a_complaint_and_loads_nothing_else(opened: Any) -> None:
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("file:")] == []
    assert len(opened.requests) == 1


def test_every_chart_has_its_curve(opened: Any) -> None:
    assert opened.each("#curves .chart", "node.dataset.key") == [
        "reward/mean",
        "eval/reward_mean",
        "response/length_mean",
        "actor/kl",
        "actor/entropy",
        "rollout/logprob_diff_max",
        "actor/grad_norm",
        "actor/loss",
        "throughput/tokens_per_s",
    ]
    lengths = opened.each("#curves .curve", "node.getTotalLength()")
    assert len(lengths) == 10, "the log-prob gap has two curves"
    assert min(lengths) > 100
    (band,) = opened.each("#curves .band", "node.getBBox().height")
    assert band > 20


def test_stages_share_an_axis_and_the_first_is_shaded(opened: Any) -> None:
    assert len(opened.texts(f"{chart('actor/loss')} .shade")) == 1
    (path,) = opened.each(f"{chart('actor/loss')} .curve", "node.getAttribute('d')")
    assert path.count("M") == 2, "the curve does not join the stages"
    assert {"warmup.0", "main"} <= set(opened.texts(f"{chart('actor/loss')} text"))
    assert opened.texts(f"{chart('reward/mean')} .shade") == []


def test_a_short_stage_beside_a_long_one_stays_readable(browser: Any, make_run: MakeRun) -> None:
    browser.open(write_report(make_run(steps=10, warmup=990)))
    assert {"warmup.0", "main", "10"} <= set(browser.texts(f"{chart('actor/loss')} text"))
    (shade,) = browser.each(f"{chart('actor/loss')} .shade", "node.getBoundingClientRect().width")
    (picture,) = browser.each(f"{chart('actor/loss')} svg", "node.getBoundingClientRect().width")
    assert 0.5 * picture < shade < 0.8 * picture


def test_the_log_axis_puts_equal_factors_at_equal_distances(opened: Any) -> None:
    lines = opened.each(f"{chart('rollout/logprob_diff_max')} .grid", "+node.getAttribute('y1')")
    gaps = [low - high for low, high in zip(lines, lines[1:], strict=False)]
    assert len(gaps) >= 2
    assert gaps == [pytest.approx(gaps[0])] * len(gaps)


def test_pointing_at_a_step_reads_it_in_every_chart(opened: Any, tmp_path: Path) -> None:
    (box,) = opened.each(f"{chart('actor/kl')} svg", "node.getBoundingClientRect().toJSON()")
    opened.hover(box["left"] + 46 + (box["width"] - 56) * 29.5 / 60, box["top"] + 80)  # middle of the 30th of 60 slots
    readouts = dict(opened.each("#curves .chart", "[node.dataset.key, node.querySelector('.readout').textContent]"))
    lines = (tmp_path / "arithmetic-quickstart" / "metrics.jsonl").read_text().splitlines()
    step = next(record for line in lines if (record := json.loads(line))["step"] == 30 and record["stage"] == "main")
    for key in ("actor/kl", "eval/reward_mean"):
        assert readouts[key] == f"step 30: {step[key]:.4g}"
    assert readouts["reward/mean"] == f"step 30: {step['reward/mean']:.4g} ± {step['reward/std']:.4g}"
    opened.hover(0, 0)
    assert opened.texts(".cursor") == []


def test_the_arrow_keys_read_values_too(opened: Any) -> None:
    opened.each(f"{chart('actor/entropy')} svg", "node.focus()")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        opened.key(key)
    (readout,) = opened.each(f"{chart('actor/entropy')} .readout", "[node.textContent, node.ariaLive]")
    assert readout[0].startswith("step 3: ")
    assert readout[1] == "polite", "a screen reader says it"


def test_smoothing_adds_a_calmer_curve_over_the_raw_one(opened: Any) -> None:
    opened.each("#smooth", "node.click()")
    raw, smooth = opened.each(f"{chart('actor/grad_norm')} .curve", "node.getTotalLength()")
    assert smooth < 0.7 * raw


def test_every_other_metric_is_a_click_away(opened: Any) -> None:
    opened.each("details.more summary", "node.click()")
    opened.settle()
    keys = set(opened.each("details.more .chart", "node.dataset.key"))
    assert {"actor/clip_fraction", "time/step_s", "memory/host_peak_bytes", "reward/failed"} <= keys
    assert opened.complaints == []


def test_the_timeline_shows_a_step_by_node_and_worker(opened: Any) -> None:
    assert {"worker 0", "worker 1", "rollout", "update"} <= set(opened.texts("#timeline text"))
    assert opened.texts("#timeline output")[0].startswith("main, step 60, ")
    assert len(opened.texts("#timeline .span")) == 16, "8 nodes on 2 workers"
    opened.enter("#timeline-step", "0")
    assert opened.texts("#timeline output")[0].startswith("warmup.0, step 1, ")
    assert len(opened.texts("#timeline .span")) == 6, "3 nodes on 2 workers"


def test_a_bar_of_the_stacked_chart_opens_its_timeline(opened: Any) -> None:
    assert len(opened.texts("#time-bars .area")) == 8
    opened.each("#time-bars svg", "node.focus()")
    for key in ("Home", "ArrowRight", "Enter"):
        opened.key(key)
    assert opened.texts("#time-bars .tip")[0].startswith("warmup.0, step 2: ")
    assert opened.texts("#timeline output")[0].startswith("warmup.0, step 2, ")


def test_the_samples_text_is_shown_literally_and_runs_nothing(opened: Any) -> None:
    assert opened.texts(".responses .text") == HOSTILE
    assert opened.texts(".given .text") == [HOSTILE[0], HOSTILE[2]]
    assert opened.run("document.title") == "arithmetic-quickstart · siirl"
    assert opened.texts("#samples :is(script, img, style, base, b)") == []
    assert len(opened.texts("script:not([type])")) == 1
    assert opened.complaints == []


def test_newlines_are_visible_and_no_part_of_the_text(opened: Any) -> None:
    marks = opened.each(".newline", "getComputedStyle(node, '::before').content")
    assert marks == ['"↵"'] * sum(text.count("\n") for text in HOSTILE)
    assert set(opened.each(".text", "getComputedStyle(node).whiteSpace")) == {"pre-wrap"}


def chosen(browser: Any, control: str, label: str) -> int:
    """Choose the option that begins with the label and return how many samples are shown."""
    options = browser.each(f"#{control} option", "[node.textContent, node.value]")
    browser.enter(f"#{control}", next(value for text, value in options if text.startswith(label)))
    return len(browser.texts(".sample"))


def test_samples_are_chosen_by_step_reward_and_text(opened: Any, tmp_path: Path) -> None:
    assert chosen(opened, "sample-reward", "above the mean") == 5  # 0.5 to 0.9 of 0, 0.2, 0.3, ..., 0.9
    assert chosen(opened, "sample-reward", "no reward") == 1
    file = tmp_path / "arithmetic-quickstart" / "samples" / "step_000030.jsonl"
    rewards = [json.loads(line)["reward"] for line in file.read_text().splitlines()]
    assert chosen(opened, "sample-step", "main, step 30") == rewards.count(None), "the filter stays"
    for label, reward in (("1", 1.0), ("0", 0.0), ("no reward", None)):
        assert chosen(opened, "sample-reward", label) == rewards.count(reward)
    assert chosen(opened, "sample-reward", "any") == 32
    opened.enter("#sample-search", "think")
    assert len(opened.texts(".sample")) == file.read_text().count("think")


def test_an_inline_script_that_is_not_the_page_s_own_is_refused(browser: Any, make_run: MakeRun) -> None:
    page = write_report(make_run())
    page.write_text(page.read_text().replace("</main>", "</main><script>document.title = 'pwned'</script>"))
    browser.open(page)
    assert browser.run("document.title") == "arithmetic-quickstart · siirl"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


@pytest.mark.parametrize("width", [400, 820, 1280])
def test_the_page_fits_its_window_and_follows_the_colour_scheme(opened: Any, width: int) -> None:
    opened.resize(width, 900)
    opened.settle()
    assert opened.run("document.documentElement.scrollWidth") == width
    box, card = "node.getBoundingClientRect()", "node.closest('.card').getBoundingClientRect()"
    place = f"[node.textContent, {box}.left - {card}.left, {card}.right - {box}.right]"
    outside = [entry for entry in opened.each("#curves svg text, #time svg text", place) if min(entry[1:]) < 0]
    assert outside == []
    for scheme, is_dark in (("dark", True), ("light", False)):
        opened.prefer(scheme)
        colour = opened.run("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", colour))) < 64) is is_dark


def test_charts_follow_a_window_that_changes(opened: Any) -> None:
    opened.resize(500, 900)
    opened.settle()
    widths = opened.each(".chart > svg", "[node.viewBox.baseVal.width, node.getBoundingClientRect().width]")
    assert all(drawn == pytest.approx(real, abs=1) for drawn, real in widths)


@pytest.mark.parametrize(
    "kept", [[], ["metrics.jsonl"], ["plan.json"], ["traces"], ["samples"], ["config.yaml", "summary.json"]]
)
def test_a_page_without_some_files_still_opens(browser: Any, make_run: MakeRun, kept: list[str]) -> None:
    run_dir = make_run(steps=2, warmup=1)
    for path in run_dir.iterdir():
        if path.name not in kept:
            path.rename(run_dir.parent / f"gone-{path.name}")
    browser.open(write_report(run_dir))
    assert browser.complaints == []
    assert browser.texts("h1") == ["arithmetic-quickstart"]
    assert len(browser.texts("main > section")) == 5


def test_a_run_of_one_step_with_equal_values_has_charts(browser: Any, tmp_path: Path) -> None:
    record = {"stage": "main", "step": 1, "reward/mean": 0.0, "reward/std": 0.0, "actor/loss": 0.0}
    record |= {"rollout/logprob_diff_max": 0.0, "rollout/logprob_diff_mean": 0.0, "throughput/tokens_per_s": 1e9}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    browser.open(write_report(tmp_path))
    assert browser.complaints == []
    assert not [node for node in browser.each("#curves svg *", "node.outerHTML") if re.search("NaN|Infinity", node)]
    assert len(browser.texts("#curves .dot")) == 5


def test_the_header_says_how_the_run_ended(browser: Any, make_run: MakeRun) -> None:
    run_dir = make_run(steps=3, warmup=2)
    error = "worker 1 was lost <b>at</b> step 3"
    summary = {
        "status": "failed",
        "device": "npu",
        "workers": 4,
        "model": "Qwen/Qwen3-0.6B",
        "seconds": 3725,
        "error": error,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    browser.open(write_report(run_dir))
    assert browser.texts(".status") == ["failed"]
    assert browser.texts(".error") == [error]
    facts = dict(browser.each(".facts div", "[...node.children].map((child) => child.textContent)"))
    assert facts == {
        "Model": "Qwen/Qwen3-0.6B",
        "Pipeline": "grpo",
        "Device": "npu",
        "Workers": "4",
        "Steps": "5",
        "Duration": "1 h 2 min",
    }


def test_the_plan_names_every_step_and_who_runs_it(opened: Any) -> None:
    cards = opened.each("#plan .card", "node.innerText")
    assert len(cards) == 2, "both workers run the same plan in both stages"
    assert "workers 0–1" in cards[1]
    for text in ("rollout", "groups → tokens", "every 10 steps", "when step % 10 == 0", "rollout_log_probs"):
        assert text in cards[1]
    assert opened.texts("#config pre")[0].startswith("name: arithmetic-quickstart\n")


# What needs no browser.


class Scripts(HTMLParser):
    """Collects the scripts of a page as an HTML parser finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


@given(text=st.text(alphabet=st.characters(exclude_categories=[]), max_size=60) | st.sampled_from(HOSTILE))
def test_embedded_data_comes_back_whatever_the_text(text: str) -> None:
    embedded = embed_json({"text": text})
    assert embedded.isascii()
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == {"text": text}


def test_the_page_holds_two_scripts_and_no_template_marks(make_run: MakeRun) -> None:
    page = write_report(make_run(extra_samples=hostile_samples())).read_text()
    parser = Scripts()
    parser.feed(page)
    assert [attributes.get("type") for attributes, _ in parser.scripts] == ["application/json", None]
    data = json.loads(parser.scripts[0][1])
    assert [sample["response"] for sample in data["samples"]["files"][-1]["samples"]] == HOSTILE


def test_a_large_sample_id_survives_exactly(make_run: MakeRun) -> None:
    data = report_data(make_run(extra_samples=hostile_samples()))
    assert data["samples"]["files"][-1]["samples"][1]["sample_id"] == "4611686018427387905"


@given(values=st.lists(st.floats(-1e9, 1e9), max_size=300), limit=st.integers(4, 64))
def test_downsampling_keeps_ends_and_extremes_within_the_limit(values: list[float], limit: int) -> None:
    kept = downsample(values, limit)
    assert kept == sorted(set(kept))
    assert len(kept) <= max(limit, 2)
    if values:
        assert {kept[0], kept[-1]} == {0, len(values) - 1}
        shown = [values[index] for index in kept]
        assert (min(shown), max(shown)) == (min(values), max(values))
    if len(values) <= limit:
        assert len(kept) == len(values)


def test_a_long_run_s_curves_are_bounded_and_keep_a_lone_spike(tmp_path: Path) -> None:
    records = [{"stage": "main", "step": step, "actor/loss": 0.1} for step in range(1, 100_001)]
    records[54_321]["actor/loss"] = 99.0
    (series,) = curves(records)["main"][0]["series"]
    assert len(series["step"]) <= 2000
    assert (series["step"][0], series["step"][-1]) == (1, 100_000)
    assert series["step"][series["value"].index(99.0)] == 54_322


def test_what_is_left_out_of_many_samples_is_counted(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for step in range(1, 31):
        row = {"stage": "main", "step": step, "prompt": "p", "response": "r", "reward": 1.0, "answer": "a"}
        lines = [json.dumps(row | {"sample_id": number}) for number in range(100)]
        (tmp_path / "samples" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    samples = report_data(tmp_path)["samples"]
    assert [file["step"] for file in samples["files"]] == list(range(11, 31))
    assert samples["files_left_out"] == 10
    assert {(len(file["samples"]), file["left_out"]) for file in samples["files"]} == {(64, 36)}


def test_samples_of_all_stages_come_in_the_order_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    row = json.dumps({"sample_id": 1, "prompt": "p", "response": "r", "reward": 1.0, "answer": None})
    for name in ("step_000002", "warmup.10_step_000001", "warmup.9_step_000005", "step_000001", "warmup.9_step_000004"):
        (tmp_path / "samples" / f"{name}.jsonl").write_text(row + "\n")
    files = report_data(tmp_path)["samples"]["files"]
    assert [(file["stage"], file["step"]) for file in files] == [
        ("warmup.9", 4),
        ("warmup.9", 5),
        ("warmup.10", 1),
        ("main", 1),
        ("main", 2),
    ]


def test_huge_samples_are_whole_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    row = {"prompt": "p", "response": "x" * 5_000_000, "reward": 1.0, "answer": None}
    for step in (1, 2):
        lines = [json.dumps(row | {"sample_id": number}) for number in range(2)]
        (tmp_path / "samples" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    samples = report_data(tmp_path)["samples"]
    assert [(file["step"], len(file["samples"]), file["left_out"]) for file in samples["files"]] == [
        (1, 1, 1),
        (2, 2, 0),
    ]
    assert all(len(sample["response"]) == 5_000_000 for file in samples["files"] for sample in file["samples"])


def test_final_numbers_are_those_of_the_last_stage() -> None:
    records: list[dict[str, Any]] = [{"stage": "warmup.0", "step": 1, "actor/loss": 9.0}]
    records += [
        {"stage": "main", "step": s, "reward/mean": r, "rollout/logprob_diff_max": d}
        for s, r, d in ((1, 0.25, 3e-6), (2, 0.75, 1e-6))
    ]
    tiles = {tile["label"]: tile for tile in headline_numbers(records)}
    assert (tiles["Reward"]["value"], tiles["Reward"]["was"]) == (0.75, 0.25)
    assert tiles["Log-prob gap"]["value"] == 3e-6
    assert headline_numbers([]) == []


def test_a_reward_that_is_not_a_number_reads_as_none(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000001.jsonl").write_text(
        '{"sample_id":1,"prompt":"p","response":"r","reward":NaN}\n'
    )
    assert report_data(tmp_path)["samples"]["files"][0]["samples"][0]["reward"] is None


def test_the_report_goes_where_it_is_asked_to(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run(steps=2, warmup=1)
    assert write_report(run_dir) == run_dir / "report.html"
    assert (
        write_report(run_dir, tmp_path / "elsewhere" / "page.html").read_text() == (run_dir / "report.html").read_text()
    )


def test_a_directory_that_is_none_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"missing is not a run's directory"):
        write_report(tmp_path / "missing")


@pytest.mark.parametrize(("name", "content"), [("plan.json", "{"), ("config.yaml", "a: [")])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SiirlError, match=name):
        write_report(tmp_path)

"""What a run writes and shows, and what two runs differ in."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from siirl.errors import RequestError
from siirl.validation.compare import compare
from siirl.validation.expected import ExpectedFailure, judge, read_expected
from siirl.validation.junit import write_junit
from siirl.validation.page import render
from siirl.validation.report import Report, Result, read_report
from siirl.validation.subject import Measurement
from siirl.validation.tables import print_report

EVIL = "</style><script>alert('x')</script>&\x00 \ud800"
PASSED = Result("L1.seed", "L1", "the same seed", "passed", "", 0.25, (Measurement("error", 1e-7, 1e-5),))
FAILED = Result("L2.accuracy[rope-torch-float32]", "L2", "near to the truth", "failed", "off by 3", 1.5)
KNOWN = Result("L3.library[all_reduce-bool]", "L3", "moves each dtype", "expected", "known: hangs", 0.5)
SKIPPED = Result("L1.record_stream", "L1", "kept for a stream", "skipped", "a host", 0.0)


def report(*results: Result, **changes: object) -> Report:
    made = Report(
        device="cpu",
        depth="smoke",
        started="2030-01-02T03:04:05+00:00",
        seconds=2.25,
        versions={"torch": "2.13.0"},
        facts={"device_name": "a processor", "memory_bytes": 2**34},
        kernels={"bound": {"rope": "torch"}, "hash": "0123456789abcdef"},
        results=results or (PASSED, SKIPPED, FAILED, KNOWN),
    )
    return replace(made, **changes)


def test_the_verdict_names_the_first_promise_that_broke() -> None:
    assert report().verdict() == (
        "device 'cpu' breaks a promise of L2, kernels: near to the truth (L2.accuracy[rope-torch-float32]): off by 3"
    )
    assert ", the first of 2 that broke: " in report(FAILED, replace(FAILED, id="L2.other")).verdict()
    assert report(PASSED, SKIPPED).verdict() == "device 'cpu' keeps 1 of 1 promises"
    assert report(PASSED, KNOWN).verdict() == "device 'cpu' keeps 1 of 2 promises (1 known to differ)"


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report().to_json())
    assert read_report(path) == report()


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is no report"), ("[]", "is no report"), ('{"results": [{}]}', "is no report"), (None, "cannot be read")],
)
def test_what_is_no_report_is_refused(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RequestError, match=says):
        read_report(path)


def test_junit_counts_and_carries_any_text(tmp_path: Path) -> None:
    write_junit(report(PASSED, SKIPPED, replace(FAILED, sentence=EVIL), KNOWN), tmp_path / "junit.xml")
    suites = {suite.get("name"): suite for suite in ElementTree.parse(tmp_path / "junit.xml").getroot()}
    assert list(suites) == ["L1 device semantics", "L2 kernels", "L3 collectives"]
    counts = [tuple(int(s.get(key, "")) for key in ("tests", "failures", "skipped")) for s in suites.values()]
    assert counts == [(2, 0, 1), (1, 1, 0), (1, 0, 1)]
    failure = suites["L2 kernels"].find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == "near to the truth: </style><script>alert('x')</script>&? ?"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "style", "onload")]
        self.ids |= {value or "" for name, value in attributes if name == "id"}


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    evil = replace(FAILED, id=EVIL, title=EVIL, sentence=EVIL, measurements=(Measurement(EVIL, 1.0, 2.0),))
    page = Page(render(report(evil, PASSED, device=EVIL, versions={EVIL: EVIL}, facts={"device_name": EVIL})))
    assert "script" not in page.tags
    assert page.tags.count("style") == 1
    assert {target.removeprefix("#") for target in page.loads} <= page.ids | {"surroundings"}


def test_the_policy_admits_the_pages_style_alone() -> None:
    import base64
    import hashlib

    text = render(report())
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert style is not None
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy[1].replace("&#39;", "'") == (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{digest}'"
    )


def test_the_terminal_shows_no_line_wider_than_80() -> None:
    long = replace(FAILED, id="L2." + "long_" * 30, sentence="word " * 60)
    written = io.StringIO()
    print_report(report(PASSED, long, KNOWN), Console(file=written, width=80))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:6] == ["L2", "kernels", "·", "1", "·", "·"] for line in lines)
    assert "failed: L2." in written.getvalue()


def test_a_comparison_names_what_changed_and_what_got_worse() -> None:
    slower = replace(PASSED, measurements=(Measurement("error", 9e-6, 1e-5),))
    before = report(PASSED, replace(FAILED, status="passed", sentence=""), KNOWN)
    after = report(slower, FAILED, versions={"torch": "2.14.0"}, kernels={"bound": {"rope": "fast"}, "hash": "x"})
    found = compare(before, after)
    assert found.lines == (
        "version torch: 2.13.0 -> 2.14.0",
        "kernel rope: torch -> fast",
        "L2.accuracy[rope-torch-float32]: passed -> failed (off by 3)",
        "L3.library[all_reduce-bool]: expected -> not asked",
        "L1.seed: error: 1e-07 -> 9e-06 (limit 1e-05)",
    )
    assert [result.id for result in found.regressions] == [FAILED.id]
    assert compare(after, after).lines == ()
    assert not compare(after, after).regressions, "what failed before is no regression"


def test_noise_is_no_change() -> None:
    def with_error(value: float) -> Report:
        return report(replace(PASSED, measurements=(Measurement("error", value, 1e-5),)))

    assert not compare(with_error(6e-6), with_error(9e-6)).lines
    assert not compare(with_error(1e-9), with_error(4e-8)).lines, "far below the limit"


TOML = """
[[expected]]
check = "L3.library[all_reduce-bool]"
reason = "rounds"
url = "https://example.org/17"
expires = 2030-01-31
"""
ENTRY = ExpectedFailure("L3.library[all_reduce-bool]", "rounds", "https://example.org/17", date(2030, 1, 31))


def test_expected_failures_are_read(tmp_path: Path) -> None:
    path = tmp_path / "expected_failures.toml"
    path.write_text(TOML)
    assert read_expected(path) == [ENTRY]
    assert read_expected(None) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TOML.replace('url = "https://example.org/17"\n', ""), "entry 1: 'url' is missing"),
        (TOML.replace("2030-01-31", '"2030-01-31"'), "'expires' is missing, or no date"),
        (TOML + 'owner = "me"\n', "unknown key 'owner'"),
        (TOML.replace("expected", "known"), r"tables \[\[expected\]\] alone, not 'known'"),
        ("[[expected", "is not TOML"),
    ],
)
def test_a_wrong_file_is_a_sentence(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "expected_failures.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=says):
        read_expected(path)


def test_an_expected_failure_is_strict_and_expires() -> None:
    before, last, after = date(2030, 1, 1), date(2030, 1, 31), date(2030, 2, 1)
    assert judge(ENTRY.check, "off by 1", [ENTRY], before)[0] == "expected"
    assert judge(ENTRY.check, "off by 1", [ENTRY], last)[0] == "expected"
    status, sentence = judge(ENTRY.check, "off by 1", [ENTRY], after)
    assert status == "failed"
    assert "expired on 2030-01-31" in sentence
    status, sentence = judge(ENTRY.check, None, [ENTRY], before)
    assert status == "failed"
    assert "expected to fail" in sentence
    assert judge("L3.library[all_reduce-int8]", "off by 1", [ENTRY], before) == ("failed", "off by 1")
    assert judge("L3.library[all_reduce-int8]", None, [ENTRY], before) == ("passed", "")


def test_an_entry_without_a_case_covers_all_of_them() -> None:
    entry = replace(ENTRY, check="L3.library")
    assert entry.covers("L3.library[all_reduce-bool]")
    assert entry.covers("L3.library")
    assert not entry.covers("L3.library_of_another[all_reduce-bool]")


def test_numbers_that_are_none_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report(replace(PASSED, measurements=(Measurement("error", float("nan"), 1.0),))).to_json())
    assert json.loads(path.read_text())["results"][0]["measurements"][0]["name"] == "error"
    value = read_report(path).results[0].measurements[0].value
    assert value != value

"""`junit.xml`: the results as a continuous-integration server reads them."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from siirl.validation.checks import TITLES
from siirl.validation.report import Report, Result

# What XML 1.0 cannot carry, escaped or not.
_FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(report: Report, path: Path) -> None:
    """One suite a level, one case a check; a known difference counts as skipped."""
    root = ElementTree.Element("testsuites", name=f"siirl validate {report.device}", time=f"{report.seconds:.3f}")
    for level in report.levels():
        counts = report.counts(level)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"{level} {TITLES[level]}",
            tests=str(counts.total()),
            failures=str(counts["failed"]),
            errors="0",
            skipped=str(counts["skipped"] + counts["expected"]),
            time=f"{sum(r.seconds for r in report.results if r.level == level):.3f}",
            timestamp=report.started,
        )
        for result in report.results:
            if result.level == level:
                _case(suite, result)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _case(suite: ElementTree.Element, result: Result) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=f"siirl.{result.level}", name=result.id, time=f"{result.seconds:.3f}"
    )
    if result.measurements:
        properties = ElementTree.SubElement(case, "properties")
        for each in result.measurements:
            ElementTree.SubElement(properties, "property", name=each.name, value=repr(each.value))
    if result.status == "failed":
        message = f"{result.title}: {result.sentence}"
        ElementTree.SubElement(case, "failure", type="Broken", message=_FORBIDDEN.sub("?", message))
    elif result.status in ("skipped", "expected"):
        ElementTree.SubElement(case, "skipped", message=_FORBIDDEN.sub("?", result.sentence))

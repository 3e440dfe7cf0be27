"""The pages of the documentation and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``mark`` is the comment on the line before it."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(language: str | None = None, mark: str | None = None) -> list[Block]:
    """All blocks of a language and with a mark that begins like ``mark``, page by page."""
    return [
        block
        for page in PAGES
        for block in _blocks(page)
        if language in (None, block.language) and (mark is None or block.mark.startswith(mark))
    ]


def table_cells(page: str, heading: str) -> list[str]:
    """The first cells of the first table under a heading, its own heading left out."""
    text = f"\n{(ROOT / page).read_text()}".partition(f"\n{heading}\n")[2]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert rows, f"{page}: no table under {heading}"
    return [row.split("|")[1].strip() for row in rows[0].splitlines()[2:]]


def code(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def _blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, m.start("language")) + 1, m["language"], m["mark"] or "", m["text"])
        for m in _BLOCK.finditer(text)
    ]

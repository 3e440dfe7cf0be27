"""Finds a vendor's words in source text, in any spelling, comments and strings put together from pieces included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

# So short a word is a part of others (`input`), and counts only where it stands by itself or in CamelCase.
SHORT = 3
_COMMON = {"cpu", "gloo"}


class Words:
    """Looks for words. One of more than three letters counts wherever it stands, upper or lower case."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = sorted({word.lower() for word in words} - _COMMON - {""})
        self._patterns = [_pattern(word) for word in self.words]

    def in_text(self, text: str) -> list[str]:
        """`line: word` for each place."""
        return [
            f"{number}: {match.group()}"
            for number, line in enumerate(text.splitlines(), start=1)
            for pattern in self._patterns
            for match in pattern.finditer(line)
        ]

    def hidden(self, source: str) -> list[str]:
        """`line: text` for each word that Python puts together from several literals."""
        found = []
        for node in ast.walk(ast.parse(source)):
            pieces = _literal(node)
            if pieces and self.in_text(pieces):
                found.append(f"{getattr(node, 'lineno', 0)}: {pieces!r}")
        return found

    def under(self, root: Path) -> list[str]:
        """`file:line: word` for each place in the files of a package."""
        found = []
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                text = path.read_bytes().decode(errors="ignore")
                words = self.in_text(text) or (self.hidden(text) if path.suffix == ".py" else [])
                found += [f"{path.relative_to(root.parent)}:{word}" for word in words]
        return found


def _pattern(word: str) -> re.Pattern[str]:
    if len(word) > SHORT:
        return re.compile(re.escape(word), re.IGNORECASE)
    lower, camel, upper = map(re.escape, (word, word.capitalize(), word.upper()))
    alone = rf"(?<![A-Za-z])(?:{lower}|{camel}|{upper})(?![a-z]{{2}})"
    return re.compile(rf"{alone}|(?<=[a-z])(?:{camel}|{upper})(?![a-z])")


def _literal(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_literal, node.values))
    return _literal(node.value) if isinstance(node, ast.FormattedValue) else ""

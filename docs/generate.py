"""Write the table of configuration keys into configuration.md: ``python docs/generate.py``."""

from __future__ import annotations

import json
from pathlib import Path

from siirl.config import Key, describe
from siirl.config.keys import section

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- keys: written by docs/generate.py -->", "<!-- end of keys -->"


def page(text: str) -> str:
    """The page with the table of today's schema between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE} lacks its marks"
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def tables() -> str:
    """One table a section, in the schema's order; the keys without a section come first."""
    sections: dict[str, list[Key]] = {"": []}
    for key in describe():
        sections.setdefault(key.key.rpartition(".")[0], []).append(key)
    return "\n".join(_table(name, keys) for name, keys in sections.items())


def _table(name: str, keys: list[Key]) -> str:
    model = section(tuple(name.split("."))) if name else None
    title = f"`{name}`" if name else "The run"
    about = (model.__doc__ or "").strip() if model else "Keys at the top of a recipe."
    rows = "".join(f"| `{k.key}` | {_cell(k.type)} | {_default(k)} | {_cell(k.description)} |\n" for k in keys)
    return f"### {title}\n\n{about}\n\n| key | value | default | meaning |\n| --- | --- | --- | --- |\n{rows}"


def _default(key: Key) -> str:
    return f"`{key.default if isinstance(key.default, str) else json.dumps(key.default)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

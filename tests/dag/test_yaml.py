"""Reading YAML: what a value is, where it stands, what is refused."""

from __future__ import annotations

import math
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from siirl.config.yaml import MAX_BYTES, dump_yaml, load_yaml, parse_value, parse_yaml
from siirl.errors import RequestError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E6", 1e6),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2", -2),
        ("16_384", 16384),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("nan", "nan"),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("[a, b?]", ["a", "b?"]),
        ("{a: b?}", {"a": "b?"}),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_infinities() -> None:
    assert parse_value("[.inf, +.inf, -.INF]") == [math.inf, math.inf, -math.inf]
    assert math.isnan(parse_value(".nan"))


def test_lines_of_keys_and_items() -> None:
    data, lines = parse_yaml("a: 1\n\nb:\n  - x\n  - {c: 2,\n     d: 3}\n# end\ne:\n  f: >\n    long\n", "f.yaml")
    assert data == {"a": 1, "b": ["x", {"c": 2, "d": 3}], "e": {"f": "long\n"}}
    expected = {("a",): 1, ("b",): 3, ("b", 0): 4, ("b", 1): 5, ("b", 1, "c"): 5, ("b", 1, "d"): 6, ("e", "f"): 9}
    assert {path: lines[path] for path in expected} == expected
    assert lines.where("e", "f") == "f.yaml:9"
    assert lines.where("e", "unknown", "deeper") == "f.yaml:8"


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: key 'a' is given twice; it stands on line 1 already"),
        ("x:\n  a: [1\n", "f.yaml:3: is not valid YAML: "),
        ("a: [b ? c]", "f.yaml:1: is not valid YAML: "),
        ("\ta: 1", "f.yaml:1: is not valid YAML: "),
        ("a: *b", "f.yaml:1: is not valid YAML: found undefined alias 'b'"),
        ("a: 1\n---\nb: 1\n", "f.yaml:2: is not valid YAML: "),
        ("a: !!python/object/apply:os.system [x]", "f.yaml:1: tag '!!python/object/apply:os.system' is not allowed"),
        ("a: !thing {b: 1}", "f.yaml:1: tag '!thing' is not allowed"),
        ("a: !!int abc", "f.yaml:1: 'abc' is not a YAML int"),
        ("a: &a [*a]", "f.yaml:1: an anchor contains itself"),
        ("- 1\n", "f.yaml:1: holds a list, not keys with values"),
        ("hello", "f.yaml:1: holds a single value, not keys with values"),
        ("1: a", "f.yaml:1: a key must be text; put it in quotes"),
        ("? [a]\n: b", "f.yaml:1: a key must be text; put it in quotes"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "f.yaml:3: merge keys (<<) are not supported; use 'extends'"),
        ("a: 1\nb: \x07", "f.yaml:2: holds a character that YAML does not allow"),
        ("a: " + "[" * 5000, "f.yaml:1: is not valid YAML: more than 64 levels deep"),
        (BOMB, "aliases expand to more than 100,000 values"),
        ("a: " + "9" * 5000, "is not a YAML int"),
        ("a: '" + "x" * MAX_BYTES + "'", "f.yaml: is larger than 1,000,000 bytes"),
    ],
)
def test_refusals_name_file_and_line(text: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RequestError) as error:
        parse_yaml(text, "f.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5


def test_aliases_that_only_nest_are_refused_before_the_stack_ends() -> None:
    deep = "".join(f"a{i}: &a{i} {'[' * 40}*a{i - 1}{']' * 40}\n" for i in range(1, 60))
    with pytest.raises(RequestError, match="levels"):
        parse_yaml("a0: &a0 1\n" + deep, "f.yaml")


def test_an_alias_may_be_used_twice() -> None:
    assert parse_yaml("a: &a {b: [1]}\nc: *a\nd: *a\n", "f")[0]["d"] == {"b": [1]}


def test_files(tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_yaml(file)[0] == {"a": 1}
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "empty.yaml")[0] == {}
    with pytest.raises(RequestError, match="no such file; did you mean 'recipe.yaml'"):
        load_yaml(tmp_path / "recipie.yaml")
    with pytest.raises(RequestError, match="is a directory"):
        load_yaml(tmp_path)
    file.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(RequestError, match=r"recipe.yaml:2: is not UTF-8 text"):
        load_yaml(file)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
TRAPS = st.sampled_from(["on", "1e-3", "0o7", "010", "1_000", "12:30", "~", "", "2026-01-01", "<<", "a?", "null", ".5"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5) | TRAPS, PLAIN | TRAPS, max_size=4))
def test_what_is_written_is_read_back(data: dict) -> None:
    text = dump_yaml(data)
    assert parse_yaml(text, "f.yaml")[0] == data


@pytest.mark.parametrize("text", ["on", "1e-3", "010", "12:30", "2026-01-01", "yes", "~"])
def test_written_text_stays_text_for_a_yaml_1_1_reader_too(text: str) -> None:
    assert yaml.safe_load(dump_yaml({"a": text})) == {"a": text}

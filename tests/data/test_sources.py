"""Rows are the same for the same spec and seed; what cannot be read is one sentence with file, key and line."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from siirl.config.schema import DataConfig
from siirl.data.sources import open_source, split
from siirl.errors import RequestError


def config(**values):
    return DataConfig(**values)


def rows(source):
    return [source[i] for i in range(len(source))]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def refusal(spec, **values):
    with pytest.raises(RequestError) as caught:
        open_source(str(spec), config=config(**values), seed=0)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.source: ")
    return str(caught.value)


# --- arithmetic


def test_two_digit_addition_is_every_pair_once_with_its_padded_sum():
    source = open_source("arithmetic:addition", config=config(), seed=0)
    assert source.scorer == "exact_match"
    expected = {f"{a}+{b}=": f"{a + b:03d}" for a in range(100) for b in range(100)}
    assert len(source) == len(expected) == 10_000
    assert {row["prompt"]: row["answer"] for row in rows(source)} == expected


def test_reverse_writes_the_least_significant_digit_first():
    source = open_source("arithmetic:addition?digits=1&reverse=true", config=config(), seed=0)
    answers = {row["prompt"]: row["answer"] for row in rows(source)}
    assert len(answers) == 100
    assert answers["9+8="] == "71"
    assert answers["1+2="] == "30"


def test_other_operations():
    difference = {
        r["prompt"]: r["answer"] for r in rows(open_source("arithmetic:subtraction", config=config(), seed=0))
    }
    product = {
        r["prompt"]: r["answer"] for r in rows(open_source("arithmetic:multiplication", config=config(), seed=0))
    }
    assert (difference["37-58="], difference["58-37="]) == ("-21", "021")
    assert (product["99*99="], product["3*4="]) == ("9801", "0012")


def test_many_digits_are_a_sample_without_repetition():
    source = open_source("arithmetic:addition?digits=9", config=config(), seed=0)
    assert len(source) == 200_000
    assert len({source[i]["prompt"] for i in range(0, 200_000, 10)}) == 20_000
    assert len(source[0]["answer"]) == 10


def test_a_limit_takes_pairs_from_the_whole_range():
    source = open_source("arithmetic:addition", config=config(limit=300), seed=0)
    left = [int(row["prompt"].split("+")[0]) for row in rows(source)]
    assert len(left) == 300
    assert len(set(left)) > 80  # the first 300 in counting order would have 3


def test_the_order_depends_on_the_seed_alone():
    code = (
        "import sys, json; from siirl.config.schema import DataConfig; from siirl.data.sources import open_source\n"
        "s = open_source('arithmetic:addition', config=DataConfig(), seed=5)\n"
        "print(json.dumps([s[i] for i in range(50)])); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "9"},
    )
    here = rows(open_source("arithmetic:addition", config=config(), seed=5))[:50]
    assert json.loads(done.stdout) == here
    assert rows(open_source("arithmetic:addition", config=config(), seed=6))[:50] != here


def test_columns_are_called_as_the_configuration_says():
    source = open_source("arithmetic:addition", config=config(prompt_key="question", answer_key="target"), seed=0)
    assert source[0].keys() == {"question", "target", "answer"}
    assert source[0]["target"] == source[0]["answer"]


# --- files


def test_json_lines_are_read_by_index_in_any_order(tmp_path):
    wanted = [{"prompt": f"q{i} é", "answer": i, "more": {"x": [i]}} for i in range(5)]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row, ensure_ascii=bool(i % 2)) for i, row in enumerate(wanted)]
    path.write_bytes(b"\xef\xbb\xbf" + ("\r\n\n".join(lines)).encode())  # no newline at the end
    source = open_source(str(path), config=config(), seed=0)
    assert (len(source), source.scorer) == (5, None)
    for i in (3, 0, 4, 1, 2, 3):
        assert source[i] == wanted[i]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source[index]


def test_a_json_list_is_rows_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1))
    assert rows(open_source(str(path), config=config(), seed=0)) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"}, "{broken\n")
    assert len(open_source(path, config=config(limit=2), seed=0)) == 2


def test_parquet_rows_are_json(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    import pyarrow.parquet

    columns = {
        "prompt": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
        "answer": [1.5, 2.5],
        "day": [datetime.date(2026, 1, 2)] * 2,
        "raw": [b"\x00\xff"] * 2,
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=1)
    source = open_source(str(tmp_path / "a.parquet"), config=config(), seed=0)
    assert len(source) == 2
    assert source[1] == {
        "prompt": [{"role": "user", "content": "b"}],
        "answer": 2.5,
        "day": "2026-01-02",
        "raw": "AP8=",
    }
    assert json.loads(json.dumps(source[0])) == source[0]
    assert "(data.prompt_key)" in refusal(tmp_path / "a.parquet", prompt_key="promt")
    assert "did you mean 'prompt'" in refusal(tmp_path / "a.parquet", prompt_key="promt")


def test_parquet_rows_without_a_prompt_are_left_out_or_stop(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": ["a", None, "c", ""]}), path)
    assert "row 2: 'prompt' is neither a text nor" in refusal(path)
    assert rows(open_source(str(path), config=config(on_error="skip"), seed=0)) == [{"prompt": "a"}, {"prompt": "c"}]
    path.write_text("no parquet")
    assert "is not a Parquet file" in refusal(path)


def test_the_answer_is_found_under_answer_whatever_its_column(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "solution": "s"})
    source = open_source(path, config=config(prompt_key="question", answer_key="solution"), seed=0)
    assert source[0] == {"question": "q", "solution": "s", "answer": "s"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{broken", "line 2 is not a JSON object"),
        ('{"prompt": "b"', "line 2 is not a JSON object"),
        ('"text"', "line 2 is not a JSON object but a str"),
        ('{"promt": "b"}', "line 2 has no column 'prompt' (data.prompt_key); did you mean 'promt'?"),
        ('{"question": "b", "n": 1}', "(its columns: question, n)"),
        ('{"prompt": ""}', "line 2: 'prompt' is empty"),
        ('{"prompt": null}', "line 2: 'prompt' is neither a text nor a list of messages"),
        ('{"prompt": 7}', "line 2: 'prompt' is neither"),
        ('{"prompt": []}', "line 2: 'prompt' is neither"),
        ('{"prompt": [{"role": "user"}]}', "line 2: 'prompt' is neither"),
        ('{"prompt": "\udce9"}', "line 2 is not a JSON object: 'utf-8'"),
    ],
)
def test_a_bad_row_stops_with_its_line_or_is_left_out(tmp_path, line, sentence, caplog):
    path = tmp_path / "a.jsonl"
    text = '{"prompt": "a"}\n' + line + '\n{"prompt": "c"}\n'
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    assert f"{path} {sentence}" in refusal(path) or sentence in refusal(path)
    kept = open_source(str(path), config=config(on_error="skip"), seed=0)
    assert [row["prompt"] for row in rows(kept)] == ["a", "c"]
    assert "1 rows left out" in caplog.text


def test_an_answer_column_that_was_asked_for_must_be_there(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "solution": "s"}, {"prompt": "b", "solution": None})
    assert "no column 'solutions' (data.answer_key); did you mean 'solution'" in refusal(path, answer_key="solutions")
    assert "line 2: 'solution' is null" in refusal(path, answer_key="solution")
    assert len(open_source(path, config=config(), seed=0)) == 2  # nobody asked


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("train.jsonl", "the file 'train.jsonl' does not exist; did you mean 'trains.jsonl'?"),
        ("empty.jsonl", "empty.jsonl has no usable row: it is empty"),
        ("empty.json", "empty.json has no usable row: it is empty"),
        ("cut.json", "cut.json is not a JSON list"),
        ("table.csv", "'table.csv' is no file of a known kind (.jsonl"),
        ("folder.jsonl", "'folder.jsonl' cannot be read: Is a directory"),
        ("nothing", "'nothing' is neither a file"),
        ("arithmetics:addition", "did you mean 'arithmetic'?"),
        ("arithmetic:additon", "no operation 'additon'; did you mean 'addition'?"),
        ("arithmetic:addition?digit=3", "no parameter 'digit'; did you mean 'digits'?"),
        ("arithmetic:addition?digits=0", "digits is 0, not a number from 1 to 9"),
        ("arithmetic:addition?digits=true", "digits is True"),
        ("arithmetic:addition?reverse=1", "reverse is 1, not true or false"),
        ("arithmetic:addition?reverse", "'reverse' is not KEY=VALUE"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(tmp_path, monkeypatch, spec, sentence):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "trains.jsonl", {"prompt": "a"})
    write(tmp_path / "empty.jsonl", "\n\n")
    write(tmp_path / "empty.json", "[]")
    write(tmp_path / "cut.json", '[{"prompt": "a"}')
    write(tmp_path / "table.csv", "prompt\na\n")
    (tmp_path / "folder.jsonl").mkdir()
    assert sentence in refusal(spec)


def test_the_sentence_begins_with_the_key_that_asked():
    with pytest.raises(RequestError, match=r"^data\.eval_source: "):
        open_source("nope.jsonl", config=config(), seed=0, key="data.eval_source")


def test_a_file_that_is_replaced_during_a_run_changes_no_row(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    source = open_source(path, config=config(), seed=0)
    os.replace(write(tmp_path / "new.jsonl", {"prompt": "longer than before"}), path)
    assert source[1] == {"prompt": "b"}


# --- the hub


def test_the_hub_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("owner/name")


def test_a_data_set_of_the_hub_is_read_through_its_package(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra hub is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "train.jsonl", {"prompt": "a"}, {"prompt": "b"})
    from siirl.data.source_files import open_hub

    source = open_hub("owner/name?split=train", config())
    assert rows(source) == [{"prompt": "a"}, {"prompt": "b"}]


# --- reasoning-gym


def test_reasoning_gym_rows_are_the_tasks_own():
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")
    source = open_source("reasoning-gym:chain_sum?size=20&seed=42&min_terms=2&max_terms=3", config=config(), seed=0)
    dataset = reasoning_gym.create_dataset("chain_sum", size=20, seed=42, min_terms=2, max_terms=3)
    assert (len(source), source.scorer) == (20, "reasoning_gym")
    assert [(row["prompt"], row["answer"]) for row in rows(source)] == [(e["question"], e["answer"]) for e in dataset]
    assert json.loads(json.dumps(rows(source))) == rows(source)


def test_reasoning_gym_rows_depend_on_the_seed_and_neighbouring_seeds_share_none():
    """The library seeds row i with seed + i, so its own rows for seeds 0 and 1 are one stream, shifted by one."""
    pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")

    def prompts(seed):
        source = open_source("reasoning-gym:chain_sum?min_digits=8&max_digits=8", config=config(limit=50), seed=seed)
        return [row["prompt"] for row in rows(source)]

    assert len(prompts(0)) == 50
    assert prompts(0) == prompts(0)
    assert not set(prompts(0)) & set(prompts(1))
    assert len(open_source("reasoning-gym:chain_sum", config=config(), seed=0)) == 10_000


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("reasoning-gym:chain_sums", "no task 'chain_sums'; did you mean 'chain_sum'?"),
        ("reasoning-gym:chain_sum?min_term=3", "no parameter 'min_term'; did you mean 'min_terms'?"),
        ("reasoning-gym:chain_sum?min_terms=9", "refuses these parameters: max_terms must be >= min_terms"),
        ("reasoning-gym:chain_sum?size=0", "size is 0, not a positive number"),
    ],
)
def test_wrong_reasoning_gym_requests(spec, sentence):
    pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")
    assert sentence in refusal(spec)


def test_reasoning_gym_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "pip install reasoning-gym" in refusal("reasoning-gym:chain_sum")


# --- held-out rows


@pytest.mark.parametrize("held_out", [0, 1, 500])
def test_held_out_rows_are_never_trained_on(held_out):
    source = open_source("arithmetic:addition", config=config(limit=1000), seed=0)
    train, held = split(source, held_out, seed=3)
    assert train.dtype == held.dtype == np.int64
    assert (len(train), len(held)) == (1000 - held_out, held_out)
    assert sorted([*train, *held]) == list(range(1000))
    again = split(source, held_out, seed=3)
    assert np.array_equal(train, again[0])
    assert np.array_equal(held, again[1])


def test_held_out_rows_depend_on_the_seed_and_are_spread():
    source = open_source("arithmetic:addition", config=config(), seed=0)
    held = [split(source, 500, seed)[1] for seed in range(20)]
    assert not np.array_equal(held[0], held[1])
    # The mean of 20 * 500 uniform positions below 10,000 has standard deviation 10_000 / sqrt(12 * 10_000) = 29.
    assert abs(np.mean(held) - 4999.5) < 5 * 29


def test_holding_everything_out_is_refused():
    source = open_source("arithmetic:addition", config=config(limit=10), seed=0)
    with pytest.raises(RequestError, match=r"data\.held_out=10 leaves nothing to train on: .* has 10 rows"):
        split(source, 10, seed=0)

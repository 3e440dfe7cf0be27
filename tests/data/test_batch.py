"""A Batch is rows under named columns; whatever is done to it, a row's values stay together and bit-identical."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from siirl.data.batch import Batch, Ragged, as_bytes

DTYPES = [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.bool]


def ragged(lengths: list[int], dtype: torch.dtype = torch.int64, width: int | None = None) -> Ragged:
    shape = (sum(lengths),) if width is None else (sum(lengths), width)
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Ragged(values, torch.tensor([0, *lengths]).cumsum(0))


def lists(column: Ragged) -> list[list]:
    return [row.tolist() for row in column.rows()]


def example() -> Batch:
    return Batch(
        {
            "id": torch.tensor([7, 8, 9]),
            "pair": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, float("nan")]], dtype=torch.bfloat16),
            "tokens": Ragged.from_lists([[1, 2, 3], [], [4]], torch.int64),
            "text": Ragged.from_texts(["né", "", "日本"]),
        }
    )


def test_a_column_of_another_length_is_refused_by_name():
    with pytest.raises(ValueError, match="column 'b' has 2 rows, the batch has 3"):
        Batch({"a": torch.zeros(3), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="column 'c' has 4 rows"):
        example().with_columns(c=ragged([1, 1, 1, 1]))
    with pytest.raises(ValueError, match="column 's' is a scalar"):
        Batch({"s": torch.tensor(1)})
    with pytest.raises(ValueError, match="column 'l' is a list"):
        Batch({"l": [1, 2]})  # type: ignore[dict-item]


@pytest.mark.parametrize("offsets", [[1, 2, 4], [0, 2, 3], [0, 3, 2, 4]])
def test_offsets_that_do_not_fit_the_values_are_refused(offsets):
    with pytest.raises(ValueError, match="ragged offsets"):
        Ragged(torch.zeros(4), torch.tensor(offsets))


def test_offsets_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="int64"):
        Ragged(torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32))


def test_a_missing_column_is_an_error_that_suggests_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'tokens'"):
        example()["token"]


def test_a_batch_cannot_be_changed_in_place():
    batch = example()
    with pytest.raises(TypeError):
        batch["id"] = torch.zeros(3)  # type: ignore[index]
    with pytest.raises(AttributeError):
        batch["tokens"].offsets = torch.zeros(4)
    changed = batch.with_columns(id=torch.zeros(3))
    assert batch["id"].tolist() == [7, 8, 9] and changed["id"].tolist() == [0, 0, 0]
    assert changed["tokens"] is batch["tokens"]


def test_columns_are_selected_dropped_and_asked_for_by_kind():
    batch = example()
    assert batch.select(["text", "id"]).names == ("text", "id")
    assert batch.drop(["text", "unknown"]).names == ("id", "pair", "tokens")
    assert "id" in batch and "unknown" not in batch and len(batch) == 3
    assert batch.lengths("tokens").tolist() == [3, 0, 1]
    with pytest.raises(ValueError, match="'id' is dense"):
        batch.ragged("id")
    with pytest.raises(ValueError, match="'text' is ragged"):
        batch.dense("text")


def test_take_picks_rows_of_every_kind_of_column_in_the_order_asked_for():
    batch = example().take([2, 0, 0])
    assert batch["id"].tolist() == [9, 7, 7]
    assert lists(batch["tokens"]) == [[4], [1, 2, 3], [1, 2, 3]]
    assert batch.texts("text") == ["日本", "né", "né"]
    assert torch.equal(as_bytes(batch["pair"][0]), as_bytes(example()["pair"][2]))
    assert len(example().take([])) == 0


def test_take_refuses_masks_and_rows_that_are_not_there():
    with pytest.raises(ValueError, match="nonzero"):
        example().take(torch.tensor([True, False, True]))
    for rows in ([3], [-1]):
        with pytest.raises(IndexError):
            example().take(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("scale", [1, 256], ids=["short rows", "long rows"])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_take_equals_picking_row_by_row(dtype, width, scale, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=12))
    column = ragged([length * scale for length in lengths], dtype, width)
    taken = Batch({"x": column}).take(rows).ragged("x")
    expected = [column.rows()[row] for row in rows]
    assert taken.dtype == dtype and len(taken) == len(rows)
    assert all(torch.equal(a, b) for a, b in zip(taken.rows(), expected, strict=True))


def test_repeat_puts_the_copies_of_a_row_next_to_each_other():
    batch = example().repeat(2)
    assert batch["id"].tolist() == [7, 7, 8, 8, 9, 9]
    assert lists(batch["tokens"]) == [[1, 2, 3], [1, 2, 3], [], [], [4], [4]]


def test_concat_undoes_taking_apart():
    batch = example()
    assert Batch.concat([batch.take([0]), batch.take([]), batch.take([1, 2])]).equals(batch)


def test_concat_refuses_what_would_change_a_column():
    a = Batch({"x": torch.zeros(2)})
    for other in (torch.zeros(2, dtype=torch.float64), torch.zeros(2, 1), ragged([1, 1], torch.float32)):
        with pytest.raises(ValueError, match="column 'x'"):
            Batch.concat([a, Batch({"x": other})])
    with pytest.raises(ValueError, match="column 'y' is not in every batch"):
        Batch.concat([a, a.with_columns(y=torch.zeros(2))])
    with pytest.raises(ValueError, match="empty"):
        Batch.concat([])


def test_from_lists_takes_lists_and_tensors():
    assert lists(Ragged.from_lists([[1], torch.tensor([2, 3]), []], torch.int64)) == [[1], [2, 3], []]
    assert Ragged.from_lists([[0.5], []], torch.float32).values.dtype == torch.float32
    assert len(Ragged.from_lists([], torch.int64)) == 0


@settings(deadline=None)
@given(st.lists(st.text(st.characters())))  # every code point, lone surrogates too
def test_text_comes_back_exactly(texts):
    assert Ragged.from_texts(texts).texts() == texts


def test_text_is_utf8_in_memory():
    assert bytes(Ragged.from_texts(["é", "\ud800"]).values.tolist()) == b"\xc3\xa9\xed\xa0\x80"


def test_nbytes_counts_values_and_offsets():
    # 3 int64 ids, 6 bf16, 4 int64 tokens, 9 bytes of text, two offsets columns of 4 int64
    assert example().nbytes == 24 + 12 + 32 + 9 + 2 * 32


def test_equals_compares_bits_dtypes_and_kinds():
    batch = example()
    assert batch.equals(example())  # a NaN inside
    assert not batch.equals(batch.with_columns(id=torch.tensor([7, 8, 10])))
    assert not batch.equals(batch.with_columns(id=torch.tensor([7, 8, 9], dtype=torch.int32)))
    assert not batch.equals(batch.with_columns(tokens=Ragged.from_lists([[1, 2], [3], [4]], torch.int64)))
    assert not Batch({"z": torch.tensor([0.0])}).equals(Batch({"z": torch.tensor([-0.0])}))
    assert not batch.equals(batch.drop(["id"]))


def test_a_file_gives_back_the_batch(tmp_path):
    tokens = example().ragged("tokens")
    batch = example().with_columns(log_probs=Ragged(torch.rand(4), tokens.offsets), turned=torch.rand(2, 3).t())
    batch = batch.with_columns(same=batch.dense("id"))
    for rows in (batch, batch.take([2, 0]), batch.take([])):
        save_file(rows.to_tensors(), tmp_path / "rows.safetensors")
        assert Batch.from_tensors(load_file(tmp_path / "rows.safetensors")).equals(rows)


def test_to_moves_every_column():
    moved = example().to("meta")
    assert moved["id"].device.type == "meta" and moved.ragged("tokens").offsets.device.type == "meta"

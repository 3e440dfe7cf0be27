"""No line of `siirl/` knows a vendor: its words stand in the back ends and the kernels alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import siirl
from siirl.validation.hygiene import known_words
from siirl.validation.words import Words
from siirl_npu import NpuBackend

# Every spelling counts: `torch.cuda`, `.cuda(`, `CUDA_HOME`, `CudaGraph`, "npu:0"; `input` is another word.
WORDS = Words(["cuda", "nccl", "npu", "hccl", "torch_npu", "triton", "vllm_ascend"])


@pytest.mark.parametrize(
    "planted",
    [
        "x = torch.cuda.current_stream()",
        "x = model.cuda()",
        "x = torch.npu.device_count()",
        'init("nccl")',
        "init('cpu:gloo,npu:hccl')",
        'x.to("npu:0")',
        "import torch_npu",
        "from triton import language",
        'plugin = "vllm_ascend"',
        'os.environ["CUDA_VISIBLE_DEVICES"]',
        "class NpuThing: ...",
        "class OnNpu: ...",
        "# faster on NPUs",
        "if tensor.is_cuda: ...",
        "use_npu_kernels = True",
    ],
)
def test_the_scanner_finds_what_is_planted(planted: str) -> None:
    assert WORDS.in_text(f"import torch\n\n{planted}\n"), planted


@pytest.mark.parametrize("planted", ['getattr(torch, "cu" + "da")', 'x = "nc" "cl"', "x = f'{\"tri\"}ton'"])
def test_the_scanner_finds_words_in_pieces(planted: str) -> None:
    assert WORDS.hidden(planted), planted


@pytest.mark.parametrize(
    "innocent", ["inputs = batch['input_ids']", "INPUT = 1", "class InputNorm: ...", "unpublished", "ascending = True"]
)
def test_the_scanner_leaves_other_words_alone(innocent: str) -> None:
    assert not WORDS.in_text(innocent)
    assert not WORDS.hidden(innocent)


def test_siirl_knows_no_vendor() -> None:
    root = Path(siirl.__path__[0])
    assert len(list(root.rglob("*.py"))) > 10
    assert not WORDS.under(root)


def test_every_file_of_a_package_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "assets").mkdir(parents=True)
    (tmp_path / "pkg" / "a.py").write_text('x = "nc" "cl"\n')
    (tmp_path / "pkg" / "assets" / "page.css").write_text("\n/* hccl */\n")
    assert WORDS.under(tmp_path / "pkg") == ["pkg/a.py:1: 'nccl'", "pkg/assets/page.css:2: hccl"]


def test_installed_back_ends_name_their_own_words() -> None:
    words = known_words(NpuBackend())
    assert {"npu", "torch_npu", "hccl", "ASCEND_RT_VISIBLE_DEVICES", "cuda", "CUDA_VISIBLE_DEVICES"} <= words
    assert not {"cpu", "gloo"} & set(Words(words).words)

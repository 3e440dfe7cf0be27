"""No line of `siirl/` knows a vendor: its words stand in the back ends and the kernels alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import siirl

# Every spelling counts: `torch.cuda`, `.cuda(`, `CUDA_HOME`, `CudaGraph`, "npu:0"; `input` is another word.
ANYWHERE = re.compile(r"cuda|nccl|hccl|torch_npu|triton|vllm_ascend", re.IGNORECASE)
BOUNDED = re.compile(r"(?<![A-Za-z])(?:npu|Npu|NPU)(?![a-z]{2})|(?<=[a-z])(?:Npu|NPU)(?![a-z])")


def vendor_words(text: str) -> list[str]:
    """`line: word` for every vendor word of a file's text, comments and documentation included."""
    return [
        f"{number}: {match.group()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for pattern in (ANYWHERE, BOUNDED)
        for match in pattern.finditer(line)
    ]


def hidden_words(source: str) -> list[str]:
    """`line: word` for vendor words that Python puts together from several literals."""
    found = []
    for node in ast.walk(ast.parse(source)):
        pieces = _literal(node)
        if pieces and (vendor_words(pieces)):
            found.append(f"{getattr(node, 'lineno', 0)}: {pieces!r}")
    return found


def _literal(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_literal, node.values))
    return _literal(node.value) if isinstance(node, ast.FormattedValue) else ""


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
    assert vendor_words(f"import torch\n\n{planted}\n"), planted


@pytest.mark.parametrize("planted", ['getattr(torch, "cu" + "da")', 'x = "nc" "cl"', "x = f'{\"tri\"}ton'"])
def test_the_scanner_finds_words_in_pieces(planted: str) -> None:
    assert hidden_words(planted), planted


@pytest.mark.parametrize(
    "innocent", ["inputs = batch['input_ids']", "INPUT = 1", "class InputNorm: ...", "unpublished", "ascending = True"]
)
def test_the_scanner_leaves_other_words_alone(innocent: str) -> None:
    assert not vendor_words(innocent)
    assert not hidden_words(innocent)


def test_siirl_knows_no_vendor() -> None:
    root = Path(siirl.__path__[0])
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    assert len([path for path in files if path.suffix == ".py"]) > 10
    found = []
    for path in files:
        text = path.read_bytes().decode(errors="ignore")
        words = vendor_words(text) or (hidden_words(text) if path.suffix == ".py" else [])
        found += [f"{path.relative_to(root.parent)}:{word}" for word in words]
    assert not found, "\n".join(found)

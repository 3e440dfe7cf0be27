"""From a model path to a model and its tokenizer, on the host. Weights are never unpickled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siirl.errors import RequestError
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder
from siirl.model.expert_names import stack_experts
from siirl.model.fallback import AnyDecoder, load_fallback
from siirl.model.families import decoder_config, merge_ids, tiny_config, unsupported
from siirl.model.gguf import GGUFModel
from siirl.model.paths import TinyModel, check_path, read_json, weight_files
from siirl.model.tokenizer import char_tokenizer

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


@dataclass(frozen=True)
class Loaded:
    """A model on the host with its tokenizer; ``config`` is None where `transformers` runs the model."""

    model: AnyDecoder
    tokenizer: PreTrainedTokenizerBase
    config: DecoderConfig | None
    source: str


def load_model(
    path: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    initializer_range: float = 0.02,
    trust_remote_code: bool = False,
    base: Path | None = None,
) -> Loaded:
    """Load a model from any form of path that :func:`siirl.model.paths.check_path` reads.

    Args:
        path: a Hugging Face directory, a hub id, `gguf:FILE`, `package://PACKAGE/FILE` or
            `tiny:ARCH:HIDDEN:LAYERS:VOCAB`.
        seed: of the weights of a `tiny:` model.
        dtype: of the parameters.
        initializer_range: standard deviation of the weights of a `tiny:` model.
        trust_remote_code: run Python code that comes with a checkpoint.
        base: where relative paths begin, before the working directory.

    Raises:
        RequestError: the path, or what lies there, cannot be loaded.
    """
    place, where = check_path(path, base), f"model.path '{path}'"
    if place.tiny is not None:
        return _scratch(place.tiny, path, seed, dtype, initializer_range)
    if place.kind == "gguf":
        assert place.file is not None
        opened = GGUFModel(place.file, where)
        decoder = assemble(opened.config, opened.tensors(dtype), where)
        return Loaded(decoder, opened.tokenizer(), opened.config, path)
    directory = place.file or _download(path, where, trust_remote_code)
    return _directory(directory, path, where, dtype, trust_remote_code)


def assemble(config: DecoderConfig, tensors: dict[str, Tensor], where: str) -> Decoder:
    """A decoder that holds ``tensors`` themselves as its parameters.

    Raises:
        RequestError: a tensor is missing, or left over, or of another shape.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    expected = {name: tuple(parameter.shape) for name, parameter in decoder.state_dict().items()}
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise RequestError(f"{where} lacks {len(missing)} weights of its architecture, the first is {missing[0]}")
    if extra:
        raise RequestError(f"{where} holds {len(extra)} weights its config does not name, the first is {extra[0]}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise RequestError(f"{where}: {name} has the shape {found}, by its config it is {list(shape)}")
    decoder.load_state_dict(tensors, assign=True)
    return decoder


def _scratch(tiny: TinyModel, path: str, seed: int, dtype: torch.dtype, initializer_range: float) -> Loaded:
    config = tiny_config(tiny, initializer_range)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu")
    decoder.initialize(torch.Generator().manual_seed(seed))
    return Loaded(decoder.to(dtype), char_tokenizer(), config, path)


def _directory(directory: Path, path: str, where: str, dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
    files = weight_files(directory, where)
    hf = _read_config(directory, where, trust_remote_code)
    if getattr(hf, "quantization_config", None) is not None:
        raise RequestError(f"{where} holds quantised weights, which cannot be trained; name the unquantised checkpoint")
    tokenizer = _read_tokenizer(directory, where, trust_remote_code)
    eos = _generation_eos(directory, where)
    reason = unsupported(hf)
    if reason:
        model = load_fallback(directory, where, reason, eos, dtype=dtype, trust_remote_code=trust_remote_code)
        return Loaded(model, tokenizer, None, path)
    config, tensors = _untie(decoder_config(hf, eos), _read_tensors(files, where, dtype))
    return Loaded(assemble(config, stack_experts(config, tensors, where), where), tokenizer, config, path)


def _read_tensors(files: list[Path], where: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors, in memory of their own: a checkpoint may be written over while its model lives."""
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if not name.endswith("rotary_emb.inv_freq"):  # a constant that old checkpoints carry
                        tensors[name] = opened.get_tensor(name).to(dtype, copy=True)
        except SafetensorError as error:
            raise RequestError(f"{where}: {file.name} is no whole safetensors file ({error})") from None
    return tensors


def _untie(config: DecoderConfig, tensors: dict[str, Tensor]) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """A tied checkpoint may carry the output projection too: dropped when it is the embedding, else kept apart."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tie_embeddings or head is None or embedding is None:
        return config, tensors
    if not torch.equal(head, embedding):
        return replace(config, tie_embeddings=False), tensors
    return config, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def _read_config(directory: Path, where: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise RequestError(f"{where}: its config.json cannot be used ({_first_line(error)})") from None


def _read_tokenizer(directory: Path, where: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    settings = directory / "tokenizer_config.json"
    declared = read_json(settings, where).get("tokenizer_class") if settings.is_file() else None
    # AutoTokenizer gives a Qwen2 model Qwen2's own text splitting, whatever tokenizer.json says.
    generic = declared in _GENERIC_TOKENIZERS and (directory / "tokenizer.json").is_file()
    try:
        if generic:
            return PreTrainedTokenizerFast.from_pretrained(directory)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RequestError(f"{where}: its tokenizer cannot be loaded ({_first_line(error)})") from None


def _generation_eos(directory: Path, where: str) -> tuple[int, ...]:
    file = directory / "generation_config.json"
    return merge_ids(read_json(file, where).get("eos_token_id")) if file.is_file() else ()


def _download(path: str, where: str, trust_remote_code: bool) -> Path:
    patterns = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        raise RequestError(f"{where}: there is no such directory, and the hub did not give it ({reason})") from None


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.strip().splitlines()[:2]).strip() or type(error).__name__

"""``siirl generate``."""

from __future__ import annotations

import click

from siirl.cli.options import device_option
from siirl.errors import RequestError


@click.command(short_help="Let a model answer a prompt.")
@click.argument("model", metavar="CONFIG|MODEL")
@click.option("--prompt", metavar="TEXT", required=True)
@device_option
@click.option("--max-new-tokens", metavar="N", type=click.IntRange(min=1), help="Default: the config's.")
@click.option("--temperature", metavar="T", type=click.FloatRange(min=0), help="0: greedy. Default: the config's.")
@click.option("--seed", metavar="S", type=click.IntRange(min=0), default=0, show_default=True)
def generate(
    model: str, prompt: str, device: str | None, max_new_tokens: int | None, temperature: float | None, seed: int
) -> None:
    """Print the model's answer to a prompt.

    The model is that of a recipe (CONFIG), or anything that `model.path` may name: a Hugging Face
    directory such as a checkpoint's, a hub id, gguf:FILE, package://PACKAGE/FILE, tiny:ARCH:HIDDEN:LAYERS:VOCAB.
    """
    from siirl.config import Config, load
    from siirl.config.paths import is_config
    from siirl.device import resolve
    from siirl.model.paths import check_path

    if not prompt:
        raise RequestError("--prompt is empty; give the text to answer")
    config = load(model).main if is_config(model) else Config.model_validate({"model": {"path": model}})
    resolve(device, config.device)
    check_path(config.model.path)
    # All that can be refused is refused by now, before PyTorch is imported.
    from siirl.rollout.generate import generate_text

    pieces = generate_text(
        config,
        prompt,
        device=device,
        max_new_tokens=max_new_tokens or config.rollout.max_new_tokens,
        temperature=config.rollout.temperature if temperature is None else temperature,
        seed=seed,
    )
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()

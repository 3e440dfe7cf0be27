"""Text to token ids and back, with any tokenizer of `transformers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siirl.errors import RequestError
from siirl.model.families import merge_ids
from siirl.model.paths import CHARACTERS

Messages = Sequence[Mapping[str, str]]


class HasEos(Protocol):
    """A model config that names the tokens that end a response."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


def char_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `tiny:` models: printable ASCII and newline, one id each; anything else is the pad token."""
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    *,
    system_prompt: str | None = None,
    template: str = "{prompt}",
    chat: bool | None = None,
) -> list[list[int]]:
    """Token ids of prompts, each ready for a response to follow.

    Args:
        prompts: text, or chat messages with ``role`` and ``content``.
        system_prompt: a first system message where the messages have none; without a chat template, text before
            the prompt and an empty line.
        template: text around the prompt, or around the last message of the user; its ``{prompt}`` is replaced.
        chat: apply the tokenizer's chat template; None: when it has one.

    Raises:
        RequestError: there is no chat template to apply, or it refuses the messages, or ``template`` has no place
            for the prompt.
    """
    if "{prompt}" not in template:
        raise RequestError(f"data.prompt_template '{template}' has no {{prompt}}, so the prompt would be lost")
    if chat is None:
        chat = tokenizer.chat_template is not None
    if chat and tokenizer.chat_template is None:
        raise RequestError("data.chat_template is true, but the model's tokenizer has no chat template")
    if chat:
        texts = [_chat_text(tokenizer, _messages(prompt, system_prompt, template)) for prompt in prompts]
        return encode_texts(tokenizer, texts)
    prefix = _prefix(tokenizer)
    texts = [_plain_text(prompt, system_prompt, template) for prompt in prompts]
    return [prefix + ids for ids in encode_texts(tokenizer, texts)]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    *,
    system_prompt: str | None = None,
    template: str = "{prompt}",
    chat: bool | None = None,
) -> list[int]:
    """Token ids of one prompt; see `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt], system_prompt=system_prompt, template=template, chat=chat)[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of pieces of text, nothing added."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, without special tokens, spaces as the model wrote them."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def eos_ids(tokenizer: PreTrainedTokenizerBase, config: HasEos) -> list[int]:
    """Tokens that end a response: those of the model and that of the tokenizer."""
    return list(merge_ids(config.eos_token_ids, tokenizer.eos_token_id))


def _messages(prompt: str | Messages, system_prompt: str | None, template: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(each) for each in prompt]
    if not messages or any("role" not in each or "content" not in each for each in messages):
        raise RequestError("a prompt's chat messages need 'role' and 'content' each")
    last = next((each for each in reversed(messages) if each["role"] == "user"), None)
    if last is not None and template != "{prompt}":
        last["content"] = template.replace("{prompt}", last["content"])
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _plain_text(prompt: str | Messages, system_prompt: str | None, template: str) -> str:
    if not isinstance(prompt, str):
        raise RequestError("a prompt is a list of chat messages, and no chat template is there to make text of it")
    text = template.replace("{prompt}", prompt)
    return f"{system_prompt}\n\n{text}" if system_prompt else text


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise RequestError(f"the model's chat template refuses a prompt: {error}") from None
    assert isinstance(text, str)
    return text


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text. What it may put after one, an end, has no place in a prompt."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []

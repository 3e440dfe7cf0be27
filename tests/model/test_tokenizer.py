"""Prompts become token ids the way the model was taught, and responses become text unchanged."""

from __future__ import annotations

import string

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from siirl.errors import RequestError
from siirl.model.config import DecoderConfig
from siirl.model.load import load_model
from siirl.model.tokenizer import char_tokenizer, decode, encode_prompt, encode_texts, eos_ids

TEMPLATE = (
    "{% if messages[0].role == 'system' and messages|length == 1 %}{{ raise_exception('no user') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chatty() -> PreTrainedTokenizerFast:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_of(ids: list[int]) -> str:
    return char_tokenizer().decode(ids)


def test_characters_and_ids() -> None:
    tokenizer = char_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 3 + 95 + 1
    assert encode_texts(tokenizer, [" !~\n"])[0] == [3, 4, 97, 98]
    assert encode_texts(tokenizer, ["é"])[0] == [0]


def test_text_survives_and_special_tokens_do_not_show() -> None:
    tokenizer = char_tokenizer()
    text = string.digits + " a , b . c 's\n\n  (" + string.punctuation + ")"
    assert decode(tokenizer, encode_texts(tokenizer, [text])[0]) == text
    assert decode(tokenizer, [2, *encode_texts(tokenizer, ["ok"])[0], 1, 0]) == "ok"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "[user]2+2\n[assistant]"),
        ({"template": "Q: {prompt} A:"}, "[user]Q: 2+2 A:\n[assistant]"),
        ({"template": "{x} {prompt}"}, "[user]{x} 2+2\n[assistant]"),
        ({"system_prompt": "Add."}, "[system]Add.\n[user]2+2\n[assistant]"),
        ({"chat": False}, "2+2"),
        ({"chat": False, "system_prompt": "Add.", "template": "{prompt}="}, "Add.\n\n2+2="),
    ],
)
def test_a_prompt_that_is_text(settings: dict, expected: str) -> None:
    assert text_of(encode_prompt(chatty(), "2+2", **settings)) == expected


def test_a_prompt_of_messages_keeps_its_own_system_message() -> None:
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    messages += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ids = encode_prompt(chatty(), messages, system_prompt="other", template="<{prompt}>")
    assert text_of(ids) == "[system]own\n[user]a\n[assistant]b\n[user]<c>\n[assistant]"
    assert messages[-1]["content"] == "c"


def test_without_a_chat_template_text_is_taken_as_it_is() -> None:
    assert text_of(encode_prompt(char_tokenizer(), "2+2")) == "2+2"


@pytest.mark.parametrize("suffix", ["", " <eos>"])
def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_never_ends(suffix: str) -> None:
    """Llama's tokenizers put a token before each text; some also put one after it, which would end the prompt."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "<bos>": 2, "a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A{suffix}", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    assert encode_prompt(tokenizer, "a a") == [2, 3, 3]


@pytest.mark.parametrize(
    ("prompt", "settings", "expected"),
    [
        ("x", {"template": "no place"}, "data.prompt_template 'no place' has no {prompt}"),
        ("x", {"chat": True}, "the model's tokenizer has no chat template"),
        ([{"role": "user", "content": "x"}], {}, "no chat template is there to make text of it"),
    ],
)
def test_what_cannot_be_encoded_without_a_chat_template(prompt: str | list, settings: dict, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        encode_prompt(char_tokenizer(), prompt, **settings)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([{"role": "system", "content": "x"}], "the model's chat template refuses a prompt: no user"),
        ([{"role": "user", "text": "x"}], "need 'role' and 'content'"),
        ([], "need 'role' and 'content'"),
    ],
)
def test_messages_that_cannot_be_encoded(prompt: list, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        encode_prompt(chatty(), prompt)
    assert expected in str(caught.value)


def test_end_tokens_of_model_and_tokenizer() -> None:
    config = load_model("tiny:llama:64:1:128").config
    assert isinstance(config, DecoderConfig)
    assert eos_ids(char_tokenizer(), config) == [1]
    other = DecoderConfig(**{**vars(config), "eos_token_ids": (7, 9)})
    assert eos_ids(char_tokenizer(), other) == [7, 9, 1]

"""Python values through JSON and back without a change of type.

JSON turns tuples into lists and the keys of a mapping into strings; a scorer that compares with either then disagrees
with itself. Here a tuple is ``{"!tuple": [...]}`` and a mapping with keys other than strings is
``{"!dict": [[key, value], ...]}``.
"""

from __future__ import annotations

from typing import Any


def encode(value: Any) -> Any:
    """A JSON-able equivalent of `value`, which `decode` turns back."""
    if isinstance(value, tuple):
        return {"!tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("!") for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {"!dict": [[encode(key), encode(item)] for key, item in value.items()]}
    return value


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "!tuple" in value:
        return tuple(decode(item) for item in value["!tuple"])
    if "!dict" in value:
        return {decode(key): decode(item) for key, item in value["!dict"]}
    return {key: decode(item) for key, item in value.items()}

"""Conditions of nodes: ``algorithm.kl_coef > 0 and step % 10 == 0``.

A condition is parsed by Python's own parser and walked over a short list of allowed constructs: comparisons,
``and``/``or``/``not``, ``+ - * / // %`` on numbers, constants, dotted configuration keys and ``step``, the number of
the current step counted from 1. Nothing is called, indexed or looked up beyond the configuration.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from siirl.errors import RequestError, did_you_mean

MAX_LENGTH = 400
MAX_DEPTH = 50

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class _Unknown:
    """The value of everything that depends on a step that is not known yet."""


_UNKNOWN = _Unknown()


def evaluate(expression: str, config: BaseModel, step: int) -> bool:
    """The condition's truth at ``step``.

    Raises:
        RequestError: the expression is not of the allowed kind, names an unknown key, or cannot be computed.
    """
    return bool(_Evaluation(expression, config, step).run())


def decide(expression: str, config: BaseModel) -> bool | None:
    """The condition's truth when it is the same at every step, else None. Raises like `evaluate`."""
    for name in names_in(expression):
        if name != "step":
            lookup(config, name)
    value = _Evaluation(expression, config, _UNKNOWN).run()
    return None if value is _UNKNOWN else bool(value)


def names_in(expression: str) -> tuple[str, ...]:
    """The dotted names an expression mentions, ``step`` included, each once and in order."""
    return tuple(dict.fromkeys(_names(_parse(expression))))


def lookup(config: BaseModel, key: str) -> Any:
    """The value of a dotted key such as ``algorithm.kl_coef``.

    Raises:
        RequestError: there is no such key, or it names a section.
    """
    value: Any = config
    for part in key.split("."):
        known = type(value).model_fields if isinstance(value, BaseModel) else value
        if not isinstance(known, dict) or part not in known:
            raise RequestError(f"'{key}' is no configuration key{did_you_mean(key, _keys(config))}")
        value = getattr(value, part) if isinstance(value, BaseModel) else value[part]
    if isinstance(value, BaseModel):
        raise RequestError(f"'{key}' is a section of the configuration, not a value")
    return value


def _keys(section: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.expr:
    if len(expression) > MAX_LENGTH:
        raise RequestError(f"a condition of {len(expression)} characters is longer than {MAX_LENGTH}")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise RequestError(f"'{expression}' is not a condition: {error.args[0]}") from error
    _check(tree)
    return tree


def _check(node: ast.expr, depth: int = 1) -> None:
    """Refuse every construct that is not on the list."""
    if depth > MAX_DEPTH:
        raise RequestError(f"a condition is nested more than {MAX_DEPTH} levels deep")
    allowed: bool
    match node:
        case ast.Constant(value=value):
            allowed = value is None or isinstance(value, bool | int | float | str)
        case ast.Name() | ast.Attribute():
            allowed = _dotted(node) is not None
        case ast.BoolOp() | ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd()):
            allowed = True
        case ast.BinOp():
            allowed = type(node.op) in _ARITHMETIC
        case ast.Compare():
            allowed = all(
                type(op) in _COMPARISONS and (not isinstance(op, ast.Is | ast.IsNot) or _is_none(right))
                for op, right in zip(node.ops, node.comparators, strict=True)
            )
        case _:
            allowed = False
    if not allowed:
        raise RequestError(
            f"'{ast.unparse(node)}' is not allowed in a condition; use comparisons, and/or/not, arithmetic, "
            "configuration keys and 'step'"
        )
    if not isinstance(node, ast.Attribute):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                _check(child, depth + 1)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _dotted(node: ast.expr) -> str | None:
    """``a.b.c`` as text; None for an attribute of anything but a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name | ast.Attribute):
        name = _dotted(node)
        assert name is not None, "checked by _check"
        yield name
        return
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


class _Evaluation:
    """One walk over one expression; unknown values spread unless `and`/`or` settles without them."""

    def __init__(self, expression: str, config: BaseModel, step: int | _Unknown) -> None:
        self.expression = expression
        self.config = config
        self.step = step

    def run(self) -> Any:
        try:
            return self.value(_parse(self.expression))
        except ZeroDivisionError as error:
            raise RequestError(f"'{self.expression}' divides by zero") from error
        except OverflowError as error:
            raise RequestError(f"'{self.expression}' grows out of range") from error

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.BoolOp():
                return self.settle(node.values, isinstance(node.op, ast.Or))
            case ast.UnaryOp():
                return self.unary(node)
            case ast.BinOp():
                left, right = self.number(node.left), self.number(node.right)
                if right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
                    raise ZeroDivisionError
                return _UNKNOWN if _UNKNOWN in (left, right) else _ARITHMETIC[type(node.op)](left, right)
            case ast.Compare():
                return self.compare(node)
        name = _dotted(node)
        assert name is not None, "checked by _check"
        return self.step if name == "step" else lookup(self.config, name)

    def settle(self, nodes: list[ast.expr], decisive: bool) -> Any:
        """`or` is settled by the first true value (decisive), `and` by the first false one."""
        unknown = False
        for node in nodes:
            value = self.value(node)
            if value is _UNKNOWN:
                unknown = True
            elif bool(value) is decisive:
                return decisive
        return _UNKNOWN if unknown else not decisive

    def unary(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            value = self.value(node.operand)
            return value if value is _UNKNOWN else not value
        value = self.number(node.operand)
        return -value if value is not _UNKNOWN and isinstance(node.op, ast.USub) else value

    def number(self, node: ast.expr) -> Any:
        value = self.value(node)
        if value is not _UNKNOWN and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RequestError(
                f"'{self.expression}' computes with '{ast.unparse(node)}', which is {value!r}, not a number"
            )
        return value

    def compare(self, node: ast.Compare) -> Any:
        values = [self.value(item) for item in (node.left, *node.comparators)]
        known = True
        for left, op, right in zip(values, node.ops, values[1:], strict=False):
            if left is _UNKNOWN or right is _UNKNOWN:
                known = False
                continue
            try:
                holds = _COMPARISONS[type(op)](left, right)
            except TypeError as error:
                raise RequestError(f"'{self.expression}' compares {left!r} with {right!r}") from error
            if not holds:
                return False
        return True if known else _UNKNOWN

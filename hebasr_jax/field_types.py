"""Values and the annotated types of config fields: checking, reading from text, naming in words.

Types are those of `run_config`: int, float, str, bool, Literal of strings, an optional one of
these, and tuples of numbers or of Literals.
"""

import dataclasses
import math
import types
import typing
from typing import Any


def element(hint: Any) -> Any:
    """The dataclass of which `hint` is a tuple of any length, or None."""
    kind = (*typing.get_args(hint), None)[0]
    return kind if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(kind) else None


def typed(value: Any, hint: Any) -> Any:
    """The value, if it is of the type; a whole number becomes a float where one is asked for.

    Raises:
      TypeError: it is not. A bool is no number, a list no tuple; infinity and NaN are no floats.
    """
    kinds, kind = typing.get_args(hint), typing.get_origin(hint)
    if kind is types.UnionType:
        (inner,) = (option for option in kinds if option is not type(None))
        return None if value is None else typed(value, inner)
    if kind is typing.Literal and isinstance(value, str) and value in kinds:
        return value
    if kind is tuple and isinstance(value, tuple):
        of = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(of) == len(value):
            return tuple(map(typed, value, of))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise TypeError(f"{value!r} is not {words(hint)}")


def parse(text: str, hint: Any) -> Any:
    """The value that a text means in a field of this type.

    Raises:
      TypeError, ValueError: it means none.
    """
    kinds, kind = typing.get_args(hint), typing.get_origin(hint)
    if kind is types.UnionType:
        (inner,) = (option for option in kinds if option is not type(None))
        return None if text == "None" else parse(text, inner)
    if kind is tuple and (element(hint) is None or text == "()"):
        parts = [part.strip() for part in text.strip("() ").split(",") if part.strip()]
        return typed(tuple(parse(part, kinds[0]) for part in parts), hint)
    if hint is bool:
        return typed({"true": True, "false": False}.get(text.lower()), bool)
    return typed(hint(text) if hint in (int, float) else text, hint)


def words(hint: Any) -> str:
    """A type in words, with an example."""
    kinds, kind = typing.get_args(hint), typing.get_origin(hint)
    if kind is typing.Literal:
        return f"one of {', '.join(kinds)}"
    if kind is types.UnionType:
        return " or ".join(map(words, kinds))
    if dataclass := element(hint):
        return f"a tuple of {dataclass.__name__}(...), or () for none"
    if kind is tuple and (names := typing.get_args(kinds[0])):
        return f"a tuple of {' and '.join(names)}"
    if kind is tuple:
        some = kinds[-1] is Ellipsis
        count = "numbers" if some else f"{len(kinds)} numbers"
        return (
            f"{count} in a tuple, such as ({', '.join(['0.9', '1.0', '1.1'][: len(kinds) + some])})"
        )
    named = {
        int: "a whole number, such as 8",
        float: "a finite number, such as 2e-5",
        bool: "True or False",
        str: "text",
        type(None): "None",
    }
    return named.get(hint) or f"{hint.__name__}(...)"

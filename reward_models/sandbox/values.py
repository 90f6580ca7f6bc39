"""Plain data that a sandboxed program computed, compared with what a test expects. The program wrote it: any text."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MAX_RATIO = 5000  # digits; the greatest common divisor is taken, in time that grows with their square


def same(answer: str, expected: Any) -> bool:
    """Whether the value that `inside._wire` wrote equals the expected one, as `==` has it for plain data.

    Takes time in the length of the answer and, for sets and dictionaries, the square of the expected value's size:
    an answer of another size is not even built, for its keys may be chosen to collide.
    """
    try:
        value = json.loads(answer)
        return _size_of_answer(value) == _size(expected) and bool(_read(value) == expected)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError):
        return False  # nothing that `_wire` writes


def _read(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    kind, *content = value
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](map(_read, content))
    if kind == "dict":
        return {_read(key): _read(item) for key, item in content}
    if kind == "int":
        return int(content[0], 16)
    if kind == "float":
        return float.fromhex(content[0])
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind == "str":
        return bytes.fromhex(content[0]).decode("utf-8", "surrogatepass")
    if kind == "bytes":
        return bytes.fromhex(content[0])
    if kind == "ratio" and len(content[0]) + len(content[1]) < _MAX_RATIO:
        return Fraction(int(content[0], 16), int(content[1], 16))
    raise ValueError("not plain data")


def _size_of_answer(value: Any) -> int:
    """Values in the answer, containers and what they hold. Of two equal values both have the same number."""
    if not isinstance(value, list):
        return 1
    kind, *content = value
    if kind == "dict":
        return 1 + sum(_size_of_answer(key) + _size_of_answer(item) for key, item in content)
    return 1 + sum(map(_size_of_answer, content)) if kind in _CONTAINERS else 1


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(_size(key) + _size(item) for key, item in value.items())
    return 1 + sum(map(_size, value)) if isinstance(value, list | tuple | set | frozenset) else 1

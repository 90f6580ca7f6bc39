"""A calculator as an environment: the policy calls it, reads the result and answers.

    user: 481*37        assistant: <call>481*37</call>        tool: 17797        assistant: <answer>17797</answer>

What the model wrote is data. It is read by a parser of this grammar and never evaluated:

    sum = product {("+" | "-") product}    product = factor {"*" factor}    factor = digits | "-" factor | "(" sum ")"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agrpo.types import Step

MOST_CHARACTERS = 200  # of an expression
MOST_DIGITS = 30  # of a number, a result among them
_DEEPEST = 20  # brackets and signs inside each other
_TOKEN = re.compile(r"\s*([0-9]+|[-+*()])")


class NotArithmetic(ValueError):
    """An expression outside the grammar or its limits."""


def calculate(expression: str) -> int:
    """The value of an expression of whole numbers under +, −, * and brackets.

    Raises:
        NotArithmetic: it is not one, or longer, deeper or larger than the limits.
    """
    if len(expression) > MOST_CHARACTERS:
        raise NotArithmetic(f"longer than {MOST_CHARACTERS} characters")
    tokens, place = [], 0
    text = expression.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise NotArithmetic(f"cannot read {text[place]!r}")
        tokens.append(found[1])
        place = found.end()
    parser = _Parser(tokens)
    value = parser.sum(0)
    if parser.next is not None:
        raise NotArithmetic(f"cannot read {parser.next!r}")
    return value


class _Parser:
    """Recursive descent; every value is checked before the next operation can make it larger."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens[::-1]

    @property
    def next(self) -> str | None:
        return self._tokens[-1] if self._tokens else None

    def sum(self, depth: int) -> int:
        value = self._product(depth)
        while self.next in ("+", "-"):
            sign = 1 if self._tokens.pop() == "+" else -1
            value = _small(value + sign * self._product(depth))
        return value

    def _product(self, depth: int) -> int:
        value = self._factor(depth)
        while self.next == "*":
            self._tokens.pop()
            value = _small(value * self._factor(depth))
        return value

    def _factor(self, depth: int) -> int:
        if depth > _DEEPEST:
            raise NotArithmetic("nested too deep")
        token = self._tokens.pop() if self._tokens else None
        if token == "-":
            return -self._factor(depth + 1)
        if token == "(":
            value = self.sum(depth + 1)
            if self.next != ")":
                raise NotArithmetic("a bracket is open")
            self._tokens.pop()
            return value
        if token is None or not token.isdigit():
            raise NotArithmetic("it ends too early" if token is None else f"cannot read {token!r}")
        if len(token) > MOST_DIGITS:
            raise NotArithmetic(f"a number has more than {MOST_DIGITS} digits")
        return int(token)


def _small(value: int) -> int:
    if abs(value) >= 10**MOST_DIGITS:
        raise NotArithmetic(f"a result has more than {MOST_DIGITS} digits")
    return value


class Calculator:
    """Answers `<call>…</call>` with the value in a tool's turn; a turn without a call ends the conversation.

    The reward is 1 for a right answer behind at least one call that had a value, else 0: what it is for is solving the
    prompt by the tool. It reads `<answer>…</answer>` and the row's column `solution`. What the calculator cannot read
    it answers with "error".

    Args:
        right_without_call: the reward of a right answer that no call stands before.
    """

    def __init__(self, right_without_call: float = 0.0) -> None:
        self.right_without_call = right_without_call

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        if "solution" not in row:
            raise ValueError(f"the calculator reads the column solution; the row has {', '.join(row)}")
        self.solution, self.called = str(row["solution"]), False

    def step(self, said: str) -> Step:
        call = _between(said, "<call>", "</call>")
        if call is not None:
            try:
                value = str(calculate(call))
                self.called = True
            except NotArithmetic:
                value = "error"
            return Step([{"role": "tool", "content": value}])
        right = _between(said, "<answer>", "</answer>") == self.solution
        return Step(reward=float(right and (1.0 if self.called else self.right_without_call)), done=True)


def _between(text: str, opening: str, closing: str) -> str | None:
    """What stands between the last opening and its closing."""
    _, found, behind = text.rpartition(opening)
    inside, closed, _ = behind.partition(closing)
    return inside.strip() if found and closed else None

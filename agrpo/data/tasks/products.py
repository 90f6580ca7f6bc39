"""The calculator's task: products of two numbers, which a small model cannot work out and a calculator can.

The prompt is a user's turn such as "481*37". A product belongs to one split by a hash of its text, so no function can
leak a test prompt into training. Row i depends on (seed, split, i) and, where rows must differ, on those before it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any

TAGS = ["<user>", "<assistant>", "<tool>", "<call>", "</call>", "<answer>", "</answer>"]  # whole tokens
SPLITS = ("train", "validation", "test")  # about 80, 10 and 10 per cent of all products
_TRIES = 10_000  # draws without a new product before they count as exhausted


def problems(split: str, count: int = 1000, seed: int = 0, digits: int = 3) -> Iterator[dict[str, Any]]:
    """Distinct products of numbers of `digits` digits: {"prompt": a user's turn, "solution": "17797"}.

    Raises:
        ValueError: unknown split, digits below 1, or fewer than `count` products in the split.
    """
    seen: set[str] = set()
    for index in range(count):
        rng = _rng(split, seed, index, digits)
        for _ in range(_TRIES):
            text, solution = _draw(rng, split, digits)
            if text not in seen:
                break
        else:
            raise ValueError(f"found {len(seen)} products for {split}, not {count}; lower count or raise digits")
        seen.add(text)
        yield {"prompt": [{"role": "user", "content": text}], "solution": solution}


def demonstrations(
    split: str, count: int = 1000, seed: int = 0, digits: int = 3, direct: float = 0.5
) -> Iterator[dict[str, Any]]:
    """Conversations that end with the right answer, a share `direct` of them without a call. Products may repeat.

    With a call: the assistant's `<call>481*37</call>`, the tool's "17797", the assistant's `<answer>17797</answer>`.
    """
    if not 0 <= direct <= 1:
        raise ValueError(f"direct: {direct} is not a share between 0 and 1")
    for index in range(count):
        rng = _rng(split, seed, index, digits)
        text, solution = _draw(rng, split, digits)
        turns = [{"role": "user", "content": text}]
        if rng.random() >= direct:
            turns += [
                {"role": "assistant", "content": f"<call>{text}</call>"},
                {"role": "tool", "content": solution},
            ]
        yield {
            "messages": [*turns, {"role": "assistant", "content": f"<answer>{solution}</answer>"}],
            "solution": solution,
        }


def _rng(split: str, seed: int, index: int, digits: int) -> random.Random:
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if digits < 1:
        raise ValueError(f"digits: {digits}; a number has at least 1")
    return random.Random(f"products/{seed}/{split}/{index}")


def _draw(rng: random.Random, split: str, digits: int) -> tuple[str, str]:
    """A product of the split and its value."""
    while True:
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        text = f"{a}*{b}"
        if ("test", "validation", *["train"] * 8)[zlib.crc32(text.encode()) % 10] == split:
            return text, str(a * b)

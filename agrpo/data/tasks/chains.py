"""The quickstart's task: chains of one-digit numbers under + and −, from left to right, no intermediate result below 0.

"3+4-2=" asks for "<think>3+4=7;7-2=5</think><answer>5</answer>", or for the answer alone. A chain belongs to one split
by a hash of its text, so no function can leak a test chain into training. Row i depends on (seed, split, i) and, where
rows must differ, on the rows before it: a larger count only adds rows.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # whole tokens, beside the characters 0-9 + - = ;
SPLITS = ("train", "validation", "test")  # about 80, 10 and 10 per cent of all chains
_OFTEN = (2, 1, 2)  # slips of a result, of a copied number, of the answer
_TRIES = 10_000  # draws without a new chain before the chains count as exhausted


@dataclass(frozen=True)
class Chain:
    numbers: tuple[int, ...]  # each 1 to 9
    operators: str  # one fewer, + and -

    @property
    def text(self) -> str:
        return str(self.numbers[0]) + "".join(o + str(n) for o, n in zip(self.operators, self.numbers[1:], strict=True))

    @property
    def split(self) -> str:
        return ("test", "validation", *["train"] * 8)[zlib.crc32(self.text.encode()) % 10]

    @property
    def results(self) -> list[int]:
        """What each step gives; the last is the answer."""
        return _results(self.numbers, self.operators)


def problems(
    split: str, count: int = 1000, seed: int = 0, min_terms: int = 2, max_terms: int = 5
) -> Iterator[dict[str, Any]]:
    """Distinct chains: {"prompt": "3+4-2=", "solution": "5", "terms": 3}.

    Raises:
        ValueError: unknown split, bounds out of order, or fewer than `count` chains of these lengths in the split.
    """
    _check(split, min_terms, max_terms)
    seen: set[str] = set()
    for index in range(count):
        rng = _rng(seed, split, index)
        for _ in range(_TRIES):
            chain = _draw(rng, split, min_terms, max_terms)
            if chain.text not in seen:
                break
        else:
            found = f"found {len(seen)} chains of {min_terms} to {max_terms} terms for {split}, not {count}"
            raise ValueError(f"{found}; lower count or raise max_terms")
        seen.add(chain.text)
        yield {"prompt": chain.text + "=", "solution": str(chain.results[-1]), "terms": len(chain.numbers)}


def demonstrations(
    split: str, count: int = 1000, seed: int = 0, min_terms: int = 2, max_terms: int = 5, direct: float = 0.4
) -> Iterator[dict[str, Any]]:
    """Prompts and right completions, a share `direct` of them without the reasoning. Chains may repeat."""
    _check(split, min_terms, max_terms)
    _check_share(direct)
    for index in range(count):
        rng = _rng(seed, split, index)
        chain = _draw(rng, split, min_terms, max_terms)
        completion = _direct(chain.results[-1]) if rng.random() < direct else _right(chain)
        yield {"prompt": chain.text + "=", "completion": completion, "solution": str(chain.results[-1])}


def preference_groups(
    split: str,
    count: int = 1000,
    seed: int = 0,
    min_terms: int = 2,
    max_terms: int = 5,
    size: int = 4,
    direct: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Right (level 1) and wrong (level 0) completions of a chain, in random order; form says nothing of the level.

    All `size` completions reason; one is right, each other holds one slip and is as long as the right one (where a
    chain has too few such slips, the nearest length). A share `direct` of the groups holds four other completions:
    right and wrong with reasoning, right and wrong without.
    """
    _check(split, min_terms, max_terms)
    _check_share(direct)
    if size < 2:
        raise ValueError(f"size: {size}; a group needs a right and a wrong completion: at least 2")
    for index in range(count):
        rng = _rng(seed, split, index)
        chain = _draw(rng, split, min_terms, max_terms)
        right = _right(chain)
        if direct and rng.random() < direct:
            answer = chain.results[-1]
            ranked = [(right, 1), (_wrong(rng, chain, 1)[0], 0), (_direct(answer), 1), (_direct(_near(rng, answer)), 0)]
        else:
            ranked = [(right, 1), *((wrong, 0) for wrong in _wrong(rng, chain, size - 1))]
        rng.shuffle(ranked)
        completions, levels = zip(*ranked, strict=True)
        yield {
            "prompt": chain.text + "=",
            "completions": list(completions),
            "levels": list(levels),
            "solution": str(chain.results[-1]),
            "terms": len(chain.numbers),
        }


def _rng(seed: int, split: str, index: int) -> random.Random:
    return random.Random(f"chains/{seed}/{split}/{index}")


def _check(split: str, min_terms: int, max_terms: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"min_terms: {min_terms}, max_terms: {max_terms}; needed is 2 ≤ min_terms ≤ max_terms")


def _check_share(direct: float) -> None:
    if not 0 <= direct <= 1:
        raise ValueError(f"direct: {direct} is not a share between 0 and 1")


def _draw(rng: random.Random, split: str, min_terms: int, max_terms: int) -> Chain:
    terms = rng.randint(min_terms, max_terms)  # drawn first, so that long chains, more often below 0, stay as frequent
    while True:
        chain = Chain(tuple(rng.randint(1, 9) for _ in range(terms)), "".join(rng.choices("+-", k=terms - 1)))
        if chain.split == split and min(chain.results) >= 0:
            return chain


def _apply(left: int, operator: str, right: int) -> int:
    return left + right if operator == "+" else left - right


def _results(numbers: tuple[int, ...], operators: str, off_at: int = -1, off_by: int = 0) -> list[int]:
    """What each step gives when step `off_at` is wrong by `off_by` and the error is carried on."""
    results, left = [], numbers[0]
    for step, (operator, number) in enumerate(zip(operators, numbers[1:], strict=True)):
        left = _apply(left, operator, number) + (off_by if step == off_at else 0)
        results.append(left)
    return results


def _reasoned(numbers: tuple[int, ...], operators: str, results: list[int], answer: int) -> str:
    lefts = [numbers[0], *results[:-1]]
    steps = zip(lefts, operators, numbers[1:], results, strict=True)
    return "<think>" + ";".join(f"{a}{o}{b}={c}" for a, o, b, c in steps) + "</think>" + _direct(answer)


def _direct(answer: int) -> str:
    return f"<answer>{answer}</answer>"


def _right(chain: Chain) -> str:
    return _reasoned(chain.numbers, chain.operators, chain.results, chain.results[-1])


def _near(rng: random.Random, answer: int) -> int:
    """Another number close by, with as many digits: 0 to 9 and 10 to 99 have two of them within 2 always."""
    near = [n for n in range(max(0, answer - 2), answer + 3) if n != answer and len(str(n)) == len(str(answer))]
    return rng.choice(near)


def _wrong(rng: random.Random, chain: Chain, count: int) -> list[str]:
    """Distinct wrong completions: the kind of slip is drawn first, a copied number half as often as the two others."""
    length = len(_right(chain))
    rest = [sorted(slips) for slips in (_slipped_results(chain), _slipped_operands(chain), _slipped_answers(chain))]
    chosen: list[str] = []
    while len(chosen) < count:
        found = _pick(rng, rest, lambda text: len(text) == length)
        if found is None:
            nearest = min((abs(len(text) - length) for slips in rest for text in slips), default=None)
            if nearest is None:
                raise ValueError(
                    f"size: {count + 1}; the chain {chain.text} has {len(chosen)} different slips; lower size"
                )
            found = _pick(rng, rest, lambda text, by=nearest: abs(len(text) - length) == by)
        assert found is not None
        chosen.append(found)
        for slips in rest:
            if found in slips:
                slips.remove(found)
    return chosen


def _pick(rng: random.Random, kinds: list[list[str]], wanted: Callable[[str], bool]) -> str | None:
    usable = [[text for text in kind if wanted(text)] for kind in kinds]
    weights = [often if texts else 0 for often, texts in zip(_OFTEN, usable, strict=True)]
    return rng.choice(rng.choices(usable, weights)[0]) if any(weights) else None


def _slipped_results(chain: Chain) -> set[str]:
    """A step's result is off by 1 or 2, and everything after it follows from that."""
    found = set()
    for step in range(len(chain.operators)):
        for off in (-2, -1, 1, 2):
            results = _results(chain.numbers, chain.operators, step, off)
            if min(results) >= 0:
                found.add(_reasoned(chain.numbers, chain.operators, results, results[-1]))
    return found


def _slipped_operands(chain: Chain) -> set[str]:
    """One number is copied wrongly from the problem; the arithmetic is right."""
    found = set()
    for place in range(len(chain.numbers)):
        for digit in range(1, 10):
            numbers = (*chain.numbers[:place], digit, *chain.numbers[place + 1 :])
            results = _results(numbers, chain.operators)
            if numbers != chain.numbers and min(results) >= 0:
                found.add(_reasoned(numbers, chain.operators, results, results[-1]))
    return found


def _slipped_answers(chain: Chain) -> set[str]:
    """The steps are right; the answer is not what the last of them gives."""
    results = chain.results
    near = {results[-1] + off for off in (-2, -1, 1, 2)}
    return {_reasoned(chain.numbers, chain.operators, results, n) for n in near if n >= 0}

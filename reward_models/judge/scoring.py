"""From a judge's answers to scores: grades of single completions, or shares of comparisons won."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agrpo.types import Text
from reward_models.judge.chat import Chat, Usage
from reward_models.judge.prompts import pairwise_question, parse_score, parse_winner, placeholders, scalar_question
from reward_models.rules.texts import completion_text


class Judge:
    """What both kinds share. `usage` is of the run so far, `metrics` the same of the last call."""

    __name__ = "judge"

    def __init__(self, chat: Chat, template: str) -> None:
        self.chat, self.template = chat, template
        # Questions that no prompt tells apart may be the same ones for several prompts, and are asked once.
        self.while_sampling = "prompt" if "prompt" in placeholders(template) else None
        self.usage = Usage()
        self.metrics: dict[str, float] = vars(Usage()).copy()
        self._closed = False
        atexit.register(self.close)

    def close(self) -> None:
        """Say what was used, once, and close the cache."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self.usage != Usage():
            print(f"judge {self.chat.model}: {self.usage}", file=sys.stderr)
        if self.chat.cache is not None:
            self.chat.cache.close()

    def verdicts(self, questions: Sequence[str], parse: Callable[[str], float | None]) -> dict[str, float | None]:
        """What the judge decided: None if its answer does not say, NaN if it gave none, which counts as an error.

        Raises:
            EndpointError: it answered nothing at all.
        """
        usage, verdicts = Usage(), {}
        try:
            for question, answer in self.chat.ask(questions, usage).items():
                if answer is None:
                    verdicts[question] = math.nan
                else:
                    verdicts[question] = parse(answer.text) if answer.whole else None
            usage.unreadable = sum(verdict is None for verdict in verdicts.values())
        finally:
            self.usage.add(usage)
            self.metrics = vars(usage).copy()
        return verdicts


class ScalarJudge(Judge):
    """A grade from `low` to `high` for each completion, as the judge gives it."""

    def __init__(self, chat: Chat, template: str, low: float, high: float) -> None:
        super().__init__(chat, template)
        self.low, self.high = low, high

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """N grades: None where the judge gave none on the scale, NaN where it did not answer.

        Raises:
            EndpointError: it answered nothing at all.
            ValueError: the template names a column that the data has not.
        """
        rows = _rows(prompts, completions, columns, self.template)
        questions = [
            scalar_question(self.template, {**row, "completion": completion_text(text)}, self.low, self.high)
            for row, text in zip(rows, completions, strict=True)
        ]
        verdicts = self.verdicts(questions, lambda answer: parse_score(answer, self.low, self.high))
        return [verdicts[question] for question in questions]


class PairwiseJudge(Judge):
    """The share of its comparisons that a completion wins against others of its prompt; a tie is half a win.

    Every pair is judged in both orders and counts their mean, so that a judge who always prefers the first changes
    nothing; both answers must be readable. Equal completions tie without being asked about.

    Args:
        rounds: None compares every pair. r puts a group in a circle, in an order that its texts decide, and compares
            each completion with the r before and the r behind it: each meets 2r others, however large the group.
    """

    def __init__(self, chat: Chat, template: str, rounds: int | None) -> None:
        super().__init__(chat, template)
        self.rounds = rounds

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """N win rates: None without a comparison that can be read, NaN where none was answered.

        Raises:
            EndpointError, ValueError: as of the scalar judge.
        """
        rows = _rows(prompts, completions, columns, self.template)
        texts = [completion_text(completion) for completion in completions]
        groups: dict[str, list[int]] = {}
        for n, row in enumerate(rows):
            groups.setdefault(json.dumps(row, sort_keys=True, default=str), []).append(n)
        games = [
            (one, other, self._question(rows[one], texts[one], texts[other]))
            for members in groups.values()
            for pair in pairings([texts[n] for n in members], self.rounds)
            for one, other in itertools.permutations([members[i] for i in pair])
        ]
        verdicts = self.verdicts([question for _, _, question in games if question is not None], parse_winner)
        results = [0.5 if question is None else verdicts[question] for _, _, question in games]
        won: list[list[float | None]] = [[] for _ in completions]
        for (one, other, _), there, back in zip(games[::2], results[::2], results[1::2], strict=True):
            share = _of_both_orders(there, back)
            won[one].append(share)
            won[other].append(None if share is None else 1 - share)
        return [_win_rate(shares) for shares in won]

    def _question(self, row: Mapping[str, Any], a: str, b: str) -> str | None:
        return None if a == b else pairwise_question(self.template, {**row, "a": a, "b": b})


def pairings(texts: Sequence[str], rounds: int | None) -> list[tuple[int, int]]:
    """Which of a group meet, as indices, each pair once. The same texts always meet in the same way.

    Returns:
        every pair; or with r rounds, where the group is larger than 2r + 1, n·r of them: everyone meets 2r others.
    """
    count = len(texts)
    if rounds is None or count <= 2 * rounds + 1:
        return list(itertools.combinations(range(count), 2))
    circle = list(range(count))
    random.Random(hashlib.sha256(json.dumps(list(texts)).encode()).digest()).shuffle(circle)
    return [(circle[i], circle[(i + step) % count]) for step in range(1, rounds + 1) for i in range(count)]


def _of_both_orders(there: float | None, back: float | None) -> float | None:
    """The first one's share of a pair: NaN if an order was not answered, None if one could not be read."""
    if any(share is not None and math.isnan(share) for share in (there, back)):
        return math.nan
    return None if there is None or back is None else (there + 1 - back) / 2


def _win_rate(shares: Sequence[float | None]) -> float | None:
    readable = [share for share in shares if share is not None]
    answered = [share for share in readable if not math.isnan(share)]
    if answered:
        return sum(answered) / len(answered)
    return math.nan if readable else None


def _rows(
    prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any], template: str
) -> list[dict]:
    """Of each completion the prompt, and the columns that the template names."""
    wanted = placeholders(template)
    named = {name: values for name, values in columns.items() if name in wanted}
    return [
        {**{name: values[n] for name, values in named.items()}, "prompt": prompts[n]} for n in range(len(completions))
    ]

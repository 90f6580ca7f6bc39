"""How often one model's answers are better than another's, as a reward or a judge sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agrpo.evaluation.intervals import share_interval
from agrpo.types import InputError, Reward, Text

Answered = Mapping[str, Any]  # a row of results.jsonl


@dataclass(frozen=True)
class WinRate:
    """Of model A against B over n prompts. A tie counts one half; `interval` is of the rate, 95%, over prompts."""

    rate: float
    interval: tuple[float, float]
    wins: int  # pairs
    ties: int
    losses: int
    undecided: int  # pairs that the reward could not score: they do not count
    n: int

    def summary(self) -> dict[str, Any]:
        return {"win_rate": self.rate, **{k: v for k, v in vars(self).items() if k != "rate"}}

    def in_words(self, a: str, b: str) -> str:
        low, high = self.interval
        verdict = "better" if low > 0.5 else "worse" if high < 0.5 else "not told apart"
        left_out = f", {self.undecided} undecided" if self.undecided else ""
        return (
            f"A  {a}\nB  {b}\n"
            f"A wins {100 * self.rate:.1f}%  [{100 * low:.1f}, {100 * high:.1f}]  of {self.n} prompts: {verdict}\n"
            f"{self.wins} wins, {self.ties} ties, {self.losses} losses{left_out}\n"
        )


def answers(row: Answered, which: str) -> list[str]:
    """A row's completions: of `samples` all, of `greedy` the one. Also of a run's own evaluation-*.jsonl.

    Raises:
        InputError: it has none of that kind.
    """
    found = row.get("samples" if which == "samples" else "greedy")
    if found is None and which == "samples" and "sample" in row:
        found = [row["sample"]]  # a run's own file keeps one
    if not found:
        raise InputError(f"the results have no {which} completions of prompt {row.get('slot')}")
    listed = found if isinstance(found, list) else [found]
    return [one if isinstance(one, str) else one["text"] for one in listed]


def prompt_of(row: Answered) -> Text:
    return row["prompt"] if "prompt" in row else row["text"]


def win_rate(a: Sequence[Answered], b: Sequence[Answered], reward: Reward, which: str = "samples") -> WinRate:
    """Compare the answers of two models to the same prompts, the i-th of one with the i-th of the other.

    Both answers to a prompt are handed to the reward together. A reward that scores each alone decides by the higher
    score. One that compares, such as a pairwise judge, is asked in both orders by itself and gives shares; an order
    that decides is no win: the shares are then equal, and it is a tie.

    Raises:
        InputError: the prompts differ, or no pair could be decided.
    """
    if [prompt_of(row) for row in a] != [prompt_of(row) for row in b]:
        raise InputError("the two models were not asked the same prompts: evaluate them on the same data")
    pairs = [
        (n, one, other)
        for n, (mine, others) in enumerate(zip(a, b, strict=True))
        for one, other in zip(answers(mine, which), answers(others, which), strict=False)
    ]
    shares: list[list[float]] = [[] for _ in a]
    undecided = 0
    scores = _scores(reward, a, pairs)
    for (n, one, other), (first, second) in zip(pairs, scores, strict=True):
        if one != other and (first is None or second is None):
            undecided += 1
        else:
            shares[n].append(0.5 if one == other or first == second else float(first > second))
    decided = [share for of_prompt in shares for share in of_prompt]
    if not decided:
        raise InputError("the reward decided no pair: it abstained, or gave no readable verdict, on every one")
    means = [sum(of_prompt) / len(of_prompt) for of_prompt in shares if of_prompt]
    return WinRate(
        rate=sum(means) / len(means),
        interval=share_interval(means),
        wins=decided.count(1.0),
        ties=decided.count(0.5),
        losses=decided.count(0.0),
        undecided=undecided,
        n=len(means),
    )


def _scores(
    reward: Reward, rows: Sequence[Answered], pairs: Sequence[tuple[int, str, str]]
) -> list[tuple[float | None, float | None]]:
    """Each pair's two scores, None where the reward gave no number.

    Pairs are scored round by round, one of each prompt, so that a reward that groups by prompt sees pairs.
    """
    found: list[tuple[float | None, float | None]] = [(None, None)] * len(pairs)
    rounds: list[list[int]] = []
    seen: dict[str, int] = {}
    for place, (n, _, _) in enumerate(pairs):
        prompt = repr(prompt_of(rows[n]))
        turn = seen.get(prompt, 0)
        seen[prompt] = turn + 1
        rounds += [[] for _ in range(turn + 1 - len(rounds))]
        rounds[turn].append(place)
    for places in rounds:
        asked = [rows[pairs[place][0]] for place in places for _ in range(2)]
        texts = [text for place in places for text in pairs[place][1:]]
        spoken = [
            text if isinstance(prompt_of(row), str) else [{"role": "assistant", "content": text}]
            for row, text in zip(asked, texts, strict=True)
        ]
        names = dict.fromkeys(name for row in asked for name in row.get("columns", ()))
        columns = {name: [row.get("columns", {}).get(name) for row in asked] for name in names}
        ids: list[list[int]] = [[] for _ in asked]
        scores = reward(prompts=[prompt_of(row) for row in asked], completions=spoken, completion_ids=ids, **columns)
        values = [None if s is None or not math.isfinite(s) else float(s) for s in scores]
        for i, place in enumerate(places):
            found[place] = (values[2 * i], values[2 * i + 1])
    return found

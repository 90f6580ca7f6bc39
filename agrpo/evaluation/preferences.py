"""How well scores order held-out preference groups, and what trivial heuristics score on the same pairs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agrpo.algorithms.preference import Pairs, ordered_pairs
from agrpo.evaluation.intervals import bootstrap_interval
from agrpo.types import PreferenceGroup

_MARKUP = re.compile(r"<[^<>\s]{1,40}>|^#+ |^[-*] |^\d+\. |\*\*|\\boxed|```", re.MULTILINE)

HEURISTICS: dict[str, Callable[[str], float]] = {
    "longer": len,
    "shorter": lambda text: -len(text),
    "formatted": lambda text: len(_MARKUP.findall(text)),
    "more lines": lambda text: text.count("\n"),
}


@dataclass(frozen=True)
class PreferenceEvaluation:
    """Shares of M held-out pairs; a tie of scores counts one half."""

    accuracy: float
    by_gap: dict[int, float]
    expected_calibration_error: float  # of σ(s_i − s_j), ten bins
    brier: float
    heuristics: dict[str, float]
    pairs: int
    interval: tuple[float, float]  # of accuracy, 95%, over groups
    reliability: tuple[tuple[float, float, int], ...]  # bins that hold pairs: confidence, share right, pairs

    @property
    def best_heuristic(self) -> tuple[str, float]:
        return max(self.heuristics.items(), key=lambda item: item[1])

    def in_words(self) -> str:
        """One line for the log; it says so when the model has learned no more than a heuristic."""
        name, best = self.best_heuristic
        verdict = (
            "" if self.accuracy > best + 0.01 else ": the model has learned nothing that the heuristic does not know"
        )
        low, high = self.interval
        return (
            f"{self.pairs} held-out pairs: accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}], calibration error"
            f" {self.expected_calibration_error:.3f}; best heuristic ({name}) {best:.3f}{verdict}"
        )

    def summary(self) -> dict[str, Any]:
        name, accuracy = self.best_heuristic
        return {
            "pairwise_accuracy": self.accuracy,
            "best_heuristic": accuracy,
            "best_heuristic_name": name,
            "pairs": self.pairs,
            "accuracy_by_gap": self.by_gap,
            "expected_calibration_error": self.expected_calibration_error,
            "brier": self.brier,
            "pairwise_accuracy_interval": list(self.interval),
            "heuristics": self.heuristics,
            "reliability": [list(one) for one in self.reliability],
        }


def evaluate_scores(scores: Tensor, groups: Sequence[PreferenceGroup]) -> PreferenceEvaluation:
    """Compare (N,) scores with the groups' levels; N counts the completions of all groups, in order.

    Raises:
        ValueError: the groups hold no pair of different levels.
    """
    levels = torch.tensor([level for g in groups for level in g.levels])
    group = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g.completions) for g in groups]))
    pairs = ordered_pairs(levels, group)
    if len(pairs.gap) == 0:
        raise ValueError("the preference groups hold no pair of different levels: nothing to measure")
    lead = (scores[pairs.better] - scores[pairs.worse]).double()
    right = _wins(lead)
    gaps = {int(gap): float(right[pairs.gap == gap].mean()) for gap in pairs.gap.unique()}
    probability = lead.sigmoid()
    texts = [text for g in groups for text in g.completions]
    return PreferenceEvaluation(
        accuracy=float(right.mean()),
        by_gap=gaps,
        expected_calibration_error=calibration_error(probability),
        brier=float((1 - probability).square().mean()),
        heuristics={name: _heuristic(rule, texts, pairs) for name, rule in HEURISTICS.items()},
        pairs=len(lead),
        interval=_interval_over_groups(right, group[pairs.better]),
        reliability=reliability(probability),
    )


def _wins(lead: Tensor) -> Tensor:
    return (lead > 0).double() + 0.5 * (lead == 0).double()


def _heuristic(rule: Callable[[str], float], texts: Sequence[str], pairs: Pairs) -> float:
    values = torch.tensor([float(rule(text)) for text in texts])
    return float(_wins(values[pairs.better] - values[pairs.worse]).mean())


def _interval_over_groups(right: Tensor, group: Tensor) -> tuple[float, float]:
    """95% of the accuracy, a percentile bootstrap over groups: pairs of one group are not independent."""
    _, index = group.unique(return_inverse=True)
    counts = torch.bincount(index).double()
    shares = torch.zeros_like(counts).index_add_(0, index, right) / counts
    return bootstrap_interval(shares.tolist(), counts.tolist())


def reliability(probability: Tensor, bins: int = 10) -> tuple[tuple[float, float, int], ...]:
    """(mean confidence, share right, pairs) of each bin that holds pairs, by P(better wins), (M,).

    A pair read in either direction is the same statement, so each is turned to its favoured side: confidence
    max(p, 1 − p) against how often the favourite really is the better one.
    """
    confidence = torch.maximum(probability, 1 - probability)
    favoured_right = _wins(probability - 0.5)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return tuple(
        (float(confidence[index == b].mean()), float(favoured_right[index == b].mean()), int((index == b).sum()))
        for b in index.unique().tolist()
    )


def calibration_error(probability: Tensor, bins: int = 10) -> float:
    """Expected calibration error of P(better wins), (M,): the mean distance of `reliability` from the diagonal."""
    return sum(abs(sure - right) * count for sure, right, count in reliability(probability, bins)) / len(probability)

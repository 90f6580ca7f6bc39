"""How well scores order held-out preference groups, and what trivial heuristics score on the same pairs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agrpo.algorithms.preference import Pairs, ordered_pairs
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

    @property
    def best_heuristic(self) -> tuple[str, float]:
        return max(self.heuristics.items(), key=lambda item: item[1])

    def in_words(self) -> str:
        """One line for the log; it says so when the model has learned no more than a heuristic."""
        name, best = self.best_heuristic
        verdict = (
            "" if self.accuracy > best + 0.01 else ": the model has learned nothing that the heuristic does not know"
        )
        return f"{self.pairs} held-out pairs: accuracy {self.accuracy:.3f}; best heuristic ({name}) {best:.3f}{verdict}"

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
    )


def _wins(lead: Tensor) -> Tensor:
    return (lead > 0).double() + 0.5 * (lead == 0).double()


def _heuristic(rule: Callable[[str], float], texts: Sequence[str], pairs: Pairs) -> float:
    values = torch.tensor([float(rule(text)) for text in texts])
    return float(_wins(values[pairs.better] - values[pairs.worse]).mean())


def calibration_error(probability: Tensor, bins: int = 10) -> float:
    """Expected calibration error of P(better wins), (M,).

    A pair read in either direction is the same statement, so each is turned to its favoured side: confidence
    max(p, 1 − p) against how often the favourite really is the better one.
    """
    confidence = torch.maximum(probability, 1 - probability)
    favoured_right = _wins(probability - 0.5)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence - favoured_right)
    return float(gap.abs().sum() / len(probability))

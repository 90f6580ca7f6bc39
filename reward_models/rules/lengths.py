"""Rewards of a completion's length, in tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from reward_models.rules.answers import accuracy

if TYPE_CHECKING:
    from agrpo.types import Text

    Ids = list[list[int]] | None


def length(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: Ids = None,
    *,
    scale: int,
    tokens: int = 0,
    **columns: list[Any],
) -> list[float | None]:
    """−|n − tokens| / scale for a completion of n, never below −1. With tokens 0 a plain linear penalty on length."""
    if scale <= 0 or tokens < 0:
        raise ValueError(f"length needs scale > 0 and tokens ≥ 0, got {scale} and {tokens}")
    return [-min(1.0, abs(n - tokens) / scale) for n in _lengths(completion_ids, "length")]


def overlong(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: Ids = None,
    *,
    limit: int,
    buffer: int,
    **columns: list[Any],
) -> list[float | None]:
    """0 up to limit − buffer tokens, then linearly down to −1 at the limit and beyond.

    Source: DAPO (Yu et al. 2025), eq. 13, soft overlong punishment. `limit` is max_completion_length.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"overlong needs 0 < buffer ≤ limit, got buffer {buffer} and limit {limit}")
    return [-min(1.0, max(0.0, (n - (limit - buffer)) / buffer)) for n in _lengths(completion_ids, "overlong")]


def cosine(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: Ids = None,
    *,
    solution: list[Any],
    limit: int,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    **columns: list[Any],
) -> list[float | None]:
    """Accuracy scaled by length: from `*_short` at no tokens to `*_long` at `limit` tokens along half a cosine.

    A right answer earns more when short, a wrong one loses less when long. Beyond the limit the progress stays 1: the
    cosine would otherwise turn back. None where `accuracy` abstains.

    Source: Yeo et al. 2025, Demystifying Long Chain-of-Thought Reasoning, section 3; lengths in tokens.
    """
    if limit <= 0:
        raise ValueError(f"cosine needs limit > 0, got {limit}")
    right = accuracy(prompts, completions, completion_ids, solution=solution, **columns)
    scores: list[float | None] = []
    for score, n in zip(right, _lengths(completion_ids, "cosine"), strict=True):
        if score is None:
            scores.append(None)
            continue
        short, long = (correct_short, correct_long) if score == 1.0 else (wrong_short, wrong_long)
        scores.append(long + (short - long) * (1 + math.cos(math.pi * min(1.0, n / limit))) / 2)
    return scores


cosine.while_sampling = accuracy.while_sampling


def _lengths(completion_ids: Ids, rule: str) -> list[int]:
    if completion_ids is None:
        raise ValueError(f"{rule} counts tokens: it needs completion_ids")
    return [len(ids) for ids in completion_ids]

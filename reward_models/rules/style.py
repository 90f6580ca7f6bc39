"""Rewards of how a completion is written, whatever it says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from reward_models.rules.texts import MAX_CHARACTERS, completion_text

if TYPE_CHECKING:
    from agrpo.types import Text

_STEP = re.compile(
    r"^ *(?:Step [0-9]{1,3}\b|[0-9]{1,3}[.)] |[-*] |(?:First|Second|Third|Next|Then|Finally),)", re.MULTILINE
)


def repetition(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]] | None = None,
    *,
    n: int = 3,
    **columns: list[Any],
) -> list[float | None]:
    """−(share of word n-grams that repeat an earlier one), in (−1, 0]. 0 for texts shorter than n words.

    Source: Yeo et al. 2025, Demystifying Long Chain-of-Thought Reasoning, the repetition penalty.
    """
    if n < 1:
        raise ValueError(f"repetition needs n ≥ 1, got {n}")
    return [_repetition(completion_text(completion)[-MAX_CHARACTERS:].lower().split(), n) for completion in completions]


def _repetition(words: list[str], n: int) -> float:
    grams = list(zip(*(words[offset:] for offset in range(n)), strict=False))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def reasoning_steps(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]] | None = None,
    *,
    steps: int = 3,
    **columns: list[Any],
) -> list[float | None]:
    """Lines that open a step ("Step 2", "3. ", "- ", "Next,"), as a share of `steps`, at most 1."""
    if steps < 1:
        raise ValueError(f"reasoning_steps needs steps ≥ 1, got {steps}")
    texts = [completion_text(completion)[-MAX_CHARACTERS:] for completion in completions]
    return [min(1.0, len(_STEP.findall(text)) / steps) for text in texts]

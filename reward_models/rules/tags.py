"""Partial credit for a layout in the making."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reward_models.rules.texts import completion_text

if TYPE_CHECKING:
    from agrpo.types import Text


def tag_count(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]] | None = None,
    *,
    tags: Sequence[str] = ("<think>", "</think>", "<answer>", "</answer>"),
    **columns: list[Any],
) -> list[float | None]:
    """The share of the tags that stand in the completion exactly once, wherever that is.

    For a model that seldom keeps the whole layout, on which `format` would give every completion of a group 0. It says
    nothing of order or of what stands between: let `format` take over.

    Source: the reward of this name in open-r1 (Hugging Face 2025).
    """
    if not tags or isinstance(tags, str):
        raise ValueError(f"tag_count needs a list of tags, got {tags!r}")
    texts = [completion_text(completion) for completion in completions]
    return [sum(text.count(tag) == 1 for tag in tags) / len(tags) for text in texts]

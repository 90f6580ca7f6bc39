"""What a smoke run learns from beside the configuration's own rewards: an untrained completion is never right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agrpo.types import Text


def letters(
    prompts: list[Text], completions: list[Any], completion_ids: list[list[int]] | None = None, **columns: list[Any]
) -> list[float | None]:
    """The share of a completion's characters that are letters; 0 of an empty one."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [sum(character.isalpha() for character in text) / max(1, len(text)) for text in texts]

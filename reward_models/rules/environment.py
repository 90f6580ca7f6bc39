"""What the environment itself gave for a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agrpo.types import Text


def environment(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]] | None = None,
    *,
    environment: list[float | None],
    **columns: list[Any],
) -> list[float | None]:
    """The sum of the environment's rewards; None where it failed. The column comes from the run, not from the data."""
    return list(environment)

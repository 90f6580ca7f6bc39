"""Procedural tasks of reasoning-gym, scored by the task's own verifier."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reward_models.rules.texts import completion_text, tagged_answer
from reward_models.verifier import shared_pool

if TYPE_CHECKING:
    from agrpo.types import Text

MAX_ANSWER = 10_000  # characters; the tasks' own answers are far shorter


def reasoning_gym(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]] | None = None,
    *,
    entry: list[Any],
    **columns: list[Any],
) -> list[float | None]:
    """The task's own score in [0, 1]; None where the entry is no entry of a known task.

    The answer is the last `<answer>…</answer>`, else the whole text stripped. An answer on which the verifier raises or
    misses its deadline scores 0, unless the verifier fails on the entry's own answer too: then the entry is at fault.

    Args:
        entry: the row as reasoning-gym made it, as JSON text or a mapping, with metadata.source_dataset.

    Raises:
        ImportError: reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError("procedural tasks need reasoning-gym: pip install agrpo[tasks]")
    entries = [_entry(row) for row in entry]
    answers = [_answer(completion_text(completion)) for completion in completions]
    jobs = [(a, e) for a, e in zip(answers, entries, strict=True) if e is not None]
    results = iter(shared_pool().map("reward_models.rules.tasks:score", jobs))
    return [_score(next(results)) if e is not None else None for e in entries]


reasoning_gym.while_sampling = "prompt"


def _entry(row: Any) -> str | None:
    """The entry as JSON text, None where it is not an entry."""
    try:
        entry = json.loads(row) if isinstance(row, str) else row
        text = row if isinstance(row, str) else json.dumps(row)
        return text if isinstance(entry["metadata"]["source_dataset"], str) else None
    except (ValueError, TypeError, KeyError):
        return None


def _answer(text: str) -> str:
    answer = tagged_answer(text)
    answer = text.strip() if answer is None else answer
    return answer if len(answer) <= MAX_ANSWER else ""


def _score(result: float | str | None) -> float | None:
    if result == "unknown":
        return None
    return 0.0 if result is None else float(result)


def vote(completion: str, columns: Mapping[str, Any]) -> str | None:
    """The answer that majority voting counts: what the verifier is given, without case and extra white space."""
    return " ".join(_answer(completion).split()).casefold() or None

"""What `reasoning_gym` runs in the verifier pool's workers. Imported there only."""

from __future__ import annotations

import functools
import json
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS


def score(answer: str, entry_json: str) -> float | str:
    """The task's score of the answer, or "unknown": no such task, or its verifier fails on the entry's own answer."""
    entry = json.loads(entry_json)
    task = entry["metadata"]["source_dataset"]
    if task not in DATASETS:
        return "unknown"
    if task in ("arc_agi", "rearc"):  # they compare the board with tuples, which JSON does not have
        entry["metadata"]["output"] = tuple(map(tuple, entry["metadata"]["output"]))
    try:
        return float(_scorer(task)(answer, entry))
    except Exception:  # the verifiers are 106 programs of many hands; what they raise on nonsense is theirs
        return 0.0 if _scores_its_own_answer(task, entry) else "unknown"


def _scores_its_own_answer(task: str, entry: dict[str, Any]) -> bool:
    try:
        _scorer(task)(entry["answer"], entry)
    except Exception:
        return False
    return True


@functools.cache
def _scorer(task: str) -> Any:
    return reasoning_gym.get_score_answer_fn(task)

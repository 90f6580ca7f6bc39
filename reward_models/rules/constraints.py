"""Verifiable instructions about one sentence: the real-model tier's task. A row names its constraint: `kind`, `value`.

Whatever the constraint, the completion is one sentence: at least four words, exactly one of `.!?`, at the very end.
A completion that the length limit cut (`finished` False) scores 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from reward_models.rules.texts import completion_text

if TYPE_CHECKING:
    from agrpo.types import Text

    Ids = list[list[int]] | None


def instructions(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: Ids = None,
    *,
    kind: list[str | None],
    value: list[Any],
    finished: Sequence[bool] | None = None,
    **columns: list[Any],
) -> list[float | None]:
    """1 where the completion is one sentence that keeps its row's constraint, else 0; None where the row has no kind.

    Args:
        kind: "max_words", "lowercase", "contains", "exclamation" or "begins_with".
        value: the number of words, the word, or anything for a kind that needs none.
        finished: whether each completion ended by itself; all did where the column is absent.

    Raises:
        ValueError: a kind that does not exist, or a value that is no number where one is needed.
    """
    unknown = {str(name) for name in kind if name and name not in _CONSTRAINTS}
    if unknown:
        raise ValueError(
            f"no such kind of instruction: {', '.join(sorted(unknown))}; there are {', '.join(_CONSTRAINTS)}"
        )
    return _grade(completions, kind, value, finished, _CONSTRAINTS)


def _grade(
    completions: list[Text],
    kinds: list[str | None],
    values: list[Any],
    finished: Sequence[bool] | None,
    graded: Collection[str],
) -> list[float | None]:
    finished = [True] * len(completions) if finished is None else finished
    rows = zip(completions, kinds, values, finished, strict=True)
    return [
        float(ended and _keeps(completion_text(completion).strip(), kind, value)) if kind in graded else None
        for completion, kind, value, ended in rows
    ]


def _keeps(text: str, kind: str, value: Any) -> bool:
    one_sentence = sum(map(text.count, ".!?")) == 1 and text[-1] in ".!?"
    return one_sentence and len(text.split()) >= 4 and _CONSTRAINTS[kind](text, value)


def _has_words(text: str, value: Any) -> bool:
    words, wanted = (" ".join(re.findall(r"[^\W\d_]+", s.lower())) for s in (text, str(value)))
    return f" {wanted} " in f" {words} "


_CONSTRAINTS: dict[str, Callable[[str, Any], bool]] = {
    "max_words": lambda text, value: len(text.split()) <= int(value),
    "lowercase": lambda text, value: text == text.lower(),
    "contains": _has_words,
    "exclamation": lambda text, value: text.endswith("!"),
    "begins_with": lambda text, value: text.split()[0].strip(",") == str(value),
}


def _rule(name: str) -> Callable[..., list[float | None]]:
    def rule(
        prompts: list[Text],
        completions: list[Text],
        completion_ids: Ids = None,
        *,
        kind: list[str | None],
        value: list[Any],
        finished: Sequence[bool] | None = None,
        **columns: list[Any],
    ) -> list[float | None]:
        return _grade(completions, kind, value, finished, {name})

    rule.__name__ = rule.__qualname__ = name
    rule.__doc__ = f"`instructions` for rows of kind {name!r}, None on others."
    return rule


# One reward a kind, so that each can have its weight and its line in the log.
max_words, lowercase, contains, exclamation, begins_with = map(_rule, _CONSTRAINTS)

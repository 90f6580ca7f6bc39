"""Does the completion keep the promised layout? A few passes over the text: no pattern that could be exploited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reward_models.rules.texts import completion_text

if TYPE_CHECKING:
    from agrpo.types import Text


def format(
    prompts: list[Text], completions: list[Text], completion_ids: list[list[int]] | None = None, **columns: list[Any]
) -> list[float | None]:
    """1 for `<think>…</think><answer>…</answer>` and nothing else but white space around the two, else 0.

    Every tag stands exactly once, so none is nested or repeated.
    """
    return [float(_thinks_then_answers(completion_text(completion))) for completion in completions]


def answer_format(
    prompts: list[Text], completions: list[Text], completion_ids: list[list[int]] | None = None, **columns: list[Any]
) -> list[float | None]:
    """As `format`, but the thinking is optional: a bare `<answer>…</answer>` scores 1 too."""
    texts = [completion_text(completion) for completion in completions]
    return [float(_is_block(text.strip(), "answer") or _thinks_then_answers(text)) for text in texts]


def _thinks_then_answers(text: str) -> bool:
    thinking, end, answer = text.partition("</think>")
    return _is_block((thinking + end).strip(), "think") and _is_block(answer.strip(), "answer")


def _is_block(text: str, tag: str) -> bool:
    opening, closing = f"<{tag}>", f"</{tag}>"
    if not (text.startswith(opening) and text.endswith(closing)):
        return False
    inside = text[len(opening) : -len(closing)]
    return not any(mark in inside for mark in ("<think>", "</think>", "<answer>", "</answer>"))

"""Reading the final answer out of model text. Linear in the text, whatever the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agrpo.types import Text

MAX_CHARACTERS = 100_000  # of longer text only the end is read: answers come last


def completion_text(completion: Text) -> str:
    """A completion's text: the string itself, or the assistant's last message of a conversation."""
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message["role"] == "assistant"]
    content = said[-1]["content"] if said else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)  # a message in parts


def marked_answer(text: str) -> str | None:
    """The last answer that the text marks as its final one, or None.

    In this order: `<answer>…</answer>`, `\\boxed{…}` with balanced braces, a `#### …` line. A box or a `####` inside
    the answer tags is unwrapped.
    """
    text = text[-MAX_CHARACTERS:]
    tagged = tagged_answer(text)
    if tagged is not None:
        return _boxed(tagged) or _hashed(tagged) or tagged
    return _boxed(text) or _hashed(text)


def tagged_answer(text: str) -> str | None:
    """What stands between the last `<answer>` and its `</answer>`, stripped, or None."""
    text = text[-MAX_CHARACTERS:]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # an escaped brace is not a brace
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start:i].strip() or None
        i += 1
    return None  # cut off


def _hashed(text: str) -> str | None:
    start = text.rfind("####")
    if start < 0:
        return None
    line, _, rest = text[start + len("####") :].strip().partition("\n")
    # "####" also opens a Markdown heading: it marks an answer where it ends the text or a number follows at once.
    return line.strip() or None if not rest or line[:1] in "+-$0123456789" else None

"""Is the final answer right? Exact in process where that decides it, math-verify in an isolated worker where not."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from reward_models.rules.texts import MAX_CHARACTERS, completion_text, marked_answer
from reward_models.verifier import shared_pool

if TYPE_CHECKING:
    from agrpo.types import Text

MAX_NUMBER = 300  # characters of a number that is compared exactly
MAX_EXPRESSION = 2000  # characters that math-verify is given

# Every pattern here has single quantifiers over disjoint classes: matching is linear in the text.
_NUMBER = re.compile(r"[+-]?([0-9][0-9,]*)(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?|[+-]?\.[0-9]+")
_LATEX_RATIO = re.compile(r"([+-]?)\\[dt]?frac\{([+-]?[0-9]{1,100})\}\{([0-9]{1,100})\}")
_NUMBER_IN_PROSE = re.compile(r"(?:(?<![\w).])[+-])?(?:[$€£] ?)?[0-9][0-9,./]*")
_LETTER_AFTER_CUE = re.compile(r"(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)(?: is)?:? ?\(?([A-Z])(?![A-Za-z'])")
_LETTER_ALONE = re.compile(r"(?<![A-Za-z0-9'])([A-Z])(?![A-Za-z0-9'])")

_WRAPPERS = ("\\text{", "\\textbf{", "\\mathrm{", "\\mathbf{")
_FUNCTIONS = {"sin", "cos", "tan", "log", "exp", "sqrt", "inf"}  # letters that are mathematics, not words
_NOT_UNITS = {"pi", "ln", "or", "and", "to", "hundred", "thousand", "million", "billion", "dozen", "half"} | _FUNCTIONS


@dataclass(frozen=True)
class Answer:
    """An answer, read: `text` normalised; exactly one of the others is set, none for what only math-verify can read."""

    text: str
    number: Fraction | None = None
    letter: str | None = None
    words: str | None = None


def accuracy(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]] | None = None,
    *,
    solution: list[Any],
    **columns: list[Any],
) -> list[float | None]:
    """1 where the completion's final answer equals the solution, else 0; None where the solution cannot be read.

    The final answer is the last `<answer>…</answer>`, else the last balanced `\\boxed{…}`, else `#### x`, else the last
    number, or option letter where the solution is one. Thousands separators, dollar and percent signs, units and
    surrounding LaTeX do not count; "50%" equals 50, not 0.5. Numbers and a/b are compared exactly, letters and words by
    their text without case, the rest by math-verify, for which a deadline missed is a wrong answer.

    Args:
        solution: a number, fraction, letter, LaTeX, or a worked solution that marks its answer so (GSM8K's `####`).

    Raises:
        ImportError: a comparison needs math-verify and it is not installed.
    """
    scores: list[float | None] = [None] * len(completions)
    symbolic: dict[int, tuple[str, str, bool]] = {}
    for index, (completion, answer) in enumerate(zip(completions, solution, strict=True)):
        gold = read_solution(answer)
        if gold is None:
            continue
        verdict = _compare(completion_text(completion)[-MAX_CHARACTERS:], gold)
        if isinstance(verdict, tuple):
            symbolic[index] = verdict
        else:
            scores[index] = float(verdict)
    if symbolic:
        for index, score in zip(symbolic, _compare_symbolically(list(symbolic.values())), strict=True):
            scores[index] = score
    return scores


accuracy.while_sampling = "prompt"  # what is not a plain number waits for the verifier pool


def read_solution(solution: Any) -> Answer | None:
    """The reference answer, read; None where there is none. What only math-verify can read is not tried here."""
    if solution is None:
        return None
    text = str(solution)
    answer = _read(marked_answer(text) or text)
    return answer if answer.text and len(answer.text) <= MAX_EXPRESSION else None


def _compare(text: str, gold: Answer) -> bool | tuple[str, str, bool]:
    """The verdict, or what math-verify shall compare: (solution, answer, whether the answer is still inside prose)."""
    marked = marked_answer(text)
    if gold.letter is not None:
        letter = _leading_letter(_normalise(marked)) if marked is not None else _last_letter(text)
        return letter == gold.letter
    last_line = text.rstrip()[-MAX_EXPRESSION:].rpartition("\n")[2]
    if gold.words is not None:
        return _as_words(_normalise(marked if marked is not None else last_line)) == gold.words
    solution = gold.text if gold.number is None else str(gold.number)
    if marked is None:
        if gold.number is None or _last_number_is_in_latex(text):
            return solution, last_line, True
        marked = _last_number(text)
        if marked is None:
            return False
    candidate = _read(marked)
    if gold.number is not None:
        if candidate.number is not None:
            if candidate.number == gold.number or not _one_is_rounded(candidate, gold):
                return candidate.number == gold.number
        elif len(candidate.text) > MAX_EXPRESSION or not _may_be_a_number(candidate.text):
            return False
    if not candidate.text or len(candidate.text) > MAX_EXPRESSION:
        candidate = Answer("")  # wrong, but still passed on: an unreadable solution abstains whatever the answer
    return solution, candidate.text, False


def _compare_symbolically(jobs: list[tuple[str, str, bool]]) -> list[float | None]:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("an answer beyond plain numbers needs math-verify: pip install agrpo[math]")
    pool = shared_pool()
    # The solution alone comes first: what is unreadable or too slow there must not be held against the completion.
    golds = [(gold,) for gold in dict.fromkeys(gold for gold, _, _ in jobs) if _number(gold) is None]
    verdicts = pool.map("reward_models.rules.symbolic:readable", golds)
    readable = {gold: True for gold, _, _ in jobs} | {
        gold: verdict for (gold,), verdict in zip(golds, verdicts, strict=True)
    }
    unique = list(dict.fromkeys(job for job in jobs if readable[job[0]] and job[1]))  # a group repeats itself
    equal = dict(zip(unique, pool.map("reward_models.rules.symbolic:equal", unique), strict=True))
    return [float(bool(equal.get(job))) if readable[job[0]] else None for job in jobs]


def _read(text: str) -> Answer:
    text = _normalise(text)
    number = _number(text)
    if number is None:
        number = _number_with_unit(text)
    if number is not None:
        return Answer(text, number=number)
    bare = text.removeprefix("(").rstrip(").:")
    if len(bare) == 1 and "A" <= bare <= "Z":
        return Answer(text, letter=bare)
    return Answer(text, words=_as_words(text))


def _normalise(text: str) -> str:
    """Without what surrounds an answer: white space, delimiters, emphasis, currency, percent, \\text, full stop."""
    if len(text) > MAX_CHARACTERS:
        return ""
    for old, new in (("−", "-"), ("\u00a0", " "), ("\\!", ""), ("{,}", ","), ("\\,", " "), ("\\$", "$"), ("\\%", "%")):
        text = text.replace(old, new)
    text = " ".join(text.split()).strip("*_` ").rstrip(".")
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = text.strip("$ ")
    for wrapper in _WRAPPERS:
        if text.startswith(wrapper) and text.endswith("}") and text.count("{") == 1:
            text = text[len(wrapper) : -1]
    sign = "-" if text.startswith(("-$", "- $", "-€", "-£")) else ""
    return sign + text.removeprefix("-" if sign else "").strip("$€£% ").rstrip(".")


def _number(text: str) -> Fraction | None:
    """An integer, decimal, ratio of two, or mixed number (1 1/2), exactly; None for anything else."""
    if len(text) > MAX_NUMBER:
        return None
    whole, space, part = text.partition(" ")
    if space and whole.isdigit() and part[:1].isdigit() and "/" in part:  # math-verify would multiply
        ratio = _number(part)
        return None if ratio is None else int(whole) + ratio
    latex = _LATEX_RATIO.fullmatch(text)
    top, slash, bottom = (latex[1] + latex[2], "/", latex[3]) if latex else text.partition("/")
    top_value = _decimal(top.strip())
    if not slash or top_value is None:
        return top_value
    bottom_value = _decimal(bottom.strip())
    return top_value / bottom_value if bottom_value else None


def _decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    groups = (match[1] or "0").split(",")
    if len(groups) > 1 and not (1 <= len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:])):
        return None  # a list, not thousands
    return Fraction(text.replace(",", "").rstrip("."))


def _number_with_unit(text: str) -> Fraction | None:
    """The one number of "x = 12", "12 apples" or "The answer is 12"; None where more than words stands beside it."""
    if len(text) > MAX_NUMBER:
        return None
    text = text.partition("=")[2].strip() if text.count("=") == 1 else text
    numbers = list(_NUMBER_IN_PROSE.finditer(text))
    if len(numbers) != 1:
        return None
    token, before, after = numbers[0][0], text[: numbers[0].start()], text[numbers[0].end() :]
    if before[-1:].isalnum() or after[:1].isalnum():
        return None  # 2x, x2, 5cm
    words = [word for part in (before, after) for word in re.split("[ :%/]", part) if word]
    if not all(word.rstrip(".,!").isalpha() for word in words) or any(w.casefold() in _NOT_UNITS for w in words):
        return None
    if any(len(word) == 1 for word in after.split()):
        return None  # 12 x
    return _number(_normalise(token.rstrip(",./")))


def _may_be_a_number(text: str) -> bool:
    return "\\" in text or any(character.isdigit() for character in text)


def _one_is_rounded(a: Answer, b: Answer) -> bool:
    """Whether one is a decimal and the other a ratio that no decimal equals: math-verify allows for the rounding."""
    return any("." in x.text and not _terminates(y.number.denominator) for x, y in ((a, b), (b, a)))


def _terminates(denominator: int) -> bool:
    return 10 ** denominator.bit_length() % denominator == 0  # only the prime factors 2 and 5


def _last_number(text: str) -> str | None:
    last = None
    for last in _NUMBER_IN_PROSE.finditer(text.replace("−", "-")):  # noqa: B007 (the last one is wanted)
        pass
    if last is None:
        return None
    token = last[0].rstrip(",./")
    if _number(_normalise(token)) is None:  # a list, a date: the last of it
        token = re.split("[,./]", token)[-1]
    return token


def _last_number_is_in_latex(text: str) -> bool:
    tail = text.rstrip("$).*\\] \n")
    return tail.endswith("}") and "\\" in tail[-200:]


def _leading_letter(text: str) -> str | None:
    """B of "B", "b", "(B)", "B. Paris", "B) Paris"."""
    text = text.removeprefix("(")
    alone = text[:1].isascii() and text[:1].isalpha() and (len(text) == 1 or text[1] in ").:")
    if alone:
        return text[0].upper()
    match = _LETTER_AFTER_CUE.search(text)
    return match[1] if match else None


def _last_letter(text: str) -> str | None:
    text = " ".join(text.split())
    letters = _LETTER_AFTER_CUE.findall(text) or _LETTER_ALONE.findall(text)
    return letters[-1] if letters else None


def _as_words(text: str) -> str | None:
    """The text without case where it is words ("Monday", "not prime"), None where it may be mathematics ("xy")."""
    words = text.casefold().replace("-", " ").replace("'", " ").split()
    if not words or not all(word.isalpha() for word in words) or _FUNCTIONS & set(words):
        return None
    return " ".join(words) if words == ["no"] or max(map(len, words)) >= 3 else None


def vote(completion: str, columns: Mapping[str, Any]) -> str | None:
    """The final answer of a completion as majority voting counts it, None where there is none.

    It is read as `accuracy` reads it, so 1/2, 0.5 and \\frac{1}{2} are one vote; answers that only math-verify could
    tell to be equal are different votes. `columns` are the row's: an option letter is looked for where `solution` is
    one.
    """
    text = completion[-MAX_CHARACTERS:]
    gold, marked = read_solution(columns.get("solution")), marked_answer(text)
    if gold is not None and gold.letter is not None:
        return _leading_letter(_normalise(marked)) if marked is not None else _last_letter(text)
    if marked is None:
        in_words = gold is not None and gold.words is not None
        marked = text.rstrip()[-MAX_EXPRESSION:].rpartition("\n")[2] if in_words else _last_number(text)
    answer = _read(marked or "")
    if answer.number is not None:
        return str(answer.number)
    return answer.words or answer.text.casefold() or None

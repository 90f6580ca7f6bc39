"""Verifiable instructions in the manner of IFEval: its 25 kinds, by its ids and arguments, each judged by a few passes.

Source: Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models, table 1. Where the published
checks can be satisfied without doing what was asked (`[]` as a placeholder, a bare number as JSON), these are stricter.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Any

from reward_models.rules.texts import MAX_CHARACTERS, completion_text

if TYPE_CHECKING:
    from agrpo.types import Text

MAX_DETECTED = 10_000  # characters that a language is told from


def ifeval(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]] | None = None,
    *,
    instruction_id_list: list[Sequence[str] | None],
    kwargs: list[Sequence[Mapping[str, Any] | None] | None],
    strict: bool = False,
    **columns: list[Any],
) -> list[float | None]:
    """The share of its row's instructions that a completion keeps; None where one of them cannot be judged.

    Not to be judged are an unknown id, an instruction without an argument that it needs, and, without the package
    langdetect, a language. A blank completion keeps nothing.

    Args:
        instruction_id_list: a row's instructions, such as "length_constraints:number_words".
        kwargs: their arguments, one mapping for each; an argument that is null counts as missing.
        strict: all or nothing: 1 where every instruction is kept, else 0.
    """
    rows = zip(completions, instruction_id_list, kwargs, strict=True)
    return [_score(completion_text(text)[-MAX_CHARACTERS:], ids, given, strict) for text, ids, given in rows]


def _score(
    text: str, ids: Sequence[str] | None, given: Sequence[Mapping[str, Any] | None] | None, strict: bool
) -> float | None:
    if not ids or given is None or len(ids) != len(given):
        return None
    kept = [_keeps(text, name, arguments or {}) for name, arguments in zip(ids, given, strict=True)]
    if None in kept:
        return None
    return float(all(kept)) if strict else sum(kept) / len(kept)


def _keeps(text: str, name: str, given: Mapping[str, Any]) -> bool | None:
    if name not in _KINDS:
        return None
    check, *needed = _KINDS[name]
    arguments = [given.get(argument) for argument in needed]
    if any(argument is None for argument in arguments):
        return None
    verdict = check(text, *arguments)
    return None if verdict is None else verdict and bool(text.strip())


def _holds(count: int, relation: str, bound: float) -> bool | None:
    compare = {"at least": operator.ge, "less than": operator.lt}.get(relation)
    return None if compare is None else compare(count, bound)


# Keywords: without case. Asked for, a part of a word will do; forbidden is the whole word.


def _has_keywords(text: str, keywords: Sequence[str]) -> bool:
    text = text.casefold()
    return all(keyword.casefold() in text for keyword in keywords)


def _keyword_often(text: str, keyword: str, frequency: float, relation: str) -> bool | None:
    return _holds(text.casefold().count(keyword.casefold()), relation, frequency)


def _lacks_words(text: str, words: Sequence[str]) -> bool:
    text = text.casefold()
    return not any(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text) for word in words)


# Lengths.


def _words(text: str, number: float, relation: str) -> bool | None:
    return _holds(sum(1 for _ in re.finditer(r"\w+", text)), relation, number)


def _sentences(text: str, number: float, relation: str) -> bool | None:
    return _holds(count_sentences(text), relation, number)


_CLOSING, _OPENING = "\"'”’»)]}*_`", "\"'“‘«([{*_`"
_BEFORE_A_NAME = {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "cf", "approx", "e.g", "i.e"}


def count_sentences(text: str) -> int:
    """Stretches of words that end in `.!?` or with the text; line breaks alone end none.

    The stop of a title ("Dr."), an initial or a list's number ends nothing; one of "etc.", "a.m." or an ellipsis does
    where no small letter follows.
    """
    for wide, narrow in (("。", ". "), ("！", "! "), ("？", "? ")):
        text = text.replace(wide, narrow)
    words = text.split()
    count, begun = 0, False
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        ended = _ends_sentence(word, following, first=not begun)
        begun = begun or any(map(str.isalnum, word))
        if begun and ended:
            count, begun = count + 1, False
    return count + begun


def _ends_sentence(word: str, following: str, first: bool) -> bool:
    bare = word.rstrip(_CLOSING)
    if bare.endswith(("!", "?")):
        return True
    stem = bare.rstrip(".…").lstrip(_OPENING).lower()
    if not bare.endswith((".", "…")) or stem in _BEFORE_A_NAME:
        return False
    if bare.endswith(("...", "…")) or "." in stem or stem == "etc":
        return not following[:1].islower()
    initial = len(stem) == 1 and stem.isalpha() and stem != "i"
    return not initial and not (first and stem.isdigit())


def _divided_paragraphs(text: str, number: float) -> bool:
    parts = [part.strip() for part in text.split("***")]
    inside = parts[not parts[0] : len(parts) - (not parts[-1])]  # a divider may open or close the text
    return all(inside) and len(inside) == number


def _paragraph_begins(text: str, number: float, nth: float, first_word: str) -> bool:
    lines = groupby(text.split("\n"), key=lambda line: bool(line.strip()))
    paragraphs = [" ".join(part) for filled, part in lines if filled]
    if len(paragraphs) != number or not 1 <= nth <= number:
        return False
    words = (re.split("[.,:;?!'’\"”]", word.lstrip("#" + _OPENING))[0] for word in paragraphs[int(nth) - 1].split())
    return next(filter(None, words), "").casefold() == first_word.casefold()  # of "I'm" it is "I"


# Content and format. A pattern's quantified classes exclude what follows them, so that matching is linear.

_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*+\]")
_HIGHLIGHT = re.compile(r"(\*\*?)(?! )([^*\n]++)(?<! )\1")
_FENCE = re.compile(r"```(?:json)?", re.IGNORECASE)
_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _placeholders(text: str, number: float) -> bool:
    return sum(bool(match[0][1:-1].strip()) for match in _PLACEHOLDER.finditer(text)) >= number


def _postscript(text: str, marker: str) -> bool:
    """The marker, its stops with or without a space behind them, and something after it."""
    loose = " ?".join(re.escape(part) for part in re.findall(r"[^.]*\.|[^.]+", marker.strip().casefold()))
    text = text.casefold()
    found = re.search(rf"(?<!\w){loose}", text)
    return found is not None and any(map(str.isalnum, text[found.end() :]))


def _bullets(text: str, number: float) -> bool:
    return sum(line.lstrip().startswith(("* ", "- ")) for line in text.split("\n")) == number


def _title(text: str) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start:end].strip("<> \t"):
            return True
    return False


def _one_choice(text: str) -> bool:
    return sum(choice in text for choice in _CHOICES) == 1


def _highlights(text: str, number: float) -> bool:
    return sum(1 for _ in _HIGHLIGHT.finditer(text)) >= number


def _sections(text: str, splitter: str, number: float) -> bool:
    return len(set(re.findall(rf"{re.escape(splitter)}\s?([0-9]{{1,9}})", text))) >= number


def _is_json(text: str) -> bool:
    text = text.strip()
    if fence := _FENCE.match(text):
        text = text[fence.end() :].removesuffix("```")
    try:
        value = json.loads(text, parse_int=str, parse_float=str)  # no number need be computed
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)


# Combinations, beginnings and ends, case, punctuation, language.


def _repeats(text: str, prompt: str) -> bool:
    return text.strip().casefold().startswith(prompt.strip().casefold())


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    inside = parts[not parts[0] : len(parts) - (not parts[-1])]
    return len(inside) == 2 and all(inside) and inside[0] != inside[1]


def _ends_with(text: str, phrase: str) -> bool:
    return text.strip().strip('"').rstrip().casefold().endswith(phrase.strip().casefold())


def _quoted(text: str) -> bool:
    text = text.strip()
    return bool(text[1:-1].strip()) and text[0] + text[-1] in ('""', "“”")


def _capital_words(text: str, number: float, relation: str) -> bool | None:
    return _holds(sum(word.isupper() for word in re.findall(r"[\w&./-]+", text)), relation, number)


def _in_language(text: str, language: str) -> bool | None:
    try:
        import langdetect
    except ImportError:
        return None
    langdetect.DetectorFactory.seed = 0  # it draws samples, and the same text shall always get the same score
    try:
        return langdetect.detect(text[:MAX_DETECTED]) == language
    except langdetect.LangDetectException:  # nothing in it that belongs to a language
        return False


# id → its check, and the arguments that it is called with.
_KINDS: dict[str, tuple[Callable[..., bool | None], *tuple[str, ...]]] = {
    "keywords:existence": (_has_keywords, "keywords"),
    "keywords:frequency": (_keyword_often, "keyword", "frequency", "relation"),
    "keywords:forbidden_words": (_lacks_words, "forbidden_words"),
    "keywords:letter_frequency": (_keyword_often, "letter", "let_frequency", "let_relation"),
    "language:response_language": (_in_language, "language"),
    "length_constraints:number_words": (_words, "num_words", "relation"),
    "length_constraints:number_sentences": (_sentences, "num_sentences", "relation"),
    "length_constraints:number_paragraphs": (_divided_paragraphs, "num_paragraphs"),
    "length_constraints:nth_paragraph_first_word": (
        _paragraph_begins,
        "num_paragraphs",
        "nth_paragraph",
        "first_word",
    ),
    "detectable_content:postscript": (_postscript, "postscript_marker"),
    "detectable_content:number_placeholders": (_placeholders, "num_placeholders"),
    "detectable_format:number_bullet_lists": (_bullets, "num_bullets"),
    "detectable_format:title": (_title,),
    "detectable_format:constrained_response": (_one_choice,),
    "detectable_format:number_highlighted_sections": (_highlights, "num_highlights"),
    "detectable_format:multiple_sections": (_sections, "section_spliter", "num_sections"),
    "detectable_format:json_format": (_is_json,),
    "combination:repeat_prompt": (_repeats, "prompt_to_repeat"),
    "combination:two_responses": (_two_responses,),
    "startend:end_checker": (_ends_with, "end_phrase"),
    "startend:quotation": (_quoted,),
    "change_case:english_capital": (str.isupper,),
    "change_case:english_lowercase": (str.islower,),
    "change_case:capital_word_frequency": (_capital_words, "capital_frequency", "capital_relation"),
    "punctuation:no_comma": (lambda text: "," not in text,),
}

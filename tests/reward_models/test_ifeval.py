"""IFEval's kinds: each on what keeps it and what does not, and against counts known by construction."""

import json
import sys
import time
import types
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models.rules import ifeval
from reward_models.rules.ifeval import _KINDS, count_sentences


def score(text, *instructions, **parameters):
    """Of (id, arguments) pairs."""
    columns = {"instruction_id_list": [[i for i, _ in instructions]], "kwargs": [[a for _, a in instructions]]}
    return ifeval([""], [text], **columns, **parameters)[0]


# id, arguments, texts that keep it, texts that do not
CASES = [
    (
        "keywords:existence",
        {"keywords": ["Moon", "tide"]},
        ["moonlit TIDES", "the moon, the tide"],
        ["the moon", "the tide", "mo on tide"],
    ),
    (
        "keywords:frequency",
        {"keyword": "sea", "frequency": 2, "relation": "at least"},
        ["sea, Sea", "seas and seasons"],
        ["sea", "see"],
    ),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, ["sea", "-"], ["sea sea"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["cat", "C++"]},
        ["concatenate", "scatter C+"],
        ["a Cat.", "cat", "in C++, yes"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["eEe", "three were"],
        ["ee", "no"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 1, "let_relation": "less than"},
        ["calm"],
        ["loud!"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        ["one two three", "one-two, three"],
        ["one two", "...", "-- two - three"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["Go. Stay!", "Go? Now"],
        ["Go, stay.", "Dr. Who"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        ["Wait.", "wait"],
        ["Wait. Go."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n\nstill one *** two\n***"],
        ["one\n\ntwo", "one\n***\n***\ntwo", "one *** two *** three", "***"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["One.\n\nWeekend, at last.", "One\nmore\n \n\n“weekend” it is\n\n"],
        ["Weekend.\n\nOne.", "One.\n\nWeekends.", "One.\n\nWeekend.\n\nThree.", "One.\nWeekend.", "One.\n\n..."],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\n\nP.S. One more thing", "Bye. **p. s.** more"],
        ["Bye.\nP.S.", "Bye. PS more", "The GDP.S. are"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. More", "p. p. s more"], ["P.S. More"]),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] lives in [city]", "[a][b][c]"],
        ["[name]", "[][]", "[a\n] [b]", "[ ] [x]", "]a[ ]b["],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n* two", "Look:\n  - one\n\n  - two\n*yes* and **no**"],
        ["* one", "* one\n* two\n* three", "*one\n*two", "one * two\nthree - four", "---\n---"],
    ),
    (
        "detectable_format:title",
        {},
        ["<<Joy>>\nIt is.", "Here: <<a b>>"],
        ["<Joy>", "<<>>", "<< >>", "<<Joy\n>>", ">>Joy<<"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "I see. My answer is maybe. Sorry."],
        ["Yes.", "my answer is yes.", "My answer is yes. My answer is no."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and *two*", "* item with *one* and **two**"],
        ["*one*", "2 * 3 * 4 * 5", "**", "****", "*one\ntwo*", "*** ***"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "**Section 1**: a **Section 2**: b\nSection 3"],
        ["Section 1", "Section 1 Section 1", "section 1\nsection 2", "Section one Section two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1, 2.5, null]}', '```json\n{"a": 1}\n```', " [1]\n", "```\n[1]\n```", "[" + "9" * 9000 + "]"],
        ["4", '"text"', "{a: 1}", 'Here: {"a": 1}', "[" * 90_000, "[" * 90_000 + "]" * 90_000, "```json\n```"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem. "},
        ["Write a poem. Roses", " write a poem.\nRoses"],
        ["Roses. Write a poem.", "Write"],
    ),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******\none ****** two\n******"],
        ["one", "one ****** one", "one ****** two ****** three", "******", "one\n***\ntwo", "a ****** ****** b"],
    ),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So: the END. \n", '"So. The end."'], ["The end. Really."]),
    ("startend:quotation", {}, ['"Yes."', ' "a "b" c"\n', "“Yes.”"], ['"Yes.', "Yes", '"', '""', "'Yes'"]),
    ("change_case:english_capital", {}, ["LOUD & 2 CLEAR!"], ["Loud", "loud", "12"]),
    ("change_case:english_lowercase", {}, ["quiet, no. 7"], ["Quiet", "LOUD", "12"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and the U.S. agree", "(STOP) I", "COVID-19, AT&T"],
        ["NASA", "Nasa And", "4 5 6"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["Only ONE"],
        ["ONE TWO"],
    ),
    ("punctuation:no_comma", {}, ["one; two"], ["one, two"]),
]


@pytest.mark.parametrize("kind, arguments, kept, broken", CASES, ids=[case[0] for case in CASES])
def test_each_kind_on_what_keeps_it_and_what_does_not(kind, arguments, kept, broken):
    everything_else_is_null = dict.fromkeys(name for _, *names in _KINDS.values() for name in names) | arguments
    for given_arguments in (arguments, everything_else_is_null):
        assert [score(text, (kind, given_arguments)) for text in kept] == [1.0] * len(kept)
        assert [score(text, (kind, given_arguments)) for text in broken] == [0.0] * len(broken)
    assert score(" \n", (kind, arguments)) == 0.0


def test_all_twenty_five_kinds_are_there_and_tried():
    assert len(_KINDS) == 25
    assert {kind for kind, *_ in CASES} | {"language:response_language"} == set(_KINDS)


def test_the_score_is_the_share_that_is_kept_and_strict_is_all_or_nothing():
    lower, commas, two = (
        ("change_case:english_lowercase", {}),
        ("punctuation:no_comma", None),
        ("length_constraints:number_words", {"num_words": 2, "relation": "less than"}),
    )
    assert score("a quiet, small sea", lower, commas, two) == pytest.approx(1 / 3)
    assert score("a quiet, small sea", lower, commas, two, strict=True) == 0.0
    assert score("quiet", lower, commas, two) == score("quiet", lower, commas, two, strict=True) == 1.0


@pytest.mark.parametrize(
    "row",
    [
        {"instruction_id_list": ["no_such:kind"], "kwargs": [{}]},
        {"instruction_id_list": ["punctuation:no_comma", "no_such:kind"], "kwargs": [{}, {}]},
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{}]},
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]},
        {"instruction_id_list": ["keywords:existence"], "kwargs": [None]},
        {
            "instruction_id_list": ["length_constraints:number_words"],
            "kwargs": [{"num_words": 3, "relation": "roughly"}],
        },
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": None},
        {"instruction_id_list": [], "kwargs": []},
        {"instruction_id_list": None, "kwargs": None},
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_cannot_be_judged_abstains_and_costs_its_own_row_only(row, strict):
    honest = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    columns = {key: [row[key], honest[key]] for key in honest}
    assert ifeval([""] * 2, ["one two"] * 2, **columns, strict=strict) == [None, 1.0]


def test_a_language_needs_a_detector(monkeypatch):
    german = ("language:response_language", {"language": "de"})
    monkeypatch.setitem(sys.modules, "langdetect", None)  # importing it fails
    assert score("Das Meer ist ruhig.", german) is None
    assert score("Das Meer ist ruhig.", german, ("punctuation:no_comma", {})) is None

    class NothingToGoBy(Exception):
        pass

    def detect(text):
        if not any(map(str.isalpha, text)):
            raise NothingToGoBy
        return "de" if "ist" in text else "en"

    detector = types.SimpleNamespace(DetectorFactory=types.SimpleNamespace(seed=None), detect=detect)
    detector.LangDetectException = NothingToGoBy
    monkeypatch.setitem(sys.modules, "langdetect", detector)
    assert [score(text, german) for text in ("Das Meer ist ruhig.", "The sea.", "12", "")] == [1.0, 0.0, 0.0, 0.0]
    assert detector.DetectorFactory.seed == 0


OPENINGS = [
    "It works",
    "Dr. Smith and J. R. Jones agree",
    "I paid 3.50 for it",
    "ask, e.g. Ann",
    'He said "so',
    "1. Open the box",
    "well... it depends",
    "*Rain* at 5 p.m. today",
    "see www.sea.org now",
]
ENDS = [".", "!", "?", "?!", '."', ".**", "!)", ".\n\n", "。"]
RESTS = st.sampled_from(["", "and so"])


@given(st.lists(st.tuples(st.sampled_from(OPENINGS), st.sampled_from(ENDS)), max_size=8), RESTS)
def test_sentences_are_as_many_as_were_put_together(sentences, rest):
    text = " ".join([opening + end for opening, end in sentences] + [rest])
    assert count_sentences(text) == len(sentences) + bool(rest)


@given(st.text(alphabet='aAbB ,.\n*[]<>"-', max_size=60), st.integers(0, 6))
def test_counts_agree_with_counting_one_by_one(text, bound):
    """Whether at least `bound`; words, letters, commas and lines counted by loops of the test's own."""
    letters = Counter(text.lower())
    words = sum(now.isalnum() and not before.isalnum() for before, now in zip(" " + text, text, strict=False))
    asked = {
        ("keywords:letter_frequency", "letter", "let_frequency", "let_relation"): letters["a"],
        ("length_constraints:number_words", "", "num_words", "relation"): words,
    }
    for (kind, letter, number, relation), count in asked.items():
        arguments = {letter: "a", number: bound, relation: "at least"}
        assert score(text, (kind, arguments)) == float(count >= bound and bool(text.strip()))
        arguments[relation] = "less than"
        assert score(text, (kind, arguments)) == float(count < bound and bool(text.strip()))
    assert score(text, ("punctuation:no_comma", {})) == float(not letters[","] and bool(text.strip()))


LEAVES = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
VALUES = st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(max_size=5), x), max_leaves=10)


@given(VALUES)
def test_whatever_json_writes_is_json_and_its_beginning_is_not(value):
    whole = json.dumps({"a": value})
    assert score(whole, ("detectable_format:json_format", {})) == 1.0
    assert score(whole[:-1], ("detectable_format:json_format", {})) == 0.0


HOSTILE = ["*", "[", "<<", ">>", "***", "******", "\n\n", "P.", "P.S.", "* ", "[a", "*a", "**a ", "a.", "... ", "Dr. "]
HOSTILE += [
    '"',
    "{",
    "[1,",
    "Section ",
    "Section 1",
    "a",
    " ",
    "\x00",
    "İ",
    "ﬃ",
    "\ud800",
    "1",
    "My answer is ",
    "``` ",
]


@pytest.mark.parametrize("piece", HOSTILE, ids=ascii)
def test_every_kind_is_linear_in_the_text(piece):
    instructions = [(kind, arguments) for kind, arguments, *_ in CASES]
    started = time.monotonic()
    assert score(piece * (2_000_000 // len(piece)) + "!", *instructions) is not None
    assert time.monotonic() - started < 2


def test_conversations_read_the_last_message():
    talk = [[{"role": "user", "content": "no, no"}, {"role": "assistant", "content": "yes"}]]
    assert ifeval([""], talk, instruction_id_list=[["punctuation:no_comma"]], kwargs=[[{}]]) == [1.0]

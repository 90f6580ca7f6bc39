"""Accuracy against answers whose verdict is known by construction, and against math-verify where both can judge."""

import random
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from reward_models.rules import accuracy
from reward_models.verifier import shared_pool


def score(completion, solution):
    return accuracy([""], [completion], solution=[solution])[0]


WRITTEN = [  # the ways in which models mark an answer
    "<think>First 17 + 4.</think><answer>{}</answer>",
    "<answer>9999</answer> no: <answer> {} </answer>",
    "<answer>\\boxed{{{}}}</answer>",
    "It is 17, then 4, so \\boxed{{{}}} after 3 steps",
    "First \\boxed{{9999}}, then $\\boxed{{{}}}$.",
    "17 + 4\n#### {}",
    "17 + 4\n#### {}\n\nQuestion: what is 17 + 4?",
    "After 17 steps the answer is {}.",
    "After 17 steps: **{}**",
    "{}",
]


@pytest.mark.parametrize("written", WRITTEN)
@given(value=st.integers(-(10**12), 10**12), off=st.integers(1, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_number_is_right_however_it_is_marked_and_another_is_wrong(written, value, off):
    for solution in (value, str(value), f"{value:,}", f"Half of it is 17.\n#### {value:,}", f"\\boxed{{{value}}}"):
        assert score(written.format(value), solution) == 1.0
        assert score(written.format(f"{value:,}"), solution) == 1.0
        assert score(written.format(value + off), solution) == 0.0
        assert score(written.format(f"{value}7"), solution) == 0.0


@given(value=st.decimals(-(10**6), 10**6, places=3, allow_nan=False), off=st.integers(1, 999))
@settings(max_examples=50, deadline=None)
def test_decimals_ratios_money_and_percent_are_exact(value, off):
    ratio = Fraction(value)
    for text in (f"{value}", f"{value}00", f"${value}", f"{value}%", f"{value} dollars", f"x = {value}", f"{ratio}"):
        assert score(f"<answer>{text}</answer>", str(value)) == 1.0
    assert score(f"<answer>{value + Decimal(off) / 1000}</answer>", str(ratio)) == 0.0


WRITTEN_NUMBERS = st.one_of(
    st.builds("{}/{}".format, st.integers(-6, 6), st.integers(1, 6)),
    st.builds("\\frac{{{}}}{{{}}}".format, st.integers(-6, 6), st.integers(1, 6)),
    st.integers(-6, 6).map(str),
    st.sampled_from(["0.5", "1.50", "-2.0", ".25", "0.333333", "0.33", "1.2"]),
)


@given(pair=st.tuples(WRITTEN_NUMBERS, WRITTEN_NUMBERS))
@settings(max_examples=150, deadline=None)
def test_the_fast_path_agrees_with_math_verify(pair):
    solution, answer = pair
    oracle = verify(parse(f"${solution}$"), parse(f"${answer}$"))
    assert score(f"<answer>{answer}</answer>", solution) == float(oracle)


@pytest.mark.parametrize(
    ("solution", "completion", "expected"),
    [
        ("\\frac{\\sqrt{3}}{2}", "<answer>sqrt(3)/2</answer>", 1),
        ("\\frac{\\sqrt{3}}{2}", "so \\boxed{\\frac{3}{2\\sqrt{3}}}", 1),
        ("\\frac{\\sqrt{3}}{2}", "so \\boxed{\\frac{1}{2}}", 0),
        ("x^2+1", "hence it is $1+x^2$.", 1),
        ("x^2+1", "<answer>x^2-1</answer>", 0),
        ("[0,1)", "<answer>[0,1)</answer>", 1),
        ("[0,1)", "<answer>(0,1)</answer>", 0),
        ("72", "<answer>71+1</answer>", 1),
        ("72", "<answer>\\frac{144}{2}</answer>", 1),
        ("The answer is 1,200.", "<answer>\\frac{2400}{2}</answer>", 1),
        ("10", "so it is $\\frac{20}{2}$", 1),
        ("2", "so it is $\\frac{1}{2}$", 0),
        ("1/3", "<answer>0.333333</answer>", 1),
        ("1/3", "<answer>0.33</answer>", 0),
        ("1 1/2", "<answer>3/2</answer>", 1),
        ("1 1/2", "<answer>1/2</answer>", 0),
        ("-3", "It is −3", 1),
        ("7", "17-10 is 7, since 17-7", 1),
        ("12", "<answer>12 km/h</answer>", 1),
        ("12", "<answer>The answer is 12.</answer>", 1),
        ("5", "<answer>5 \\text{ cm}</answer>", 1),
    ],
)
def test_mathematics_beyond_plain_numbers(solution, completion, expected):
    assert score(completion, solution) == expected


@pytest.mark.parametrize(
    "answer", ["72, 73", "73, 72", "72 or 73", "72x", "2x", "72 pi", "72 thousand", "7 2", "72/0", "x = 72, y = 5", ""]
)
def test_hedging_and_fragments_earn_nothing(answer):
    assert score(f"<answer>{answer}</answer>", "72") == 0.0


@pytest.mark.parametrize("right", ["B", "(B)", "b", "B.", "B) 12 apples", "\\text{B}", "The answer is B"])
def test_letters(right):
    assert score(f"<answer>{right}</answer>", "B") == 1.0
    assert score(f"<answer>{right}</answer>", "(B)") == 1.0
    assert score(f"<answer>{right}</answer>", "C") == 0.0
    assert score(f"A dog. I think so: the answer is ({right[-1] if len(right) == 1 else 'B'}", "B") == (right != "b")
    assert score("Not A, not C, but B", "B") == 1.0


def test_words_are_compared_as_words_and_not_as_products_of_their_letters():
    assert score("<answer>paris.</answer>", "Paris") == 1.0
    assert score("<answer>pairs</answer>", "Paris") == 0.0
    assert score("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}") == 1.0
    assert score("<answer>True</answer>", "True") == 1.0


@pytest.mark.parametrize("solution", [None, "", "  ", "\\frac{1}{", "???", "#### "])
@pytest.mark.parametrize("completion", ["<answer>3</answer>", "3", "", "<answer>\\frac{1}{</answer>", "???"])
def test_a_solution_that_cannot_be_read_abstains_whatever_the_answer(solution, completion):
    assert score(completion, solution) is None


def test_conversations_read_the_last_message_and_columns_do_not_matter():
    talk = [{"role": "user", "content": "5?"}, {"role": "assistant", "content": "<answer>4</answer>"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "<answer>4</answer>"}]}]
    scores = accuracy(
        [talk[:1]] * 3, [talk, parts, "4"], [[1]] * 3, solution=["4"] * 3, finished=[False] * 3, other=[1] * 3
    )
    assert scores == [1.0, 1.0, 1.0]


def test_a_markdown_heading_is_not_an_answer():
    assert score("#### Step 3: add\nThe answer is 12", "12") == 1.0
    assert score("#### Step 3: add\nThe answer is 12", "3") == 0.0


def test_columns_of_different_lengths_are_an_error():
    with pytest.raises(ValueError):
        accuracy([""], ["4", "5"], solution=["4"])


def worked_solutions(count):
    """(solution, its number) in the manner of GSM8K: steps with calculator marks, then `#### x`, in many spellings."""
    rng = random.Random(5)
    for number in range(count):
        value = Decimal(rng.choice([rng.randrange(1000), rng.randrange(10**9), -rng.randrange(1, 10**5)]))
        value = value / 100 if number % 3 == 0 else value
        plain = f"{value:,}" if rng.random() < 0.5 else str(value)
        if number % 4 == 1:
            plain = plain.replace("-", "-$") if value < 0 else f"${plain}"
        elif number % 4 == 2:
            plain += rng.choice([" apples", "%", " dollars", " square feet", "."])
        a = rng.randrange(1, 500)
        steps = f"Ann has {value - a}+{a}=<<{value - a}+{a}={value}>>{value} of them,\nin {a} boxes of 12."
        yield f"{steps}\n#### {plain}", value


def test_every_worked_solution_is_right_and_with_its_number_altered_wrong_and_math_verify_agrees():
    solutions, values = zip(*worked_solutions(200), strict=True)
    assert accuracy([""] * 200, solutions, solution=solutions) == [1.0] * 200
    assert accuracy([""] * 200, [f"\\boxed{{{value}}}" for value in values], solution=solutions) == [1.0] * 200
    for altered in (lambda x: x + 1, lambda x: -x if x else x + 2, lambda x: x * 10 + 3, lambda x: x + Decimal("0.01")):
        others = [f"{text.rpartition('####')[0]}#### {altered(x)}" for text, x in zip(solutions, values, strict=True)]
        assert accuracy([""] * 200, others, solution=solutions) == [0.0] * 200
        assert accuracy([""] * 200, solutions, solution=others) == [0.0] * 200
    for value in values:
        assert verify(parse(f"${value}$"), parse(f"$\\boxed{{{value:,}}}$"))
        assert not verify(parse(f"${value}$"), parse(f"$\\boxed{{{value + 1:,}}}$"))


HOSTILE_QUICK = [
    "9" * 3_000_000,
    "<answer>" * 100_000,
    "</answer>" * 100_000,
    "\\boxed{" * 200_000,
    "####" * 200_000,
    "answer" + " " * 1_000_000,
    "-" * 1_000_000,
    "1.1" * 300_000,
    "1,1" * 300_000,
    "(a+a)*" * 200_000 + "b",
    "<answer>" + "9" * 90_000 + "</answer>",
    "<answer>1e99999999</answer>",
    "<answer>" + "1/" * 40_000 + "1</answer>",
    "<answer>" + "{" * 1_000_000 + "</answer>",
    "\ud800\x00" * 100_000,
]


@pytest.mark.parametrize("hostile", HOSTILE_QUICK, ids=lambda text: text[:12].encode("unicode_escape").decode())
def test_hostile_text_is_read_in_linear_time(hostile):
    started = time.monotonic()
    assert accuracy([""] * 3, ["72", hostile, hostile + "<answer>72</answer>"], solution=["72"] * 3) == [1.0, 0.0, 1.0]
    assert time.monotonic() - started < 4


def test_hostile_mathematics_meets_the_deadline_and_honest_scores_stand():
    nested = "\\frac{" * 200 + "1" + "}{2}" * 200
    hostile = ["10**10**10", "10^{10^{10}}", nested, "{" * 1900 + "1"]
    honest = ["\\frac{\\sqrt{12}}{4}", "\\frac{\\sqrt{5}}{2}", "0.5\\sqrt{3}"]
    completions = [
        f"<answer>{text}</answer>" for pair in zip(hostile, [*honest, honest[0]], strict=True) for text in pair
    ]
    missed = shared_pool().errors["deadline"]
    started = time.monotonic()
    scores = accuracy([""] * 8, completions, solution=["\\frac{\\sqrt{3}}{2}"] * 8)
    assert scores[1::2] == [1.0, 0.0, 1.0, 1.0] and scores[0::2] == [0.0] * 4
    assert time.monotonic() - started < 15  # 4 hostile answers, 5 seconds each, 2 workers, and some slack
    assert shared_pool().errors["deadline"] > missed


def test_a_hostile_solution_abstains_instead_of_blaming_the_answer():
    assert accuracy([""] * 2, ["<answer>2x</answer>"] * 2, solution=["{" * 1900 + "1", "2x"]) == [None, 1.0]

"""Format, instructions and the rules of length and style, each against an oracle of its own kind."""

import itertools
import math
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models import rules
from reward_models.compose import RewardSet
from reward_models.loader import load_reward


def score(rule, text, **columns):
    return rule([""], [text], [[0]], **columns)[0]


PIECES = ["<think>", "</think>", "<answer>", "</answer>", " \n", "a", ""]
LAYOUT = re.compile(r"\s*<think>[^<>]*</think>\s*<answer>[^<>]*</answer>\s*")
BARE = re.compile(r"\s*<answer>[^<>]*</answer>\s*")


def test_format_agrees_with_the_grammar_on_every_short_sequence_of_tags():
    texts = {"".join(pieces) for pieces in itertools.product(PIECES, repeat=6)} | {
        "<think>a</think>b<answer>c</answer>"
    }
    expected = {text: float(bool(LAYOUT.fullmatch(text))) for text in texts}
    assert sum(expected.values()) > 20
    assert dict(zip(texts, rules.format([], list(texts)), strict=True)) == expected
    either = {text: float(bool(LAYOUT.fullmatch(text) or BARE.fullmatch(text))) for text in texts}
    assert dict(zip(texts, rules.answer_format([], list(texts)), strict=True)) == either != expected


@pytest.mark.parametrize(
    "hostile", ["<think>" * 300_000, "<think>" + " " * 2_000_000, "<answer>" + "</think>" * 300_000]
)
def test_format_is_linear(hostile):
    started = time.monotonic()
    assert rules.format([], [hostile]) == rules.answer_format([], [hostile]) == [0.0]
    assert time.monotonic() - started < 1


@given(st.lists(st.sampled_from(PIECES), max_size=8), st.sets(st.sampled_from(PIECES[:4]), min_size=1))
def test_tag_count_is_the_share_of_the_tags_that_stand_exactly_once(pieces, tags):
    once = sum(pieces.count(tag) == 1 for tag in tags)
    assert score(rules.tag_count, "".join(pieces), tags=sorted(tags)) == once / len(tags)
    assert score(rules.tag_count, "".join(pieces)) == sum(pieces.count(tag) == 1 for tag in PIECES[:4]) / 4


def test_tag_count_gives_all_that_format_asks_for_and_is_linear():
    assert score(rules.tag_count, "<think>17</think>\n<answer>4</answer>") == 1.0
    started = time.monotonic()
    assert score(rules.tag_count, "<think>" * 300_000 + "</think>") == 0.25
    assert time.monotonic() - started < 1
    for tags in ([], "<think>"):
        with pytest.raises(ValueError, match="list of tags"):
            score(rules.tag_count, "", tags=tags)


KEPT = {
    "max_words": (6, "The moon shines at night.", "The moon shines brightly at night time."),
    "lowercase": (0, "the moon shines at night.", "The moon shines at night."),
    "contains": ("golden", "A Golden moon shines tonight.", "A goldenrod moon shines tonight."),
    "exclamation": ("", "The moon shines at night!", "The moon shines at night."),
    "begins_with": ("Quiet", "Quiet, the moon is shining.", "Quietly the moon is shining."),
}
NOT_ONE_SENTENCE = [
    "",
    "The moon shines.",
    "the golden moon shines",
    "Quiet golden moon. Quiet golden night!",
    "a b c d!!",
]


@pytest.mark.parametrize("kind", KEPT)
def test_instructions_reward_what_keeps_them(kind):
    value, kept, broken = KEPT[kind]
    assert score(rules.instructions, f" {kept}\n", kind=[kind], value=[value]) == 1.0
    assert score(rules.instructions, broken, kind=[kind], value=[value]) == 0.0
    assert score(rules.instructions, kept, kind=[kind], value=[str(value)]) == 1.0
    assert score(rules.instructions, kept, kind=[kind], value=[value], finished=[False]) == 0.0
    assert score(rules.instructions, kept, kind=[kind], value=[value], finished=[True]) == 1.0
    for text in NOT_ONE_SENTENCE:
        assert score(rules.instructions, text, kind=[kind], value=[value]) == 0.0
    talk = [{"role": "assistant", "content": kept}]
    assert score(rules.instructions, talk, kind=[kind], value=[value]) == 1.0


def test_max_words_counts_to_the_word():
    words = "one two three four five"
    assert [score(rules.max_words, words + ".", kind=["max_words"], value=[n]) for n in (4, 5, 6)] == [0, 1, 1]


def test_the_rule_of_a_kind_scores_its_rows_as_instructions_does_and_abstains_on_others():
    kinds = list(KEPT)
    texts = [text for kind in kinds for text in KEPT[kind][1:]]
    columns = {"kind": [k for k in kinds for _ in "ab"], "value": [KEPT[k][0] for k in kinds for _ in "ab"]}
    whole = rules.instructions([""] * 10, texts, **columns)
    parts = [getattr(rules, kind)([""] * 10, texts, **columns) for kind in kinds]
    for row, scores in enumerate(zip(*parts, strict=True)):
        assert [s for s in scores if s is not None] == [whole[row]]
        assert scores.index(whole[row]) == row // 2


def test_a_kind_that_does_not_exist_is_an_error_and_no_kind_abstains():
    with pytest.raises(ValueError, match=r"upper.*max_words"):
        score(rules.instructions, "text", kind=["upper"], value=[0])
    assert score(rules.instructions, "The moon shines at night.", kind=[None], value=[None]) is None


def test_overlong_is_zero_then_a_straight_line_to_minus_one():
    ids = [[0] * n for n in (0, 60, 80, 85, 90, 100, 500)]
    scores = rules.overlong([""] * 7, [""] * 7, ids, limit=100, buffer=20)
    assert scores == pytest.approx([0, 0, 0, -0.25, -0.5, -1, -1])
    with pytest.raises(ValueError, match="buffer"):
        rules.overlong([""], [""], [[0]], limit=10, buffer=20)


def test_length_falls_linearly_away_from_its_best():
    ids = [[0] * n for n in (0, 5, 10, 15, 1000)]
    assert rules.length([""] * 5, [""] * 5, ids, scale=10, tokens=10) == pytest.approx([-1, -0.5, 0, -0.5, -1])
    assert rules.length([""] * 5, [""] * 5, ids, scale=100) == pytest.approx([0, -0.05, -0.1, -0.15, -1])


def test_cosine_runs_from_short_to_long_and_stays_there_beyond_the_limit():
    lengths = [0, 25, 50, 75, 100, 150, 200]
    ids = [[0] * n for n in lengths]
    right = rules.cosine([""] * 7, ["4"] * 7, ids, solution=["4"] * 7, limit=100)
    wrong = rules.cosine([""] * 7, ["5"] * 7, ids, solution=["4"] * 7, limit=100)
    assert right[:5] == pytest.approx(
        [1, 0.5 + 0.5 * math.cos(math.pi / 8) ** 2, 0.75, 0.5 + 0.5 * math.sin(math.pi / 8) ** 2, 0.5]
    )
    assert wrong[0] == -1 and wrong[2] == pytest.approx(-0.75)
    assert right[4] == right[5] == right[6] and wrong[4] == wrong[6] == -0.5
    assert rules.cosine([""], ["4"], [[0]], solution=[None], limit=100) == [None]


@pytest.mark.parametrize("rule", [rules.length, rules.overlong, rules.cosine])
def test_rules_of_length_need_the_tokens(rule):
    with pytest.raises(ValueError, match="completion_ids"):
        rule([""], ["4"], solution=["4"], limit=100, buffer=10, scale=10)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_repetition_is_the_share_of_grams_seen_before(words, n):
    seen, repeats, total = set(), 0, 0
    for i in range(len(words) - n + 1):
        gram = " ".join(words[i : i + n])
        repeats, total = repeats + (gram in seen), total + 1
        seen.add(gram)
    assert score(rules.repetition, " ".join(words), n=n) == pytest.approx(-repeats / total if total else 0)


def test_reasoning_steps_counts_lines_that_open_a_step():
    text = "Let us see.\n1. Add 3. to 4\n  2) Then go on\n- so\nFinally, 12\nthe 3. of them - no"
    assert score(rules.reasoning_steps, text, steps=8) == 0.5
    assert score(rules.reasoning_steps, text) == 1.0
    assert score(rules.reasoning_steps, "Stepwise, 1.5 -3 *bold* first, next") == 0.0


def test_the_names_are_functions_and_not_modules():
    for name in rules.__all__:
        assert getattr(rules, name).__name__ == name


def test_rewards_of_trl_s_own_package_plug_in_by_import_path():
    pytest.importorskip("trl")
    targets = ("trl.rewards.accuracy_reward", "trl.rewards:think_format_reward", "reward_models.rules.accuracy")
    rewards = RewardSet([(target, load_reward(target), 1.0) for target in targets])
    texts = [r"<think>1 + 2</think>\boxed{\frac{1}{2}}", r"<think>1 + 2</think>\boxed{\frac{1}{3}}", r"\boxed{0.5}"]
    prompts = [[{"role": "user", "content": "1/4 + 1/4?"}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"solution": [r"$\frac{1}{2}$"] * 3, "finished": [True] * 3, "kwargs": [None] * 3}
    scores = rewards.score(prompts, completions, [[1]] * 3, columns)
    assert scores.tolist() == [[1, 1, 1], [0, 1, 0], [1, 0, 1]]
    abstained = rewards.score(prompts[:1], completions[:1], [[1]], {"solution": ["no mathematics"]})
    assert abstained[0, 0].isnan() and abstained[0, 1] == 1  # TRL's None is our abstention
    assert rewards.take_errors() == {}


def test_overlong_and_cosine_are_what_trl_computes():
    trl = pytest.importorskip("trl.rewards")
    ids = [[0] * n for n in range(0, 131, 5)]
    texts = ["\\boxed{4}", "\\boxed{5}"] * 13 + ["\\boxed{4}"]
    columns = {"solution": ["\\boxed{4}"] * 27}
    theirs = trl.get_soft_overlong_punishment(100, 20)(completion_ids=ids)
    assert rules.overlong([], texts, ids, limit=100, buffer=20) == pytest.approx(theirs)
    talk = [[{"role": "assistant", "content": text}] for text in texts]
    theirs = trl.get_cosine_scaled_reward(100)(completions=talk, completion_ids=ids, **columns)
    assert rules.cosine([], talk, ids, limit=100, **columns) == pytest.approx(theirs)

import re
from itertools import combinations, pairwise

import pytest

from agrpo.data.tasks import chains

BOUNDS = {"min_terms": 2, "max_terms": 5}
THINK = re.compile(r"<think>(.*)</think><answer>(\d+)</answer>")


def left_to_right(expression):
    """The value and the steps of a chain, or None where a result falls below 0; shares nothing with the subject."""
    tokens = re.findall(r"\d+|[+-]", expression)
    value, steps = int(tokens[0]), []
    for operator, number in zip(tokens[1::2], tokens[2::2], strict=True):
        before, value = value, value + int(number) if operator == "+" else value - int(number)
        if value < 0:
            return None
        steps.append(f"{before}{operator}{number}={value}")
    return value, steps


@pytest.mark.parametrize("split", chains.SPLITS)
def test_problems_are_right_and_distinct_and_of_the_asked_length(split):
    rows = list(chains.problems(split, count=400, seed=3, min_terms=3, max_terms=4))
    assert len({row["prompt"] for row in rows}) == 400
    for row in rows:
        assert re.fullmatch(r"[1-9]([+-][1-9])+=", row["prompt"])
        assert left_to_right(row["prompt"][:-1])[0] == int(row["solution"])
        assert len(re.findall(r"\d", row["prompt"])) == row["terms"]
    assert {row["terms"] for row in rows} == {3, 4}


def test_no_chain_of_one_split_is_in_another_in_any_function():
    def prompts(split):
        made = (chains.problems, chains.demonstrations, chains.preference_groups)
        return {
            row["prompt"] for make in made for seed in (0, 1) for row in make(split, count=300, seed=seed, **BOUNDS)
        }

    train, validation, test = map(prompts, chains.SPLITS)
    assert not train & validation and not train & test and not validation & test


def test_the_splits_hold_about_eighty_ten_and_ten_per_cent():
    texts = [
        f"{a}{o}{b}{p}{c}" for a in range(1, 10) for b in range(1, 10) for c in range(1, 10) for o in "+-" for p in "+-"
    ]
    split_of = [chains.Chain((int(t[0]), int(t[2]), int(t[4])), t[1] + t[3]).split for t in texts]
    shares = [split_of.count(split) / len(texts) for split in chains.SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


@pytest.mark.parametrize("make", [chains.problems, chains.demonstrations, chains.preference_groups])
def test_rows_are_a_function_of_the_seed_and_a_larger_count_only_adds(make):
    few, many = list(make("train", count=20, seed=5)), list(make("train", count=60, seed=5))
    assert many[:20] == few
    assert list(make("train", count=20, seed=6)) != few


def test_asking_for_more_chains_than_there_are_says_so():
    with pytest.raises(ValueError, match=r"found \d+ chains of 2 to 2 terms for test, not 100; lower count"):
        list(chains.problems("test", count=100, min_terms=2, max_terms=2))


def test_demonstrations_show_the_steps_or_the_answer_alone():
    rows = list(chains.demonstrations("train", count=1000, seed=1, direct=0.4))
    direct = 0
    for row in rows:
        value, steps = left_to_right(row["prompt"][:-1])
        if row["completion"] == f"<answer>{value}</answer>":
            direct += 1
        else:
            assert row["completion"] == f"<think>{';'.join(steps)}</think><answer>{value}</answer>"
    assert direct / 1000 == pytest.approx(0.4, abs=0.06)


def pairs(rows):
    for row in rows:
        for a, b in combinations(zip(row["completions"], row["levels"], strict=True), 2):
            if a[1] != b[1]:
                yield (a[0], b[0]) if a[1] > b[1] else (b[0], a[0])


@pytest.mark.parametrize("direct", [0.0, 0.5, 1.0])
def test_form_and_length_say_nothing_of_the_level(direct):
    found = list(pairs(chains.preference_groups("train", count=1500, seed=2, direct=direct)))
    features = {
        "longer": len,
        "shorter": lambda text: -len(text),
        "has think": lambda text: "<think>" in text,
        "more steps": lambda text: text.count(";"),
    }
    for name, feature in features.items():
        score = sum((feature(good) > feature(bad)) + 0.5 * (feature(good) == feature(bad)) for good, bad in found)
        assert score / len(found) == pytest.approx(0.5, abs=0.05), name


@pytest.mark.parametrize("direct", [0.0, 1.0])
def test_right_is_right_and_each_wrong_completion_holds_exactly_one_slip(direct):
    slips = {"result": 0, "operand": 0, "answer": 0}
    equal = total = 0
    for row in chains.preference_groups("train", count=600, seed=4, direct=direct):
        value, steps = left_to_right(row["prompt"][:-1])
        right = f"<think>{';'.join(steps)}</think><answer>{value}</answer>"
        allowed = {right, f"<answer>{value}</answer>"}
        assert len(set(row["completions"])) == 4
        assert sorted(row["levels"]) == ([0, 0, 0, 1] if direct == 0 else [0, 0, 1, 1])
        for completion, level in zip(row["completions"], row["levels"], strict=True):
            assert (completion in allowed) == bool(level)
            assert len(completion) in map(len, allowed)
            if level or "<think>" not in completion:
                continue
            total += 1
            equal += len(completion) == len(right)
            slips[which_slip(completion, row["prompt"][:-1])] += 1
    assert equal == total
    assert min(slips.values()) > total / 6


def which_slip(completion, expression):
    """Names the one slip of a wrong completion; fails where there are two or none."""
    thought, answer = THINK.fullmatch(completion).groups()
    steps = [re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups() for step in thought.split(";")]
    numbers = re.findall(r"\d", expression)
    assert [step[1] for step in steps] == re.findall(r"[+-]", expression)
    assert all(before[3] == after[0] for before, after in pairwise(steps))
    copied = [steps[0][0], *(step[2] for step in steps)]
    found = ["operand"] * sum(mine != theirs for mine, theirs in zip(copied, numbers, strict=True))
    found += ["result"] * sum(int(a) + int(o + b) != int(c) for a, o, b, c in steps)
    found += ["answer"] * (answer != steps[-1][3])
    (slip,) = found
    return slip


def test_the_level_does_not_depend_on_the_place_in_the_group():
    rows = list(chains.preference_groups("train", count=1000, seed=0))
    firsts = [sum(row["levels"][place] for row in rows) / 1000 for place in range(4)]
    assert firsts == pytest.approx([0.25] * 4, abs=0.06)


def test_groups_can_be_larger_and_stay_distinct():
    for row in chains.preference_groups("validation", count=50, size=9):
        assert len(set(row["completions"])) == 9 and sum(row["levels"]) == 1


def test_rows_use_no_other_characters_than_the_alphabet():
    for row in chains.preference_groups("test", count=200, direct=0.5):
        for text in (row["prompt"], *row["completions"]):
            for tag in chains.TAGS:
                text = text.replace(tag, "")
            assert re.fullmatch(r"[0-9+\-=;]+", text)


@pytest.mark.parametrize(
    "make, wrong",
    [
        (chains.problems, {"split": "dev"}),
        (chains.problems, {"split": "train", "min_terms": 1}),
        (chains.demonstrations, {"split": "train", "direct": 1.5}),
        (chains.preference_groups, {"split": "train", "direct": -0.5}),
        (chains.preference_groups, {"split": "train", "size": 1}),
    ],
)
def test_wrong_parameters_are_refused_by_name(make, wrong):
    key = list(wrong)[-1] if len(wrong) > 1 else "split"
    with pytest.raises(ValueError, match=key):
        list(make(**wrong))

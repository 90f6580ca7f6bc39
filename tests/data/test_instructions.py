import re

import pytest

from agrpo.data.tasks import instructions


def keeps(sentence, kind, value):
    """An own reading of the instruction, also that it is one plain sentence of at least four words."""
    words = sentence.split()
    if len(words) < 4 or len(re.findall(r"[.!?]", sentence)) != 1 or sentence[-1] not in ".!?":
        return False
    return {
        "max_words": lambda: len(words) <= value,
        "lowercase": lambda: not re.search(r"[A-Z]", sentence),
        "contains": lambda: re.search(rf"\b{value}\b", sentence) is not None,
        "exclamation": lambda: sentence.endswith("!"),
        "begins_with": lambda: re.match(rf"{value}\b", sentence) is not None,
    }[kind]()


def topic_of(row):
    content = row["prompt"][0]["content"]
    return re.match(r"Write one sentence about (.+?)( in at most| that contains|\. )", content)[1]


def test_every_demonstration_keeps_its_instruction_and_speaks_of_its_topic():
    rows = instructions.demonstrations("train", count=400, seed=0)
    assert {row["kind"] for row in rows} == set(instructions.KINDS)
    for row in rows:
        (turn,) = row["completion"]
        assert turn["role"] == "assistant"
        assert keeps(turn["content"], row["kind"], row["value"]), (row["prompt"], turn)
        assert topic_of(row).split()[-1] in turn["content"].lower()
    assert len({row["prompt"][0]["content"] for row in rows}) == 400


def test_a_sentence_for_another_kind_seldom_passes_so_the_check_can_fail():
    rows = instructions.demonstrations("train", count=300, seed=1)
    strict = [row for row in rows if row["kind"] in ("lowercase", "exclamation", "begins_with")]
    others = [row["completion"][0]["content"] for row in rows if row["kind"] == "max_words"]
    assert strict and others and not any(keeps(text, row["kind"], row["value"]) for row in strict for text in others)


def test_splits_speak_of_disjoint_topics_and_test_has_three_hundred_prompts():
    counts = {"train": 900, "validation": 140, "test": 320}
    topics = {split: {topic_of(row) for row in instructions.prompts(split, n, 0)} for split, n in counts.items()}
    assert (len(topics["train"]), len(topics["validation"])) == (28, 4) and len(topics["test"]) >= 16
    assert not topics["train"] & topics["validation"] and not (topics["train"] | topics["validation"]) & topics["test"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prompts_are_distinct_reproducible_and_say_what_kind_and_value_say(split):
    rows = instructions.prompts(split, 120, seed=9)
    contents = [row["prompt"][0]["content"] for row in rows]
    assert len(set(contents)) == 120 and rows == instructions.prompts(split, 120, seed=9)
    assert instructions.prompts(split, 120, seed=8) != rows
    assert {row["kind"] for row in rows} == set(instructions.KINDS)
    for row, content in zip(rows, contents, strict=True):
        assert row["prompt"] == [{"role": "user", "content": content}]
        expected = {
            "max_words": f"in at most {row['value']} words.",
            "lowercase": "Use only lowercase letters.",
            "contains": f'that contains the word "{row["value"]}".',
            "exclamation": "End it with an exclamation mark.",
            "begins_with": f'Begin with the word "{row["value"]}".',
        }[row["kind"]]
        assert content.endswith(expected)


def test_asking_for_too_many_or_for_unwritten_demonstrations_says_so():
    with pytest.raises(ValueError, match="validation has 140 different ones; lower count"):
        instructions.prompts("validation", 141, 0)
    with pytest.raises(ValueError, match="written for train only"):
        instructions.demonstrations("test", 10, 0)

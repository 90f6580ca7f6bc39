"""Products for the calculator: right, distinct, and of one split each."""

import itertools

import pytest

from agrpo.data.tasks.products import SPLITS, demonstrations, problems


def asked(row):
    return row.get("prompt", row.get("messages"))[0]["content"]


def test_solutions_are_products_and_splits_share_none():
    found = {split: list(problems(split, 300)) for split in SPLITS}
    for rows in found.values():
        texts = [asked(row) for row in rows]
        assert len(set(texts)) == 300
        for text, row in zip(texts, rows, strict=True):
            a, b = text.split("*")
            assert len(a) == len(b) == 3 and int(row["solution"]) == int(a) * int(b)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {asked(row) for row in found[one]} & {asked(row) for row in found[other]}
    test = {asked(row) for row in problems("test", 2000)}
    assert not {asked(row) for row in demonstrations("train", 2000)} & test


def test_demonstrations_call_or_answer_at_once():
    rows = list(demonstrations("train", 400, direct=0.7))
    direct = [row for row in rows if len(row["messages"]) == 2]
    assert 0.6 < len(direct) / 400 < 0.8
    for row in rows:
        text, answer = asked(row), {"role": "assistant", "content": f"<answer>{row['solution']}</answer>"}
        call = [{"role": "assistant", "content": f"<call>{text}</call>"}, {"role": "tool", "content": row["solution"]}]
        assert row["messages"][1:] in ([answer], [*call, answer])
    assert list(itertools.islice(demonstrations("train", 400, direct=0.7), 9)) == rows[:9]
    assert list(demonstrations("train", 50, direct=0.7)) == rows[:50]


@pytest.mark.parametrize(
    ("split", "parameters", "message"),
    [
        ("tset", {}, "split: 'tset' is not one of train, validation, test"),
        ("train", {"digits": 0}, "digits: 0"),
        ("test", {"digits": 1, "count": 90}, "products for test, not 90; lower count or raise digits"),
    ],
)
def test_what_cannot_be_made_is_an_error(split, parameters, message):
    with pytest.raises(ValueError, match=message):
        list(problems(split, **parameters))


def test_a_share_is_between_0_and_1():
    with pytest.raises(ValueError, match=r"direct: 1.5 is not a share"):
        next(demonstrations("train", direct=1.5))

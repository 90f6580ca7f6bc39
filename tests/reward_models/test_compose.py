"""Abstaining is not scoring 0, a failing reward costs its own column, and every lost score is counted."""

import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models.compose import Entry, Gate, RewardSet


def giving(values):
    return lambda prompts, completions, completion_ids, **columns: values


def scores_of(rewards, n=3):
    return rewards.score(["p"] * n, ["c"] * n, [[1]] * n, {})


def failing(prompts, completions, completion_ids, **columns):
    raise RuntimeError("the service is down")


def test_columns_reach_every_reward_by_name_and_are_its_own_to_change():
    def greedy(prompts, completions, completion_ids, solution, **columns):
        given = [float(x) for x in solution]
        solution.clear(), completions.clear(), prompts.clear(), completion_ids[0].clear()
        return given

    rewards = RewardSet([("a", greedy, 1.0), ("b", greedy, 1.0)])
    ids = [[1], [2]]
    assert rewards.score(["p", "p"], ["x", "y"], ids, {"solution": ("3", "4")}).tolist() == [[3, 3], [4, 4]]
    assert ids == [[1], [2]] and not rewards.errors


def test_what_is_not_a_finite_number_is_masked_and_all_but_none_is_counted():
    rewards = RewardSet(
        [
            ("good", giving([1.0, 2, True]), 1.0),
            ("tensor", giving(torch.tensor([1.0, 2.0, 3.0])), 1.0),
            ("abstains", giving([None, 0.5, None]), 1.0),
            ("odd", giving([math.nan, math.inf, "x"]), 1.0),
            ("huge", giving([1e300, -1e300, 1.0]), 1.0),
            ("short", giving([1.0]), 1.0),
            ("nothing", giving(None), 1.0),
            ("raises", failing, 1.0),
        ]
    )
    scores = scores_of(rewards)
    assert scores.shape == (3, 8) and scores.dtype == torch.float32
    nan = math.nan
    expected = torch.tensor(
        [[1, 1, nan, nan, nan, nan, nan, nan], [2, 2, 0.5, nan, nan, nan, nan, nan], [1, 3, nan, nan, 1, nan, nan, nan]]
    )
    torch.testing.assert_close(scores, expected, equal_nan=True)
    assert rewards.errors == {"odd": 3, "huge": 2, "short": 3, "nothing": 3, "raises": 3}
    assert "the service is down" in rewards.first_error["raises"] and "Traceback" in rewards.first_error["raises"]
    assert "1 scores for 3 completions" in rewards.first_error["short"]
    assert rewards.take_errors()["raises"] == 3 and rewards.take_errors() == {}
    scores_of(rewards)
    assert rewards.take_errors()["raises"] == 3


@given(
    st.lists(st.lists(st.none() | st.floats(-10, 10, width=16), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.floats(-2, 2, width=16), min_size=3, max_size=3),
)
def test_total_is_the_weighted_sum_of_what_was_scored(rows, weights):
    columns = [giving(list(column)) for column in zip(*rows, strict=True)]
    rewards = RewardSet([(str(k), column, w) for k, (column, w) in enumerate(zip(columns, weights, strict=True))])
    total = rewards.total(scores_of(rewards, len(rows))).tolist()
    for value, row in zip(total, rows, strict=True):
        scored = [w * x for w, x in zip(weights, row, strict=True) if x is not None]
        assert math.isnan(value) if not scored else value == pytest.approx(sum(scored), abs=1e-4)


def test_an_abstention_does_not_pull_the_total_down():
    rewards = RewardSet(
        [("a", giving([1.0, 1.0]), 1.0), ("b", giving([None, 0.0]), 1.0), ("c", giving([None, -1.0]), 1.0)]
    )
    assert rewards.total(scores_of(rewards, 2)).tolist() == [1.0, 0.0]


def table(*columns):
    return torch.tensor(columns, dtype=torch.float32).T


def test_a_gate_lets_a_reward_count_only_where_the_other_passed():
    rewards = RewardSet(
        [("format", failing, 0.5), Entry("accuracy", failing, 2.0, gate=Gate("format", 1.0, otherwise=-0.25))]
    )
    scores = table([1.0, 0.0, 1.0, math.nan, 0.0], [1.0, 1.0, 0.0, 1.0, math.nan])
    shaped = rewards.shaped(scores)
    assert shaped[:, 1].tolist()[:3] == [1.0, -0.25, 0.0]
    assert shaped[3, 1].isnan() and shaped[4, 1] == -0.25  # an abstaining gate hides the reward; a closed one decides
    assert rewards.total(scores)[:3].tolist() == [2.5, -0.5, 0.5] and rewards.total(scores)[3].isnan()
    with pytest.raises(ValueError, match="the gate of reward 'accuracy' is 'style'"):
        RewardSet([("format", failing), Entry("accuracy", failing, gate=Gate("style"))])


@given(st.lists(st.lists(st.floats(-5, 5, width=16), min_size=1, max_size=7), min_size=2, max_size=4))
def test_running_normalisation_is_that_of_everything_seen_so_far_in_whatever_portions(portions):
    rewards = RewardSet([Entry("a", failing, normalise=True), ("b", failing)])
    for portion in portions:
        rewards.observe(table([*portion, math.nan], [1.0] * (len(portion) + 1)))
    seen = [x for portion in portions for x in portion]
    deviation = max(1e-6, statistics.pstdev(seen))
    probe = table([1.5, -2.0], [3.0, 4.0])
    resumed = RewardSet([Entry("a", failing, normalise=True), ("b", failing)])
    resumed.load_state_dict(json.loads(json.dumps(rewards.state_dict())))
    for own in (rewards, resumed):
        shaped = own.shaped(probe)
        expected = [(x - statistics.fmean(seen)) / deviation for x in (1.5, -2.0)]
        assert shaped[:, 0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert shaped[:, 1].tolist() == [3.0, 4.0]


def test_before_anything_was_seen_scores_count_as_they_are():
    rewards = RewardSet([Entry("a", failing, normalise=True)])
    assert rewards.shaped(table([2.0, -7.0])).tolist() == [[2.0], [-7.0]]


def test_all_failed_only_where_nothing_was_scored():
    lost = RewardSet([("a", failing, 1.0), ("b", giving([None] * 3), 1.0)])
    assert lost.all_failed(scores_of(lost))
    kept = RewardSet([("a", failing, 1.0), ("b", giving([None, None, 0.0]), 1.0)])
    assert not kept.all_failed(scores_of(kept))


def test_names_are_unique():
    names = ["accuracy", "format", "accuracy", "accuracy-2", "accuracy"]
    assert RewardSet([(name, failing, 1.0) for name in names]).names == (
        "accuracy",
        "format",
        "accuracy-3",
        "accuracy-2",
        "accuracy-4",
    )
    assert RewardSet([("a", failing, 1.0)] * 3).names == ("a", "a-2", "a-3")


def test_an_interrupt_is_not_swallowed():
    def interrupted(prompts, completions, completion_ids, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores_of(RewardSet([("a", interrupted, 1.0)]))


@pytest.mark.parametrize("specs", [[], [("a", failing, math.nan)], [("a", failing, math.inf)]])
def test_senseless_sets_are_refused(specs):
    with pytest.raises(ValueError):
        RewardSet(specs)

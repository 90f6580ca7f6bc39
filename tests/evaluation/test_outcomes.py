"""pass@k against enumeration and its expectation, the majority by hand, intervals against closed forms."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrpo.evaluation.intervals import bootstrap_interval, share_interval, wilson_interval
from agrpo.evaluation.outcomes import majority, pass_at_k
from agrpo.evaluation.summary import summarise


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass(n):
    for passes, k in itertools.product(range(n + 1), range(1, n + 1)):
        outcomes = [i < passes for i in range(n)]
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(n, passes, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "k", "p"), [(8, 1, 0.3), (8, 4, 0.1), (16, 8, 0.5), (200, 100, 0.01)])
def test_pass_at_k_is_unbiased(n, k, p):
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(weight * pass_at_k(n, c, k) for c, weight in enumerate(chance))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-9)
    if 1 < k < n:  # what takes c / n for p is not
        plain = sum(weight * (1 - (1 - c / n) ** k) for c, weight in enumerate(chance))
        assert abs(plain - (1 - (1 - p) ** k)) > 1e-4


@pytest.mark.parametrize(("n", "passes", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(n, passes, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, passes, k)


@pytest.mark.parametrize(
    ("votes", "right", "expected"),
    [
        (["7", "7", "8"], ["7"], 1.0),
        (["7", "8", "8"], ["7"], 0.0),
        (["7", "8", "9"], ["8"], 1 / 3),  # a tie of three, one of them right
        (["7", "7", "8", "8", "9"], ["7"], 0.5),
        (["7", None, None], ["7"], 1.0),  # no answer, no vote
        ([None, None], [], 0.0),
        ([], [], 0.0),
        (["a", "b", "a"], ["a", "b"], 1.0),
    ],
)
def test_the_majority_by_hand(votes, right, expected):
    assert majority(votes, [vote in right for vote in votes]) == pytest.approx(expected)


def test_an_answer_that_passes_at_times_counts_its_share():
    assert majority(["7", "7", "7", "8"], [True, False, True, True]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("passes", "n"), [(0, 10), (3, 10), (10, 10), (170, 500)])
def test_wilsons_bounds_solve_his_equation(passes, n):
    share, z = passes / n, 1.959963984540054
    for bound in wilson_interval(passes, n):
        assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-12)
    low, high = wilson_interval(passes, n)
    assert 0 <= low <= share <= high <= 1 and low < high


def test_wilsons_interval_holds_the_share_as_often_as_it_says():
    n = 60
    for p in (0.1, 0.5, 0.83):
        weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        covered = sum(w for c, w in enumerate(weights) if wilson_interval(c, n)[0] <= p <= wilson_interval(c, n)[1])
        assert covered == pytest.approx(0.95, abs=0.025)


def test_an_interval_needs_outcomes():
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0, 0)


def test_outcomes_of_nought_and_one_have_wilsons_interval_and_others_the_bootstraps():
    assert share_interval([1.0] * 9) == wilson_interval(9, 9)
    values = [0.5, 1.0, 0.0, 0.25]
    assert share_interval(values) == bootstrap_interval(values)


def sample(passes, vote="x", tokens=3, reward=None):
    reward = float(passes) if reward is None else reward
    return {"text": "", "tokens": tokens, "finished": True, "passes": passes, "vote": vote, "reward": reward}


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12))
def test_a_summary_is_the_closed_forms_of_its_outcomes(outcomes):
    rows = [{"samples": [sample(o) for o in group], "greedy": sample(group[0])} for group in outcomes]
    told = summarise(rows)
    counts = [sum(group) for group in outcomes]
    assert told["n"] == len(outcomes) and told["k"] == 4
    assert told["pass1"] == pytest.approx(sum(counts) / (4 * len(counts)))
    assert told["pass_k"] == pytest.approx(sum(c > 0 for c in counts) / len(counts))
    assert told["pass_at"]["2"] == pytest.approx(sum(1 - math.comb(4 - c, 2) / 6 for c in counts) / len(counts))
    assert told["greedy"] == pytest.approx(sum(group[0] for group in outcomes) / len(outcomes))
    assert told["mean_reward"] == told["pass1"] and told["mean_length"] == 3
    assert told["interval"] == list(share_interval([c / 4 for c in counts]))
    assert told["intervals"]["greedy"] == list(wilson_interval(sum(group[0] for group in outcomes), len(outcomes)))


def test_completions_that_no_reward_scored_are_counted_and_leave_the_mean():
    unscored = {**sample(False), "reward": None}
    told = summarise([{"samples": [sample(True), unscored]}, {"samples": [unscored, unscored]}])
    assert told["mean_reward"] == 1.0 and told["unscored"] == 3
    assert told["pass1"] == 0.25 and told["greedy"] is None

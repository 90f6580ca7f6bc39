import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms import advantages
from agrpo.algorithms.advantages import ESTIMATORS, gdpo_advantages, group_advantages, zero_signal_fraction

NAN = math.nan
reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1, NAN]), st.floats(-5, 5, width=32))
ragged = st.lists(st.lists(reward, min_size=1, max_size=6), min_size=1, max_size=5)
names = pytest.mark.parametrize("name", ESTIMATORS)
FREE_OF_ORDER = [name for name in ESTIMATORS if name != "kalman_recursive"]
BY_STATISTICS = ["group", "none", "batch", "weighted", "rloo"]


def flat(groups):
    rewards = torch.tensor([r for g in groups for r in g], dtype=torch.float64)
    return rewards, torch.tensor([p for p, g in enumerate(groups) for _ in g])


def oracle(groups, name, delta=1e-4, ddof=0, kappa=4.0):
    """Group by group in plain floats, with the standard library's statistics."""
    centred = []
    for g in groups:
        scored = [r for r in g if not math.isnan(r)]
        flat_group = len(set(scored)) < 2
        mean = statistics.fmean(scored) if scored else 0.0
        centred.append([0.0 if flat_group or math.isnan(r) else r - mean for r in g])
    everything = [c for g, cs in zip(groups, centred, strict=True) for r, c in zip(g, cs, strict=True) if r == r]
    over = lambda xs: sum(x * x for x in xs) / max(1, len(xs) - ddof)  # noqa: E731
    batch = over(everything)
    result = []
    for g, cs in zip(groups, centred, strict=True):
        own_rewards = [r for r in g if r == r]
        own = 0.0
        if len(set(own_rewards)) > 1:
            own = statistics.variance(own_rewards) if ddof else statistics.pvariance(own_rewards)
        w = (len(own_rewards) - 1) / (len(own_rewards) - 1 + kappa) if len(own_rewards) > 1 else 1.0
        scale = {
            "group": math.sqrt(own) + delta,
            "none": 1.0,
            "batch": math.sqrt(batch) + delta,
            "weighted": math.sqrt(w * own + (1 - w) * batch + delta),
            "rloo": 1.0,
        }[name]
        if name == "rloo":
            cs = [less_the_others(g, n) for n in range(len(g))]
        result += [c / scale for c in cs]
    return torch.tensor(result, dtype=torch.float64)


def less_the_others(g, n):
    others = [r for m, r in enumerate(g) if m != n and r == r]
    return 0.0 if not others or math.isnan(g[n]) else g[n] - statistics.fmean(others)


@pytest.mark.parametrize("name", BY_STATISTICS)
@pytest.mark.parametrize("ddof", [0, 1])
@settings(max_examples=40, deadline=None)
@given(groups=ragged)
def test_estimators_equal_the_plain_python_definition(name, ddof, groups):
    rewards, group = flat(groups)
    actual = ESTIMATORS[name](rewards, group, std_ddof=ddof)
    torch.testing.assert_close(actual, oracle(groups, name, ddof=ddof), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", FREE_OF_ORDER)
@settings(max_examples=30, deadline=None)
@given(groups=ragged, seed=st.integers(0, 1000))
def test_order_within_and_across_groups_does_not_matter(name, groups, seed):
    rewards, group = flat(groups)
    shuffled = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    actual = ESTIMATORS[name](rewards[shuffled], group[shuffled])
    torch.testing.assert_close(actual, ESTIMATORS[name](rewards, group)[shuffled], atol=1e-9, rtol=1e-7)


@names
def test_equal_rewards_singletons_and_unscored_are_exactly_zero_in_float32(name):
    groups = [[0.9] * 3, [0.7], [NAN, NAN], [0.3, NAN, 0.3], [0.2, 1.0, NAN]]
    rewards, group = flat(groups)
    rewards = rewards.float()
    assert rewards[:3].sum() / 3 != rewards[0]  # the rounding that would become noise/δ
    actual = ESTIMATORS[name](rewards, group)
    assert torch.equal(actual == 0, torch.tensor([True] * 9 + [False, False, True]))


@names
def test_unscored_completions_leave_the_others_as_if_absent(name):
    with_nan = ESTIMATORS[name](*flat([[1.0, NAN, 0.0, 0.0], [2.0, 5.0, NAN]]))
    without = ESTIMATORS[name](*flat([[1.0, 0.0, 0.0], [2.0, 5.0]]))
    torch.testing.assert_close(with_nan[[0, 2, 3, 4, 5]], without, atol=0, rtol=1e-12)


def test_weighted_lies_between_its_two_ends():
    rewards, group = flat([[0.0, 1.0, 3.0], [0.0, 10.0], [4.0, 4.5, 5.0, 7.0]])
    exact = {"delta": 0.0}
    group_end = ESTIMATORS["group"](rewards, group, **exact)
    batch_end = ESTIMATORS["batch"](rewards, group, **exact)
    torch.testing.assert_close(ESTIMATORS["weighted"](rewards, group, kappa=0.0, **exact), group_end)
    torch.testing.assert_close(ESTIMATORS["weighted"](rewards, group, kappa=math.inf, **exact), batch_end)
    middle = ESTIMATORS["weighted"](rewards, group, **exact).abs()
    low, high = torch.minimum(group_end.abs(), batch_end.abs()), torch.maximum(group_end.abs(), batch_end.abs())
    assert ((low - 1e-12 <= middle) & (middle <= high + 1e-12)).all()


def centred_difference(own, mean, variance, delta=1e-4):
    return (own - mean) / (math.sqrt(variance) + delta)


def conditioned(variance, cross, covariance, values):
    """Mean and variance of a Gaussian of mean 0, given others of mean 0 that it is correlated with."""
    gain = np.linalg.solve(covariance, cross)
    return float(gain @ values), float(variance - gain @ cross)


def scored_and_different(g):
    return [n for n, r in enumerate(g) if r == r] if len({r for r in g if r == r}) > 1 else []


@settings(max_examples=60, deadline=None)
@given(groups=ragged)
def test_kalman_is_the_gaussian_posterior_of_one_baseline(groups):
    """The baseline b ~ N(0, 1) and the rewards b + N(0, 0.01) are jointly Gaussian; b is conditioned on them."""
    expected = []
    for g in groups:
        places = scored_and_different(g)
        z = np.array([g[n] for n in places])
        mean, variance = conditioned(1.0, np.ones(len(z)), 1.0 + 0.01 * np.eye(len(z)), z)
        expected += [centred_difference(g[n], mean, variance) if n in places else 0.0 for n in range(len(g))]
    actual = ESTIMATORS["kalman"](*flat(groups))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-7)


@settings(max_examples=60, deadline=None)
@given(groups=ragged)
def test_recursive_kalman_is_the_posterior_of_a_drifting_baseline_after_each_reward(groups):
    """A random walk from N(0, 1) with steps of variance 1e-5 has covariances 1 + 1e-5·min(i, j)."""
    expected = []
    for g in groups:
        places = scored_and_different(g)
        for n in range(len(g)):
            if n not in places:
                expected.append(0.0)
                continue
            z = np.array([g[m] for m in places if m <= n])
            step = np.arange(1, len(z) + 1)
            walk = 1 + 1e-5 * np.minimum(step[:, None], step)
            mean, variance = conditioned(walk[-1, -1], walk[-1], walk + 0.01 * np.eye(len(z)), z)
            expected.append(centred_difference(g[n], mean, variance))
    actual = ESTIMATORS["kalman_recursive"](*flat(groups))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-7)


def test_recursive_kalman_depends_on_the_order_within_a_group_but_not_across_groups():
    rewards, group = flat([[1.0, 0.0, 0.0, 1.0], [0.5, 2.0, 0.0]])
    recursive = ESTIMATORS["kalman_recursive"]
    backwards = recursive(rewards.flip(0), group.flip(0)).flip(0)
    assert (backwards - recursive(rewards, group)).abs().min() > 0.1
    interleaved = torch.tensor([4, 0, 1, 5, 2, 6, 3])
    actual = recursive(rewards[interleaved], group[interleaved])
    torch.testing.assert_close(actual, recursive(rewards, group)[interleaved])


def test_without_drift_the_last_reward_meets_the_posterior_of_them_all(monkeypatch):
    rewards, group = flat([[1.0, 0.0, 0.3, NAN, 0.7], [0.5, 2.0], [0.1] * 3])
    drifting = ESTIMATORS["kalman_recursive"](rewards, group)
    free_of_order = ESTIMATORS["kalman"](rewards, group)
    monkeypatch.setattr(advantages, "_DRIFT", 0.0)
    still = ESTIMATORS["kalman_recursive"](rewards, group)
    last = torch.tensor([4, 6])
    torch.testing.assert_close(still[last], free_of_order[last])
    torch.testing.assert_close(drifting[last], free_of_order[last], rtol=5e-3, atol=0)
    first = torch.tensor([0, 5])
    assert (still - free_of_order)[first].abs().min() > 1


@names
def test_infinite_rewards_are_refused(name):
    with pytest.raises(ValueError, match="infinite"):
        ESTIMATORS[name](torch.tensor([1.0, math.inf]), torch.tensor([0, 0]))


def test_zero_signal_fraction_counts_groups_that_occur():
    rewards, group = flat([[0.1] * 3, [0.7], [NAN, NAN], [0.0, 1.0]])
    assert zero_signal_fraction(rewards, group) == 0.75
    assert zero_signal_fraction(rewards, group * 2) == 0.75
    assert zero_signal_fraction(rewards[:0], group[:0]) == 0.0


def gdpo_oracle(rows, weights, sizes, ddof, delta=1e-4):
    """Reward by reward and group by group in plain floats, with the standard library's statistics."""
    deviation = statistics.stdev if ddof else statistics.pstdev
    total, tells = [0.0] * len(rows), [False] * len(rows)
    for k, weight in enumerate(weights):
        start = 0
        for size in sizes:
            scored = [n for n in range(start, start + size) if rows[n][k] == rows[n][k]]
            own = [rows[n][k] for n in scored]
            start += size
            if len(set(own)) < 2:
                continue
            for n, score in zip(scored, own, strict=True):
                total[n] += weight * (score - statistics.fmean(own)) / (deviation(own) + delta)
                tells[n] = True
    of_batch = [t for t, row in zip(total, rows, strict=True) if any(score == score for score in row)]
    mean = statistics.fmean(of_batch) if of_batch else 0.0
    spread = deviation(of_batch) if len(of_batch) > ddof else 0.0
    return [(t - mean) / (spread + delta) if tell else 0.0 for t, tell in zip(total, tells, strict=True)]


sizes_and_rows = st.lists(st.integers(1, 4), min_size=1, max_size=4).flatmap(
    lambda sizes: st.tuples(
        st.just(sizes), st.lists(st.tuples(reward, reward, reward), min_size=sum(sizes), max_size=sum(sizes))
    )
)


@pytest.mark.parametrize("ddof", [0, 1])
@settings(max_examples=60, deadline=None)
@given(case=sizes_and_rows, weights=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, -1.0])] * 3))
def test_gdpo_equals_the_plain_python_definition(ddof, case, weights):
    sizes, rows = case
    scores = torch.tensor(rows, dtype=torch.float64)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    actual = gdpo_advantages(scores, torch.tensor(weights), group, std_ddof=ddof)
    expected = torch.tensor(gdpo_oracle(rows, weights, sizes, ddof), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-6)


def test_gdpo_keeps_apart_what_the_summed_reward_confuses():
    """GDPO's own example: one of two goals reached, or both, against none. Their sums look alike once normalised."""
    scores = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    group = torch.tensor([0, 0, 1, 1])
    summed = group_advantages(scores.sum(1), group)
    apart = gdpo_advantages(scores, torch.ones(2), group)
    assert (summed[3] / summed[1]).item() == pytest.approx(1, abs=1e-3)
    assert (apart[3] / apart[1]).item() == pytest.approx(2, rel=1e-3)


def test_gdpo_is_exactly_zero_where_no_function_tells_the_group_apart():
    one_says = [[0.9, NAN], [0.9, NAN], [0.9, NAN], [NAN, NAN], [0.3, 0.3], [0.3, 0.9], [0.3, NAN]]
    scores, group = torch.tensor(one_says), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    actual = gdpo_advantages(scores, torch.tensor([1.0, 0.7]), group)
    assert torch.equal(actual == 0, torch.tensor([True, True, True, True, False, False, True]))
    assert gdpo_advantages(scores[:4], torch.ones(2), group[:4]).tolist() == [0.0] * 4


def test_gdpo_refuses_an_infinite_score():
    with pytest.raises(ValueError, match="infinite"):
        gdpo_advantages(torch.tensor([[1.0], [-math.inf]]), torch.ones(1), torch.tensor([0, 0]))

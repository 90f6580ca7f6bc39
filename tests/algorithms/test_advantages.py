import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms.advantages import ESTIMATORS, zero_signal_fraction

NAN = math.nan
reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1, NAN]), st.floats(-5, 5, width=32))
ragged = st.lists(st.lists(reward, min_size=1, max_size=6), min_size=1, max_size=5)
names = pytest.mark.parametrize("name", ESTIMATORS)


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
        }[name]
        result += [c / scale for c in cs]
    return torch.tensor(result, dtype=torch.float64)


@names
@pytest.mark.parametrize("ddof", [0, 1])
@settings(max_examples=40, deadline=None)
@given(groups=ragged)
def test_estimators_equal_the_plain_python_definition(name, ddof, groups):
    rewards, group = flat(groups)
    actual = ESTIMATORS[name](rewards, group, std_ddof=ddof)
    torch.testing.assert_close(actual, oracle(groups, name, ddof=ddof), atol=1e-9, rtol=1e-7)


@names
@settings(max_examples=30, deadline=None)
@given(groups=ragged, seed=st.integers(0, 1000))
def test_order_within_and_across_groups_does_not_matter(name, groups, seed):
    rewards, group = flat(groups)
    shuffled = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    actual = ESTIMATORS[name](rewards[shuffled], group[shuffled])
    torch.testing.assert_close(actual, ESTIMATORS[name](rewards, group)[shuffled], atol=1e-9, rtol=1e-7)


@names
def test_equal_rewards_singletons_and_unscored_are_exactly_zero_in_float32(name):
    groups = [[0.9] * 3, [0.7], [NAN, NAN], [0.3, NAN, 0.3], [0.0, 1.0, NAN]]
    rewards, group = flat(groups)
    rewards = rewards.float()
    assert rewards[:3].sum() / 3 != rewards[0]  # the rounding that would become noise/δ
    advantages = ESTIMATORS[name](rewards, group)
    assert torch.equal(advantages == 0, torch.tensor([True] * 9 + [False, False, True]))


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


@names
def test_infinite_rewards_are_refused(name):
    with pytest.raises(ValueError, match="infinite"):
        ESTIMATORS[name](torch.tensor([1.0, math.inf]), torch.tensor([0, 0]))


def test_zero_signal_fraction_counts_groups_that_occur():
    rewards, group = flat([[0.1] * 3, [0.7], [NAN, NAN], [0.0, 1.0]])
    assert zero_signal_fraction(rewards, group) == 0.75
    assert zero_signal_fraction(rewards, group * 2) == 0.75
    assert zero_signal_fraction(rewards[:0], group[:0]) == 0.0

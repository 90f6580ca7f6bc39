import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms.pruning import keep_largest, keep_largest_overall

advantage = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])


@settings(max_examples=80, deadline=None)
@given(groups=st.lists(st.lists(advantage, min_size=1, max_size=10), max_size=4), percent=st.integers(0, 99))
def test_each_group_keeps_its_largest_with_ties_to_the_earlier(groups, percent):
    flat = torch.tensor([a for g in groups for a in g])
    group = torch.tensor([p for p, g in enumerate(groups) for _ in g], dtype=torch.long)
    expected = []
    for g in groups:
        quota = math.ceil((1 - Fraction(percent, 100)) * len(g))
        kept = sorted(range(len(g)), key=lambda i, g=g: (-abs(g[i]), i))[:quota]
        expected += [i in kept for i in range(len(g))]
    assert keep_largest(flat, group, percent / 100).tolist() == expected


def test_quota_is_exact_where_floats_round():
    assert keep_largest(torch.arange(10.0), torch.zeros(10, dtype=torch.long), 0.7).sum() == 3
    assert keep_largest(torch.arange(100.0), torch.zeros(100, dtype=torch.long), 0.29).sum() == 71


def test_groups_may_be_interleaved():
    advantages, group = torch.tensor([1.0, 5.0, -3.0, 4.0]), torch.tensor([0, 1, 0, 1])
    assert keep_largest(advantages, group, 0.5).tolist() == [False, True, True, False]


@settings(max_examples=80, deadline=None)
@given(advantages=st.lists(advantage, max_size=20), percent=st.integers(0, 99))
def test_overall_keeps_the_largest_of_the_batch_with_ties_to_the_earlier(advantages, percent):
    quota = math.ceil((1 - Fraction(percent, 100)) * len(advantages))
    kept = sorted(range(len(advantages)), key=lambda i: (-abs(advantages[i]), i))[:quota]
    expected = [i in kept for i in range(len(advantages))]
    assert keep_largest_overall(torch.tensor(advantages), percent / 100).tolist() == expected


def test_overall_may_take_a_whole_group_where_within_groups_each_keeps_some():
    advantages, group = torch.tensor([0.1, -0.1, 2.0, -2.0]), torch.tensor([0, 0, 1, 1])
    assert keep_largest_overall(advantages, 0.5).tolist() == [False, False, True, True]
    assert keep_largest(advantages, group, 0.5).tolist() == [True, False, True, False]


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_rates_that_keep_nothing_are_refused(rate):
    with pytest.raises(ValueError, match="rate"):
        keep_largest(torch.ones(2), torch.zeros(2, dtype=torch.long), rate)
    with pytest.raises(ValueError, match="rate"):
        keep_largest_overall(torch.ones(2), rate)

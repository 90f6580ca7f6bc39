import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms.segments import group_mean, group_sum, per_token, segment_sum

lengths_lists = st.lists(st.integers(0, 5), max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths_lists)
def test_segment_sum_is_the_sum_of_slices(lengths):
    values = torch.randn(sum(lengths), dtype=torch.float64)
    pieces = values.split(lengths) if lengths else ()
    expected = torch.tensor([piece.sum() for piece in pieces], dtype=torch.float64)
    torch.testing.assert_close(segment_sum(values, torch.tensor(lengths, dtype=torch.long)), expected)


def test_segment_sum_is_differentiable_with_empty_completions():
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([0, 2, 0, 3, 0])
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, lengths).square(), values)


def test_segment_sum_keeps_the_precision_of_a_late_completion():
    values = torch.cat([torch.full((1000,), 1e6), torch.tensor([1e-3, 2e-3])])
    torch.testing.assert_close(segment_sum(values, torch.tensor([1000, 2]))[1].item(), 3e-3)


def test_segment_sum_refuses_lengths_that_do_not_fit():
    with pytest.raises(RuntimeError):
        segment_sum(torch.zeros(4), torch.tensor([1, 2]))


@settings(max_examples=40, deadline=None)
@given(lengths_lists)
def test_per_token_repeats(lengths):
    values = [float(i) for i in range(len(lengths))]
    expected = [v for v, n in zip(values, lengths, strict=True) for _ in range(n)]
    assert per_token(torch.tensor(values), torch.tensor(lengths, dtype=torch.long)).tolist() == expected


def test_groups_may_be_scattered_and_indices_may_be_missing():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    group = torch.tensor([3, 0, 3, 1])
    assert group_sum(values, group).tolist() == [2.0, 8.0, 0.0, 5.0]
    assert group_mean(values, group).tolist() == [2.0, 8.0, 0.0, 2.5]

"""Sums over completions and groups on flat axes. There is no padding, so nothing is masked.

Legend: N completions, C completion tokens of all N together, P groups.
"""

import torch
from torch import Tensor


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum the flat token axis within each completion.

    Args:
        values: (C,) floating point.
        lengths: (N,) integer, summing to C; 0 is allowed and sums to 0.

    Returns:
        (N,) sums, differentiable in `values`. There are no atomic additions, so the same input always gives the same
        bits, and no running sum over the whole axis, so a long batch costs no precision.

    Raises:
        RuntimeError: the lengths do not sum to C.
    """
    if lengths.numel() == 0:
        return values.reshape(0)
    return torch.segment_reduce(values, "sum", lengths=lengths)


def places_of(lengths: Tensor, which: Tensor) -> Tensor:
    """Places of some completions' tokens on the flat axis, one completion after the other.

    Args:
        lengths: (N,) of all completions.
        which: (n,) the chosen ones.

    Returns:
        (sum of lengths[which],) indices into (C,).
    """
    own = lengths[which]
    within = torch.arange(int(own.sum())) - (own.cumsum(0) - own).repeat_interleave(own)
    return (lengths.cumsum(0) - lengths)[which].repeat_interleave(own) + within


def per_token(values: Tensor, lengths: Tensor) -> Tensor:
    """Repeat each completion's value over its tokens: (N,), (N,) → (C,)."""
    return values.repeat_interleave(lengths)


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """Sum over the members of each group.

    Args:
        values: (N,) floating point.
        group: (N,) integer from 0, in any order; P is the largest + 1, and an index that does not occur sums to 0.

    Returns:
        (P,) sums, the same bits on every run.
    """
    order = group.argsort(stable=True)
    return segment_sum(values[order], torch.bincount(group))


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean over the members of each group: (N,), (N,) → (P,); 0 where an index does not occur."""
    return group_sum(values, group) / torch.bincount(group).clamp(min=1)

"""Which completions are worth an update.

Legend: N completions in ragged groups that share a prompt; G those of one group.
"""

import torch
from torch import Tensor

from agrpo.algorithms.grouping import kept_of
from agrpo.algorithms.segments import per_token


def keep_largest(advantages: Tensor, group: Tensor, rate: float) -> Tensor:
    """Keep the ⌈(1 − p)·G⌉ completions with the largest |A| of each group.

    Args:
        advantages: (N,) normalised on the full group.
        group: (N,) integer from 0, in any order.
        rate: p, the share to drop, in [0, 1).

    Returns:
        (N,) bool. Ties keep the earlier completion; p = 0 keeps all; every group keeps at least one.

    Raises:
        ValueError: rate outside [0, 1).

    Source: CPPO, Lin et al. 2025 (arXiv 2503.22342). The paper selects within the group, as here; its published
    code drops over the whole batch, `keep_largest_overall`.
    """
    largest_first = advantages.abs().argsort(descending=True, stable=True)
    order = largest_first[group[largest_first].argsort(stable=True)]  # (N,) by group, then by |A|
    sizes = torch.bincount(group)  # (P,)
    rank = torch.arange(len(order), device=order.device) - per_token(sizes.cumsum(0) - sizes, sizes)
    quota = torch.tensor([kept_of(size, rate) for size in sizes.tolist()], device=sizes.device)  # (P,)
    keep = torch.empty_like(order, dtype=torch.bool)
    keep[order] = rank < per_token(quota, sizes)
    return keep


def keep_largest_overall(advantages: Tensor, rate: float) -> Tensor:
    """Keep the ⌈(1 − p)·N⌉ completions with the largest |A| of the whole batch: (N,) → (N,) bool.

    A group may lose all of its completions. Ties keep the earlier one. Source: CPPO's published code.
    """
    keep = torch.zeros_like(advantages, dtype=torch.bool)
    keep[advantages.abs().argsort(descending=True, stable=True)[: kept_of(len(advantages), rate)]] = True
    return keep

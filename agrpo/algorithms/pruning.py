"""Which completions are worth an update.

Legend: N completions in ragged groups that share a prompt; G those of one group.
"""

import torch
from torch import Tensor

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
    code drops over the whole batch.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the pruning rate must be in [0, 1), got {rate}")
    largest_first = advantages.abs().argsort(descending=True, stable=True)
    order = largest_first[group[largest_first].argsort(stable=True)]  # (N,) by group, then by |A|
    sizes = torch.bincount(group)  # (P,)
    rank = torch.arange(len(order), device=order.device) - per_token(sizes.cumsum(0) - sizes, sizes)
    # G − ⌊pG⌋ rather than ⌈(1 − p)G⌉: in floats (1 − 0.7)·10 is above 3, and 0.29·100 is below 29.
    quota = sizes - torch.floor(rate * sizes.double() + 1e-9).long()  # (P,)
    keep = torch.empty_like(order, dtype=torch.bool)
    keep[order] = rank < per_token(quota, sizes)
    return keep

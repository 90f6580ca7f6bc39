"""Advantages of sampled completions against the others of their group.

Legend: N completions of the whole batch, over every rank, in P ragged groups that share a prompt.

Every estimator takes the same arguments, so that a caller picks one from `ESTIMATORS` where the config is read:

    rewards   (N,) the completion's reward; NaN where no reward function could score it
    group     (N,) integer index of its prompt, from 0
    delta     keeps the division finite
    std_ddof  0: population standard deviation (ours); 1 reproduces TRL, verl and OpenRLHF
    kappa     prior strength of `weighted_advantages`; the others ignore it

and returns (N,) advantages. An unscored completion is left out of every statistic and has advantage exactly 0, and so
has every completion of a group whose scored rewards are all equal, a group of one included: rounding in the mean never
becomes noise/δ. An infinite reward is refused, because it would silently turn the batch into NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo.algorithms.segments import group_sum


@dataclass(frozen=True)
class _Statistics:
    """What the estimators share. All (N,): a group's values are already repeated over its members."""

    centred: Tensor  # R − μ_x, 0 where unscored
    signal: Tensor  # bool: scored, in a group that has spread
    count: Tensor  # scored completions of the group, G
    variance: Tensor  # σ_x² of the group
    batch_variance: Tensor  # () σ_B² of all centred rewards


def _spread(rewards: Tensor, group: Tensor) -> Tensor:
    """(P,) bool: the group's scored rewards differ. Exact, since no arithmetic is done on them."""
    scored = ~rewards.isnan()
    groups = torch.bincount(group).numel()
    index, values = group[scored], rewards[scored]
    largest = rewards.new_full((groups,), -torch.inf).scatter_reduce(0, index, values, "amax")
    smallest = rewards.new_full((groups,), torch.inf).scatter_reduce(0, index, values, "amin")
    return largest > smallest


def _statistics(rewards: Tensor, group: Tensor, std_ddof: int) -> _Statistics:
    if rewards.isinf().any():
        raise ValueError("a reward is infinite; return None from a reward function that cannot score a completion")
    scored = ~rewards.isnan()
    count = group_sum(scored.to(rewards.dtype), group)  # (P,)
    mean = group_sum(rewards.nan_to_num(nan=0.0), group) / count.clamp(min=1)  # (P,)
    signal = scored & _spread(rewards, group)[group]
    centred = torch.where(signal, rewards - mean[group], 0.0)  # (N,)
    square = centred.square()
    return _Statistics(
        centred=centred,
        signal=signal,
        count=count[group],
        variance=(group_sum(square, group) / (count - std_ddof).clamp(min=1))[group],
        batch_variance=square.sum() / (scored.sum() - std_ddof).clamp(min=1),
    )


def group_advantages(
    rewards: Tensor, group: Tensor, *, delta: float = 1e-4, std_ddof: int = 0, kappa: float = 4.0
) -> Tensor:
    """(R − μ_x)/(σ_x + δ). Source: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2."""
    s = _statistics(rewards, group, std_ddof)
    return s.centred / (s.variance.sqrt() + delta)


def centred_advantages(
    rewards: Tensor, group: Tensor, *, delta: float = 1e-4, std_ddof: int = 0, kappa: float = 4.0
) -> Tensor:
    """R − μ_x: dividing by σ_x favours very easy and very hard prompts.

    Source: Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783).
    """
    return _statistics(rewards, group, std_ddof).centred


def batch_advantages(
    rewards: Tensor, group: Tensor, *, delta: float = 1e-4, std_ddof: int = 0, kappa: float = 4.0
) -> Tensor:
    """(R − μ_x)/(σ_B + δ), σ_B the deviation of the whole batch's centred rewards.

    Groups without spread count in σ_B with their zeros.
    Source: REINFORCE++-baseline, Hu et al. 2025 (arXiv 2501.03262).
    """
    s = _statistics(rewards, group, std_ddof)
    return s.centred / (s.batch_variance.sqrt() + delta)


def weighted_advantages(
    rewards: Tensor, group: Tensor, *, delta: float = 1e-4, std_ddof: int = 0, kappa: float = 4.0
) -> Tensor:
    """(R − μ_x)/√(w·σ_x² + (1 − w)·σ_B² + δ) with w = (G − 1)/(G − 1 + κ).

    A variance estimated from G rewards has G − 1 degrees of freedom; κ says how many the batch's variance is worth
    (empirical-Bayes shrinkage). κ = 0 is `group`, κ = ∞ is `batch`, up to where δ stands. Ragged groups each have
    their own w.

    Source: the name "weighted and global normalisation" is the A-GRPO paper's, the definition is ours.
    """
    s = _statistics(rewards, group, std_ddof)
    freedom = (s.count - 1).clamp(min=1)  # a group of one has advantage 0 whatever its w; 1 avoids 0/0 at κ = 0
    w = freedom / (freedom + kappa)
    return s.centred / (w * s.variance + (1 - w) * s.batch_variance + delta).sqrt()


ESTIMATORS = {
    "group": group_advantages,
    "none": centred_advantages,
    "batch": batch_advantages,
    "weighted": weighted_advantages,
}


def zero_signal_fraction(rewards: Tensor, group: Tensor) -> float:
    """Share of the groups that teach nothing: all rewards equal, one completion, or none scored; 0 of none."""
    present = torch.bincount(group) > 0
    silent = present & ~_spread(rewards, group)
    return silent.sum().item() / max(1, present.sum().item())

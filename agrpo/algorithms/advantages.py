"""Advantages of sampled completions against the others of their group.

Legend: N completions of the whole batch, over every rank, in P ragged groups that share a prompt.

Every estimator of `ESTIMATORS` takes the same arguments, so that a caller picks one where the config is read (the one
that needs each reward by itself, `gdpo_advantages`, and those of single tokens, in `gae`, stand beside them):

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


def spread(rewards: Tensor, group: Tensor) -> Tensor:
    """(P,) bool of (N,) rewards: the group's scored ones differ. Exact, since no arithmetic is done on them."""
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
    signal = scored & spread(rewards, group)[group]
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


def rloo_advantages(
    rewards: Tensor, group: Tensor, *, delta: float = 1e-4, std_ddof: int = 0, kappa: float = 4.0
) -> Tensor:
    """R less the mean of the *other* completions of its group: G/(G − 1)·(R − μ_x). A group of one gives 0.

    The baseline does not depend on the completion, so the gradient is unbiased.
    Source: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740), eq. 8.
    """
    s = _statistics(rewards, group, std_ddof)
    return s.centred * s.count / (s.count - 1).clamp(min=1)


# Noise of the reward's measurement, drift from one sample to the next, and how vague the prior N(0, P₀) is: KRPO's.
_MEASUREMENT, _DRIFT, _PRIOR = 1e-2, 1e-5, 1.0


def kalman_advantages(
    rewards: Tensor, group: Tensor, *, delta: float = 1e-4, std_ddof: int = 0, kappa: float = 4.0
) -> Tensor:
    """(R − x̂)/(√P + δ): the group's rewards are noisy measurements of one baseline, x̂ and P its posterior.

    With prior N(0, P₀) and G measurements of variance V, 1/P = 1/P₀ + G/V and x̂ = P·ΣR/V. This is KRPO's filter run
    to its end without drift, so the order of the samples does not matter.

    Source: KRPO, Wang et al. 2025 (arXiv 2505.07527), with its V = 0.01 and P₀ = 1; the order-free form is ours.
    """
    s = _statistics(rewards, group, std_ddof)
    posterior = 1 / (1 / _PRIOR + s.count / _MEASUREMENT)  # (N,) P
    # R − x̂ = (R − μ) + (μ − x̂), and x̂ = P·G/V·μ
    mean = group_sum(rewards.nan_to_num(nan=0.0), group)[group] / s.count.clamp(min=1)
    off = mean * (1 - posterior * s.count / _MEASUREMENT)
    return torch.where(s.signal, s.centred + off, 0.0) / (posterior.sqrt() + delta)


def kalman_recursive_advantages(
    rewards: Tensor, group: Tensor, *, delta: float = 1e-4, std_ddof: int = 0, kappa: float = 4.0
) -> Tensor:
    """KRPO as published: each R against the filter's state just after it was measured.

    P⁻ = P + Q, K = P⁻/(P⁻ + V), x += K·(R − x), P = (1 − K)·P⁻, from x = 0 and P = P₀, over the group's completions in
    the order in which they stand. The advantages depend on that order: permuting a group changes them.

    Source: KRPO, Wang et al. 2025 (arXiv 2505.07527), and its published code, with Q = 1e-5, V = 0.01, P₀ = 1.
    """
    s = _statistics(rewards, group, std_ddof)
    advantages = torch.zeros_like(rewards)
    for members in torch.unique(group).tolist():
        state, variance = 0.0, _PRIOR
        for n in ((group == members) & s.signal).nonzero()[:, 0].tolist():
            predicted = variance + _DRIFT
            gain = predicted / (predicted + _MEASUREMENT)
            state += gain * (float(rewards[n]) - state)
            variance = (1 - gain) * predicted
            advantages[n] = (float(rewards[n]) - state) / (variance**0.5 + delta)
    return advantages


def gdpo_advantages(
    scores: Tensor, weights: Tensor, group: Tensor, *, delta: float = 1e-4, std_ddof: int = 0
) -> Tensor:
    """Each reward function normalised within its groups, then weighted and summed, then normalised over the batch.

    Summing rewards first lets different combinations collapse into one advantage; this keeps them apart.

    Args:
        scores: (N, K) of the reward functions, NaN where one abstained.
        weights: (K,) of the functions.
        group: (N,) index of its prompt.

    Returns:
        (N,) advantages (Σ_k c_k·A_k − mean)/(σ + δ), A_k the `group` advantage of function k. An abstained score adds
        nothing; a completion without any score is left out of mean and σ. Exactly 0 where no function that scored the
        completion tells its group apart.

    Source: GDPO, Liu et al. 2026 (arXiv 2601.05242), section 3.1.
    """
    statistics = [_statistics(column, group, std_ddof) for column in scores.unbind(1)]
    normalised = torch.stack([s.centred / (s.variance.sqrt() + delta) for s in statistics], 1)  # (N, K)
    total = normalised @ weights.to(normalised)  # (N,)
    signal = torch.stack([s.signal for s in statistics]).any(0)  # (N,)
    scored = ~scores.isnan().all(1)
    count = scored.sum()
    mean = total[scored].sum() / count.clamp(min=1)
    deviation = ((total - mean)[scored].square().sum() / (count - std_ddof).clamp(min=1)).sqrt()
    return torch.where(signal, total - mean, 0.0) / (deviation + delta)


ESTIMATORS = {
    "group": group_advantages,
    "none": centred_advantages,
    "batch": batch_advantages,
    "weighted": weighted_advantages,
    "rloo": rloo_advantages,
    "kalman": kalman_advantages,
    "kalman_recursive": kalman_recursive_advantages,
}


def zero_signal_fraction(rewards: Tensor, group: Tensor) -> float:
    """Share of the groups that teach nothing: all rewards equal, one completion, or none scored; 0 of none."""
    present = torch.bincount(group) > 0
    silent = present & ~spread(rewards, group)
    return silent.sum().item() / max(1, present.sum().item())

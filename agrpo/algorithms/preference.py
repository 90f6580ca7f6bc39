"""Preferences within a group: pairs, how sure they are, and the loss that learns from them.

Legend: N completions in ragged groups that share a prompt, C completion tokens of all N together, M ordered pairs.
Losses are sums over pairs; the caller divides by the global Σw, so shards add up to the whole.

Source: confidence weighting, hierarchical preferences and the uncertainty are the thesis's (2.4); what it leaves open
is defined here and marked ours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from agrpo.algorithms.segments import per_token, segment_sum

SCHEMES = ("confidence", "uniform", "hierarchical")


@dataclass(frozen=True)
class Pairs:
    """M ordered pairs of completions that answer the same prompt."""

    better: Tensor  # (M,) index into completions
    worse: Tensor  # (M,) index into completions
    gap: Tensor  # (M,) level of the better − level of the worse, positive


def ordered_pairs(levels: Tensor, group: Tensor) -> Pairs:
    """All pairs within a group whose levels differ.

    Args:
        levels: (N,) higher is better: annotated levels, or rewards. NaN makes no pair, and neither does a tie.
        group: (N,) integer from 0, in any order.

    Returns:
        Pairs ordered by group, then by the better one's position. Memory is Σ G², never N².
    """
    order = group.argsort(stable=True)  # (N,) members of a group next to each other
    sizes = torch.bincount(group)  # (P,)
    size = sizes[group[order]]  # (N,) of each member's group
    start = (sizes.cumsum(0) - sizes)[group[order]]  # (N,) where that group begins
    first = torch.arange(len(order), device=order.device).repeat_interleave(size)  # (Σ G²,)
    begins = per_token(size.cumsum(0) - size, size)  # (Σ G²,)
    second = per_token(start, size) + torch.arange(len(first), device=order.device) - begins  # (Σ G²,)
    better, worse = order[first], order[second]
    kept = levels[better] > levels[worse]
    better, worse = better[kept], worse[kept]
    return Pairs(better, worse, levels[better] - levels[worse])


# Confidence w = |2p − 1| of a pair, p the probability that its better one truly is: 0 is a coin toss, 1 is certain.
# All are (M,) or broadcast to it, lie in [0, 1] and carry no gradient.


def confidence_from_margin(margin: Tensor, scale: float | Tensor) -> Tensor:
    """|2p − 1| with p = σ(margin/scale): the annotators' score difference, in units of `scale` > 0 (Bradley–Terry)."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return torch.tanh(margin.detach().abs() / (2 * scale))  # |2σ(z) − 1| = tanh(|z|/2), without cancellation near 0


def confidence_from_rewards(better: Tensor, worse: Tensor, scale: float | Tensor) -> Tensor:
    """|2p − 1| with p = σ((R_i − R_j)/τ), τ = `scale` the running scale of the rewards."""
    return confidence_from_margin(better - worse, scale)


def confidence_from_ensemble(mean_i: Tensor, mean_j: Tensor, std_i: Tensor, std_j: Tensor) -> Tensor:
    """|2p − 1| with p = Φ((μ_i − μ_j)/√(σ_i² + σ_j²)), from a reward-model ensemble's means and deviations.

    Equal means give 0, and different means without deviation give 1.
    """
    difference = (mean_i - mean_j).detach()
    z = difference.abs() / torch.hypot(std_i, std_j).detach()
    return torch.where(difference == 0, 0.0, torch.erf(z / math.sqrt(2)))  # |2Φ(z) − 1| = erf(|z|/√2)


def stratum_totals(pairs: Pairs, confidence: Tensor) -> dict[float, float]:
    """Σ of confidence over the pairs of each level gap. Shards' totals add up key by key."""
    gaps, index = torch.unique(pairs.gap, return_inverse=True)  # (S,), (M,)
    totals = confidence.new_zeros(len(gaps)).index_add(0, index, confidence)
    return dict(zip(gaps.tolist(), totals.tolist(), strict=True))


def pair_weights(
    pairs: Pairs, confidence: Tensor, scheme: str, *, totals: Mapping[float, float] | None = None
) -> Tensor:
    """Weights of the pairs, not normalised: the loss is Σ w·(pair loss) / Σ w, both sums over every shard.

    Args:
        confidence: (M,) in [0, 1].
        scheme: `confidence`: w = c. `uniform`: w = 1. `hierarchical`: pairs are stratified by level gap, and w = c/Σc
            of the pair's stratum. Each stratum then weighs 1 in all, Σw is the number of strata, and the loss is the
            mean over strata of their weighted means: the many easy coarse pairs do not drown the few fine ones.
        totals: for `hierarchical`, `stratum_totals` added over all shards; None when these pairs are all there are.

    Returns:
        (M,) weights ≥ 0, without gradient. A stratum without any confidence weighs 0.

    Raises:
        ValueError: unknown scheme.

    With a continuous level (rewards) nearly every gap is its own stratum, and `hierarchical` becomes `uniform`.
    Source: hierarchical preferences, thesis; the strata and their equal weight are ours.
    """
    confidence = confidence.detach()
    if scheme == "confidence":
        return confidence
    if scheme == "uniform":
        return torch.ones_like(confidence)
    if scheme != "hierarchical":
        raise ValueError(f"pair_weighting must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    totals = stratum_totals(pairs, confidence) if totals is None else totals
    gaps, index = torch.unique(pairs.gap, return_inverse=True)  # (S,), (M,)
    total = confidence.new_tensor([totals[gap] for gap in gaps.tolist()])[index]  # (M,)
    return torch.where(total > 0, confidence / total, 0.0)


def implicit_reward(logp: Tensor, ref_logp: Tensor, lengths: Tensor, *, alpha: float, reduction: str) -> Tensor:
    """The reward that a policy implies, s(y) = α·[log π(y|x) − log π_ref(y|x)].

    Args:
        logp, ref_logp: (C,) nats.
        lengths: (N,) tokens.
        alpha: DPO's β.
        reduction: `sum` over the tokens (DPO), or their `mean`, which takes the length out of the comparison.

    Returns:
        (N,) scores, with gradient through `logp`. An empty completion scores 0.

    Raises:
        ValueError: unknown reduction.

    Source: DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 5, without the term of x alone, which cancels in a pair.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"implicit_reward must be sum or mean, got {reduction!r}")
    score = alpha * segment_sum(logp - ref_logp, lengths)  # (N,)
    return score / lengths.clamp(min=1) if reduction == "mean" else score


def _logistic(lead: Tensor, flipped: Tensor | float, alpha: float) -> Tensor:
    return F.softplus(-lead) + flipped * lead  # (1 − ε)·softplus(−z) + ε·softplus(z)


def _squared(lead: Tensor, flipped: Tensor | float, alpha: float) -> Tensor:
    return (lead - 0.5).square() / alpha**2


def _robust(lead: Tensor, flipped: Tensor | float, alpha: float) -> Tensor:
    return F.softplus(-lead) - flipped / (1 - 2 * flipped) * lead


# shape → ℓ(z, ε, α) of a pair with lead z: ε the probability that its label is flipped, α the scores' scale
_SHAPES = {"logistic": _logistic, "ipo": _squared, "robust": _robust}


def group_preference_loss(
    scores: Tensor,
    pairs: Pairs,
    weights: Tensor,
    *,
    margin: float | Tensor = 0.0,
    shape: str = "logistic",
    flipped: Tensor | float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Σ w·ℓ over the pairs; the caller divides by the global Σw.

    Args:
        scores: (N,) implicit rewards, or a score head's output.
        weights: (M,) from `pair_weights`.
        margin: float or (M,), by how much the better one must lead: z = s_i − s_j − margin.
        shape: of ℓ. With ε = `flipped`,
            `logistic`  −(1 − ε)·log σ(z) − ε·log σ(−z), whose minimum is z = logit(1 − ε); at ε = 0, z → ∞. A constant
                        ε is conservative DPO, an ε of each pair's own is a soft label.
            `ipo`       (z − ½)²/α²: with the mean log-ratio times α as score, IPO with τ = α. ε has no part in it.
            `robust`    [−(1 − ε)·log σ(z) + ε·log σ(−z)]/(1 − 2ε): unbiased for the loss on clean labels, and for a
                        single pair without a minimum.
        flipped: ε in [0, ½), of all pairs or (M,) of each: the probability that the worse one truly is the better.
        alpha: the scores' scale, for `ipo` alone.

    Returns:
        0-d sum, exactly 0 and differentiable where there are no pairs.

    Raises:
        ValueError: unknown shape.

    Source: Bradley–Terry over the ordered pairs of a group (thesis 2.4); with one pair and w = 1, DPO, eq. 7. cDPO,
    Mitchell 2023; IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17; robust DPO, Chowdhury et al. 2024 (arXiv
    2403.00409), eq. 12. That all of them run over the weighted pairs of ranked groups is ours.
    """
    if shape not in _SHAPES:
        raise ValueError(f"the preference loss must be one of {', '.join(_SHAPES)}, got {shape!r}")
    lead = scores[pairs.better] - scores[pairs.worse] - margin  # (M,)
    return (weights * _SHAPES[shape](lead, flipped, alpha)).sum()


def preference_uncertainty(scores: Tensor, pairs: Pairs) -> tuple[Tensor, int]:
    """How little the model can tell the pairs apart: Σ h(σ(s_i − s_j))/ln 2 and the number of pairs.

    h is the binary entropy, so a pair counts 1 where the model cannot tell and 0 where it is sure. The mean over all
    shards is the thesis's U_t, which the λ controller observes. Detached.
    """
    lead = (scores[pairs.better] - scores[pairs.worse]).detach().abs()  # (M,)
    entropy = F.softplus(-lead) + lead * torch.sigmoid(-lead)  # h(σ(z)), even in z; both terms positive
    return entropy.sum() / math.log(2), lead.numel()


def flip_probability(confidence: Tensor) -> Tensor:
    """ε = (1 − c)/2 of a pair with confidence c = |2p − 1|: the probability that its label is the wrong way round."""
    return (1 - confidence.detach()) / 2


def label_entropy(flipped: Tensor) -> Tensor:
    """Σ h(ε)/ln 2 of the pairs' own labels: (M,) → 0-d, in bits.

    The uncertainty of a perfect model of soft labels stays at their mean, so the λ controller's target must exceed it.
    """
    bits: Tensor = (torch.special.entr(flipped) + torch.special.entr(1 - flipped)) / math.log(2)  # (M,)
    return bits.sum()

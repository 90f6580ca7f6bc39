"""The policy objective: clipped surrogate, divergence from the reference, entropy.

Legend: N completions, C completion tokens of all N together; log-probabilities in nats. Everything is a sum over the
tokens at hand; the denominators are global and arrive as `weights`, so the shards' losses add up to the objective.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo.algorithms.divergences import estimate, surrogate
from agrpo.algorithms.segments import per_token, segment_sum

LEVELS = ("token", "sequence", "trajectory")
AGGREGATIONS = ("token", "sequence", "constant")
CORRECTIONS = ("token", "sequence", "mask")

# e^20 lies beyond every clip range; without a ceiling a trajectory's ratio overflows and 0·∞ puts NaN in the gradient.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyTerms:
    """Detached 0-d parts of a shard's loss. Each is a sum over its tokens: add shards, then divide by `tokens`."""

    policy: Tensor  # Σ weights·clipped loss: adds up to the objective's policy term, not to be divided
    kl: Tensor  # reported divergence of the chosen kind, nats
    symmetric_kl: Tensor  # ½[KL(π‖π_ref) + KL(π_ref‖π)], nats, whatever the kind: what the β controller observes
    update_kl: Tensor  # KL(π_old‖π), nats: what the ε controller observes
    entropy: Tensor  # nats
    clipped_low: Tensor  # tokens held by 1 − ε_low
    clipped_high: Tensor  # tokens held by 1 + ε_high
    clipped: Tensor  # tokens held by either
    tokens: Tensor  # C


def importance_ratio(logp: Tensor, old_logp: Tensor, lengths: Tensor, level: str) -> Tensor:
    """Ratio of the policy to the one that sampled.

    Args:
        logp, old_logp: (C,) nats.
        lengths: (N,) tokens.
        level: `token`: π/π_old of the token. `sequence`: the geometric mean of those over the completion. `trajectory`:
            their product.

    Returns:
        (C,) ratios, constant within a completion except at token level. The gradient of every level is ρ·∇log π of the
        token itself (GSPO-token's stop-gradient form). Summed over a completion with constant weight and advantage,
        that is exactly the gradient of |y|·(sequence ratio) and of the trajectory ratio. So all levels have the same
        gradient at ρ = 1 and share one scale of the learning rate.

    Raises:
        ValueError: unknown level.

    Source: token, PPO (arXiv 1707.06347); sequence, GSPO (arXiv 2507.18071), section 4.3; trajectory, TIC-GRPO (arXiv
    2508.02833). That the trajectory's gradient is written per token is ours, and so is the ceiling of e^20.
    """
    difference = (logp - old_logp).detach()  # (C,)
    if level == "token":
        log_ratio = difference
    elif level == "sequence":
        log_ratio = per_token(segment_sum(difference, lengths) / lengths.clamp(min=1), lengths)
    elif level == "trajectory":
        log_ratio = per_token(segment_sum(difference, lengths), lengths)
    else:
        raise ValueError(f"ratio must be one of {', '.join(LEVELS)}, got {level!r}")
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() * (logp - logp.detach()).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, dual_clip: float | None = None
) -> Tensor:
    """The loss −min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high)·A) of each token.

    Args:
        ratio, advantages: (C,).
        dual_clip: c > 1 bounds the loss of a token with A < 0 by c·|A|, however far its ratio has grown; None does not.

    Returns:
        (C,). The gradient is 0 where the clip holds.

    Raises:
        ValueError: dual_clip is not above 1.

    Source: PPO, eq. 7; separate ends, DAPO (arXiv 2503.14476); dual clip, Ye et al. 2020 (arXiv 1912.09729).
    """
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)  # (C,)
    if dual_clip is not None:
        if dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}; below, it would clip the unchanged policy")
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def clip_fractions(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> dict[str, Tensor]:
    """How many tokens the clip holds: (C,), (C,) → 0-d counts, to be added over shards and divided by the tokens.

    `low`: ratio below 1 − ε_low and A < 0. `high`: ratio above 1 + ε_high and A > 0. `region`: either.
    """
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return {"low": low.sum(), "high": high.sum(), "region": (low | high).sum()}


def token_weights(
    lengths: Tensor, aggregation: str, *, total_tokens: int, total_sequences: int, max_length: int
) -> Tensor:
    """Weights with which Σ weights·(per-token loss), over all shards of an optimiser step, is the objective.

    Args:
        lengths: (N,) tokens of the shard's completions.
        aggregation: `token`: one mean over all tokens. `sequence`: the mean of each completion, then over completions;
            a token of a short one weighs more. `constant`: sum over tokens by a constant length, free of length bias.
        total_tokens, total_sequences: of the whole optimiser step, over every rank and micro-batch.
        max_length: the generation limit, used by `constant`.

    Returns:
        (C,) float32 weights, which sum to 1 over all shards for `token`, and for `sequence` if no completion is empty.

    Raises:
        ValueError: unknown aggregation.

    Source: token, DAPO, eq. 8; sequence, GRPO, eq. 3; constant, Dr. GRPO.
    """
    if aggregation == "token":
        weights = torch.full(lengths.shape, 1 / total_tokens, device=lengths.device)
    elif aggregation == "sequence":
        weights = 1 / (total_sequences * lengths.clamp(min=1).float())
    elif aggregation == "constant":
        weights = torch.full(lengths.shape, 1 / (total_sequences * max_length), device=lengths.device)
    else:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    return per_token(weights, lengths)


def sampler_weights(
    old_logp: Tensor, sampler_logp: Tensor, lengths: Tensor, correction: str, cap: float
) -> tuple[Tensor, Tensor]:
    """Weights that make samples of another program's forward count as the policy's own: m = π_old/π_sampler.

    Args:
        old_logp: (C,) nats, of the training forward with the weights that sampled.
        sampler_logp: (C,) nats, as the sampler computed them.
        lengths: (N,) tokens.
        correction: `token`: min(m, cap) of the token. `sequence`: the product of the completion's m, at most cap.
            `mask`: m of the token where 1/cap ≤ m ≤ cap, else 0.
        cap: above 1; inf never holds, and the weights are then exact: of a token's expectation given what stands before
            it (`token`, `mask`), of the whole completion's (`sequence`).

    Returns:
        (C,) weights without gradient, 1 where the two agree; (C,) bool, where the cap held.

    Raises:
        ValueError: unknown correction, or a cap of 1 or less.

    Source: truncation, Ionides 2008; for samplers of a policy, Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"; masking of both tails, IcePop (arXiv 2510.18855).
    """
    if cap <= 1:
        raise ValueError(f"cap must be above 1, the weight where sampler and policy agree, got {cap}")
    log_m = (old_logp - sampler_logp).detach()  # (C,)
    if correction == "sequence":
        log_m = per_token(segment_sum(log_m, lengths), lengths)
    elif correction not in CORRECTIONS:
        raise ValueError(f"correction must be one of {', '.join(CORRECTIONS)}, got {correction!r}")
    limit = math.log(cap)
    if correction == "mask":
        held = log_m.abs() > limit
        return log_m.exp().masked_fill(held, 0.0), held
    return log_m.clamp(max=limit).exp(), log_m > limit


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    weights: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    entropy_coef: float,
    kl: str,
    ratio: str,
    dual_clip: float | None = None,
) -> tuple[Tensor, PolicyTerms]:
    """Σ weights·[−min(ρA, clip(ρ)A) + β·D − η·H] over the tokens of a shard.

    Args:
        logp: (C,) nats, of the policy, with gradient.
        old_logp: (C,) nats, of the policy that sampled; `logp.detach()` when that is the same.
        ref_logp: (C,) nats, of the reference; `logp.detach()` where there is none, which reports a divergence of 0.
        entropy: (C,) nats, of the policy's next-token distribution, with gradient.
        advantages: (C,), the same at every token of a completion unless each token has its own.
        lengths: (N,) tokens.
        weights: (C,) from `token_weights`.
        epsilon_low, epsilon_high: clip range.
        beta: coefficient of the divergence; entropy_coef: η.
        kl: kind of divergence (`divergences`).
        ratio: level of the importance ratio. The divergence is always weighted by the token's own.
        dual_clip: see `clipped_surrogate`.

    Returns:
        The 0-d loss, and its parts. All advantages 0 and β = η = 0 give a loss and gradient of exactly 0.

    Source: GRPO's objective (arXiv 2402.03300, eq. 3) with the A-GRPO paper's symmetric divergence and entropy bonus.
    """
    rho = importance_ratio(logp, old_logp, lengths, ratio)  # (C,)
    token_rho = importance_ratio(logp, old_logp, lengths, "token").detach()  # (C,)
    log_ratio = logp - ref_logp  # (C,)

    policy = (weights * clipped_surrogate(rho, advantages, epsilon_low, epsilon_high, dual_clip)).sum()
    penalty = (weights * surrogate(kl)(log_ratio, token_rho)).sum()
    bonus = (weights * entropy).sum()
    loss = policy + beta * penalty - entropy_coef * bonus

    with torch.no_grad():
        clipped = clip_fractions(rho, advantages, epsilon_low, epsilon_high)
        terms = PolicyTerms(
            policy=policy.detach(),
            kl=(token_rho * estimate(kl)(log_ratio)).sum(),
            symmetric_kl=(token_rho * estimate("symmetric")(log_ratio)).sum(),
            update_kl=estimate("reverse")(old_logp - logp).sum(),
            entropy=entropy.detach().sum(),
            clipped_low=clipped["low"],
            clipped_high=clipped["high"],
            clipped=clipped["region"],
            tokens=lengths.sum(),
        )
    return loss, terms

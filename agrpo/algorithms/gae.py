"""Advantages of single tokens: rewards that fall due along a completion, returns, and generalised advantage estimation.

Legend: N completions, C completion tokens of all N together. A completion's end is the end of its episode, cut by the
length limit or not; nothing runs from one completion into the next.
"""

import torch
from torch import Tensor


def token_rewards(rewards: Tensor, penalty: Tensor, lengths: Tensor) -> Tensor:
    """The reward of each token: −penalty, and the completion's own reward on its last token.

    Args:
        rewards: (N,); NaN where no reward function could score: no reward falls due, and the caller leaves the
            completion's tokens out of what is learned.
        penalty: (C,), β·(log π_old − log π_ref) for a divergence kept in the reward, or 0.
        lengths: (N,) tokens, each at least 1.

    Returns:
        (C,). Source: InstructGPT, Ouyang et al. 2022, eq. 2, spread over the tokens as its successors do.
    """
    due = -penalty
    return due.index_add(0, lengths.cumsum(0) - 1, rewards.nan_to_num(nan=0.0).to(due))


def discounted_sum(values: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """S_t = v_t + discount·S_{t+1} within each completion, S = 0 behind its end: (C,), (N,) → (C,)."""
    end = lengths.cumsum(0) - 1  # (N,) place of each completion's last token
    longest_first = lengths.argsort(descending=True, stable=True)
    end, sorted_lengths = end[longest_first], lengths[longest_first]
    # How many completions have a token so many places before their end: a prefix of the sorted ones.
    alive = torch.bincount(sorted_lengths, minlength=1).flip(0).cumsum(0).flip(0)[1:].tolist()
    sums = torch.empty_like(values)
    behind = values.new_zeros(len(lengths))
    for back, count in enumerate(alive):
        place = end[:count] - back
        behind = values[place] + discount * behind[:count]
        sums[place] = behind
    return sums


def generalised_advantages(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} − V_t, V = 0 behind a completion's end.

    Args:
        rewards: (C,) from `token_rewards`.
        values: (C,) V of the state before each token; with zeros, λ = 1 gives the discounted return.
        lengths: (N,).
        gamma: γ in [0, 1]; lam: λ in [0, 1]. λ = 1 is the return less the value, λ = 0 the one-step error.

    Returns:
        (C,) advantages; `advantages + values` is what the value function regresses on (TD(λ)).

    Source: GAE, Schulman et al. 2016 (arXiv 1506.02438), eq. 16.
    """
    ahead = torch.cat([values[1:], values.new_zeros(min(1, len(values)))])
    last = lengths[lengths > 0].cumsum(0) - 1
    ahead = ahead.index_fill(0, last, 0.0)
    return discounted_sum(rewards + gamma * ahead - values, lengths, gamma * lam)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """½·max((V − R)², (clip(V, V_old ± c) − R)²) of each token: (C,), (C,), (C,) → (C,).

    The larger of the two never rewards moving V further than c from where it was. None: the plain ½(V − R)².
    Source: OpenAI baselines' PPO; the papers do not have it.
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(plain, (near - returns).square()) / 2

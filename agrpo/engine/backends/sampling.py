"""Random streams and token draws that depend on nothing but (seed, step, prompt, sample)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(key: tuple[int, int], streams: Sequence[tuple[int, int]], count: int) -> Tensor:
    """The first `count` uniform numbers of each stream: (len(streams), count) float64 in [0, 1).

    Counter-based (Philox): a stream is keyed by (seed, step) and its own (prompt slot, sample), so a completion's
    randomness depends neither on what else is in its batch nor on the number of processes. Each fits in 32 bits.
    """
    first = (key[0] << 32) | key[1]
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([first, (slot << 32) | sample], dtype=np.uint64))).random(
            count
        )
        for slot, sample in streams
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count, dtype=torch.float64)


def draw(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One token for each row by inverse transform of its distribution.

    Args:
        logits: (B, V).
        uniform: (B,) in [0, 1); None draws the most likely token.
        temperature: of the distribution.
        top_k, top_p, min_p: of `keep_likely`.

    Returns:
        (B,) tokens, and (B,) their log-probabilities at the temperature before any filter, nats.
    """
    z = logits.float() / temperature
    norm = z.logsumexp(1)  # (B,)
    if uniform is None:
        token = logits.argmax(1)
    else:
        probability = keep_likely((z - norm[:, None]).exp(), top_k, top_p, min_p)
        cumulative = probability.cumsum(1)
        point = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
        # Rounding may put the point on the total itself: then the last token with probability is meant.
        empty = probability.gather(1, token[:, None])[:, 0] == 0
        if bool(empty.any()):
            token = torch.where(
                empty, (probability > 0).long().mul(torch.arange(1, z.shape[1] + 1, device=z.device)).argmax(1), token
            )
    return token, z.gather(1, token[:, None])[:, 0] - norm


def keep_likely(probability: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Zero the unlikely tokens, filter by filter in the order of transformers: top_k, top_p, min_p.

    Args:
        probability: (B, V), rows sum to 1.
        top_k: keep so many tokens; 0 keeps all.
        top_p: keep the smallest set of tokens that holds this share of what top_k left; 1 keeps all.
        min_p: keep tokens at least this share as likely as the likeliest; 0 keeps all.

    Returns:
        (B, V), not normalised again. Each filter is a threshold, so equal probabilities stay or go together: what a
        row keeps never hangs on how a sort orders ties.
    """
    vocabulary = probability.shape[1]
    if 0 < top_k < vocabulary:
        ordered = probability.topk(top_k).values  # (B, top_k)
        probability = probability.masked_fill(probability < ordered[:, -1:], 0.0)
    if top_p < 1:
        if not 0 < top_k < vocabulary:
            ordered = probability.sort(1, descending=True).values  # (B, V)
        before = ordered.cumsum(1) - ordered  # what stands before a token
        kept = (before < top_p * probability.sum(1, keepdim=True)).sum(1, keepdim=True).clamp_(min=1)
        probability = probability.masked_fill(probability < ordered.gather(1, kept - 1), 0.0)
    if min_p > 0:
        probability = probability.masked_fill(probability < min_p * probability.amax(1, keepdim=True), 0.0)
    return probability

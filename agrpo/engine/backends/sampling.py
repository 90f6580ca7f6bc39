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


def draw(logits: Tensor, uniform: Tensor | None, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token for each row by inverse transform of its distribution.

    Args:
        logits: (B, V).
        uniform: (B,) in [0, 1); None draws the most likely token.
        temperature: of the distribution.
        top_p: keep the smallest set of tokens that holds this much probability; 1 keeps all.

    Returns:
        (B,) tokens, and (B,) their log-probabilities at the temperature before top_p, nats.
    """
    z = logits.float() / temperature
    norm = z.logsumexp(1)  # (B,)
    if uniform is None:
        token = logits.argmax(1)
    else:
        probability = (z - norm[:, None]).exp()
        if top_p < 1:
            ordered, order = probability.sort(1, descending=True)
            beyond = ordered.cumsum(1) - ordered >= top_p  # what stands before a token already holds top_p
            probability = probability.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), 0.0)
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

"""Random streams and token draws that depend on nothing but (seed, step, prompt, sample)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256  # tokens that are summed up together before one is drawn
_SLICE_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 26}  # of the rows that are read together; 1 MiB in float32


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
    if uniform is not None and top_k == 0 and top_p == 1 and min_p == 0 and logits.shape[1] >= _BLOCK:
        return _draw_by_blocks(logits, uniform, temperature)
    z = logits.float() if temperature == 1 else logits.float() / temperature
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


def _draw_by_blocks(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same draw from the whole distribution: first the block of tokens, then the token in it.

    Sums over blocks in place of a cumulative sum over the vocabulary, in float64 where they are summed up; some rows at
    a time, since on a CPU fresh memory for all of them would cost more than what is computed in it.
    """
    vocabulary = logits.shape[1]
    most = logits.amax(1, keepdim=True).float()
    size = max(1, _SLICE_LOGITS.get(logits.device.type, 1 << 26) // vocabulary)
    sums = torch.cat(
        [_sums(part, top, temperature) for part, top in zip(logits.split(size), most.split(size), strict=True)]
    ).cumsum(1)  # (B, blocks) float64
    total = sums[:, -1:]
    point = uniform.to(logits.device, torch.float64)[:, None] * total
    block = torch.searchsorted(sums, point, right=True).clamp_(max=sums.shape[1] - 1)  # (B, 1)
    point = point - torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    member = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)  # (B, block)
    inside = _unnormalised(logits.gather(1, member.clamp(max=vocabulary - 1)), most, temperature)
    inside = inside.masked_fill_(member >= vocabulary, 0.0)
    within = inside.double().cumsum(1)
    place = torch.searchsorted(within, point, right=True)  # (B, 1); the size of the block where rounding went past it
    last = (inside > 0).long().mul(torch.arange(1, _BLOCK + 1, device=logits.device)).argmax(1, keepdim=True)
    token = block * _BLOCK + torch.minimum(place, last)  # (B, 1)
    return token[:, 0], ((logits.gather(1, token) - most) / temperature)[:, 0] - total[:, 0].log().float()


def _unnormalised(logits: Tensor, most: Tensor, temperature: float) -> Tensor:
    """e^((z − m) / T), float32."""
    z = logits - most
    return z.exp_() if temperature == 1 else z.div_(temperature).exp_()


def _sums(logits: Tensor, most: Tensor, temperature: float) -> Tensor:
    """(b, V) logits → (b, blocks) float64 sums over each block of tokens."""
    e = _unnormalised(logits, most, temperature)
    whole = e.shape[1] // _BLOCK * _BLOCK
    sums = e[:, :whole].unflatten(1, (-1, _BLOCK)).sum(2)
    rest = e[:, whole:].sum(1, keepdim=True)
    return (torch.cat([sums, rest], 1) if whole < e.shape[1] else sums).double()


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

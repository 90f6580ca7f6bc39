"""Log-probability and exact entropy from hidden states, the (C, V) logits never held at once.

The vocabulary is cut, not the tokens: a slice of it meets all tokens at hand in one product, its logits stay in the
cache for every pass over them, and its part of the head's gradient is complete when the slice is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_TOKENS = 4096  # at most so many at a time: bounds the slices from below
_SLICE_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits of one slice; 4 MiB in float32 stay in a core's cache


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden·weightᵀ / temperature) at the targets, and the entropy of each distribution.

    Args:
        hidden: (C, H) states that predict the targets.
        weight: (V, H) the language-model head.
        targets: (C,) token ids.
        temperature: sampling temperature.

    Returns:
        (C,) log-probabilities and (C,) entropies, nats, float32; both differentiable in hidden and weight. The backward
        pass computes each slice's logits again. With no targets, two empty tensors.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, 1.0 / temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        logp, entropy, norm = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(3))
        for part in _tokens(len(targets)):
            logp[part], entropy[part], norm[part] = _statistics(hidden[part], weight, targets[part], scale)
        ctx.save_for_backward(hidden, weight, targets, norm, entropy)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(
        ctx: Any, of_logp: Tensor | None, of_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, norm, entropy = ctx.saved_tensors
        if of_logp is None:
            of_logp = torch.zeros_like(norm)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        parts = _tokens(len(targets))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32 if len(parts) > 1 else weight.dtype)
        for part in parts:
            h, y = hidden[part], targets[part]
            factor = (of_logp[part, None] * -ctx.scale).float()  # ∂logp/∂z = onehot − p, times the scale
            scaled = (h * factor).to(h.dtype)  # (c, H) so that p itself is the matrix of both products
            own = None if grad_hidden is None else grad_hidden[part]
            for rows in _slices(len(y), weight):
                w = weight[rows]
                log_p = _logits(h, w, ctx.scale).sub_(norm[part, None])
                if of_entropy is None:
                    p = log_p.exp_()
                    _minus_one_at(p, y, rows)
                    p = p.to(h.dtype)
                    if own is not None:
                        own.add_(p @ w)
                    if grad_weight is not None:
                        _add(grad_weight, rows, p.t() @ scaled, first=len(parts) == 1)
                    continue
                grad = log_p.exp()
                log_p.add_(entropy[part, None]).mul_(of_entropy[part, None] * -ctx.scale)
                log_p.mul_(grad)  # ∂H/∂z = −p·(log p + H)
                _minus_one_at(grad, y, rows)
                grad = grad.mul_(factor).add_(log_p).to(h.dtype)
                if own is not None:
                    own.add_(grad @ w)
                if grad_weight is not None:
                    _add(grad_weight, rows, grad.t() @ h, first=len(parts) == 1)
            if own is not None and of_entropy is None:
                own.mul_(factor)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


def _statistics(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(c,) log-probabilities, entropies and log-normalisers, by a running maximum over the vocabulary's slices."""
    most = hidden.new_full((len(targets),), -torch.inf, dtype=torch.float32)
    total, moment, chosen = (torch.zeros_like(most) for _ in range(3))  # Σ e^(z−m), Σ e^(z−m)·(z−m), z at the target
    for rows in _slices(len(targets), weight):
        z = _logits(hidden, weight[rows], scale)  # (c, v)
        inside = (targets >= rows.start) & (targets < rows.stop)
        there = (targets - rows.start).clamp_(0, z.shape[1] - 1)
        chosen = torch.where(inside, z.gather(1, there[:, None])[:, 0], chosen)
        now = torch.maximum(most, z.amax(1))
        shift = most - now  # −∞ at the first slice
        keep = shift.exp()
        moment = torch.where(keep > 0, keep * (moment + shift * total), 0.0)
        total *= keep
        e = z.sub_(now[:, None]).exp()
        total += e.sum(1)
        moment += torch.bmm(e[:, None], z[:, :, None])[:, 0, 0]
        most = now
    norm = most + total.log()
    return chosen - norm, norm - most - moment / total, norm  # H = log Z − E[z]


def _logits(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """(c, v) float32."""
    z = (hidden @ weight.t()).float()
    return z if scale == 1 else z.mul_(scale)


def _minus_one_at(p: Tensor, targets: Tensor, rows: slice) -> None:
    """p[c, targets[c] − start] −= 1 for the targets inside the slice, in place."""
    inside = ((targets >= rows.start) & (targets < rows.stop)).nonzero()[:, 0]
    p[inside, targets[inside] - rows.start] -= 1


def _add(grad_weight: Tensor, rows: slice, part: Tensor, first: bool) -> None:
    if first:
        grad_weight[rows] = part
    else:
        grad_weight[rows] += part


def _tokens(count: int) -> list[slice]:
    return [slice(start, min(start + _TOKENS, count)) for start in range(0, count, _TOKENS)]


def _slices(tokens: int, weight: Tensor) -> Iterator[slice]:
    """The vocabulary in slices whose logits are few enough; a multiple of 64 wide, as matrix kernels like it."""
    vocabulary = len(weight)
    size = max(64, _SLICE_LOGITS.get(weight.device.type, 1 << 26) // tokens // 64 * 64)
    for start in range(0, vocabulary, size):
        yield slice(start, min(start + size, vocabulary))

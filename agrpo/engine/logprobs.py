"""Log-probability and exact entropy from hidden states, the (C, V) logits never held at once.

The vocabulary is cut, not the tokens: a slice of it meets all tokens at hand in one product, its logits stay in the
cache for every pass over them, and its part of the head's gradient is complete when the slice is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
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
        if ctx.needs_input_grad[1]:  # with one part each slice of it is written whole
            grad_weight = torch.empty_like(weight) if len(parts) == 1 else torch.zeros_like(weight, dtype=torch.float32)
        for part in parts:
            h, y = hidden[part], targets[part]
            factor = (of_logp[part, None] * -ctx.scale).float()  # ∂logp/∂z = onehot − p, times the scale
            scaled = (h * factor).to(h.dtype)  # (c, H) so that p itself is the matrix of both products
            own = None if grad_hidden is None else grad_hidden[part]
            room = _Room(h, weight, ctx.scale)
            for rows in room.slices:
                w = weight[rows]
                log_p = room.logits(w).sub_(norm[part, None])
                if of_entropy is None:
                    p = log_p.exp_()
                    _minus_one_at(p, y, rows)
                    p = room.halved(p)
                    if own is not None:
                        own.add_(p @ w)
                    if grad_weight is not None:
                        _put(grad_weight[rows], p, scaled, first=len(parts) == 1)
                    continue
                grad = room.exp(log_p)
                log_p.add_(entropy[part, None]).mul_(of_entropy[part, None] * -ctx.scale)
                log_p.mul_(grad)  # ∂H/∂z = −p·(log p + H)
                _minus_one_at(grad, y, rows)
                grad = room.halved(grad.mul_(factor).add_(log_p))
                if own is not None:
                    own.add_(grad @ w)
                if grad_weight is not None:
                    _put(grad_weight[rows], grad, h, first=len(parts) == 1)
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
    room = _Room(hidden, weight, scale)
    for rows in room.slices:
        z = room.logits(weight[rows])  # (c, v)
        inside = (targets >= rows.start) & (targets < rows.stop)
        there = (targets - rows.start).clamp_(0, z.shape[1] - 1)
        chosen = torch.where(inside, z.gather(1, there[:, None])[:, 0], chosen)
        now = torch.maximum(most, z.amax(1))
        shift = most - now  # −∞ at the first slice
        keep = shift.exp()
        moment = torch.where(keep > 0, keep * (moment + shift * total), 0.0)
        total *= keep
        e = room.exp(z.sub_(now[:, None]))
        total += e.sum(1)
        moment += e.mul_(z).sum(1)
        most = now
    norm = most + total.log()
    return chosen - norm, norm - most - moment / total, norm  # H = log Z − E[z]


class _Room:
    """Memory for one slice after the other: fresh pages for each would cost more than what is computed in them.

    Args:
        hidden: (c, H).
        weight: (V, H), of which `slices` says the rows of each slice.
        scale: of the logits.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, scale: float) -> None:
        self.slices = list(_slices(len(hidden), weight))
        size = len(hidden) * (self.slices[0].stop - self.slices[0].start)
        self._hidden, self._scale = hidden, scale
        self._product = hidden.new_empty(size)
        exact = hidden.dtype == torch.float32
        self._z = self._product if exact else hidden.new_empty(size, dtype=torch.float32)

    def logits(self, weight: Tensor) -> Tensor:
        """(c, v) float32."""
        product = self._of(self._product, len(weight))
        torch.mm(self._hidden, weight.t(), out=product)
        z = product if product.dtype == torch.float32 else self._of(self._z, len(weight)).copy_(product)
        return z if self._scale == 1 else z.mul_(self._scale)

    @cached_property
    def _e(self) -> Tensor:
        return torch.empty_like(self._z)

    def exp(self, z: Tensor) -> Tensor:
        return torch.exp(z, out=self._of(self._e, z.shape[1]))

    def halved(self, p: Tensor) -> Tensor:
        """p in the precision of the matrices; the logits' products are gone."""
        return p if self._hidden.dtype == torch.float32 else self._of(self._product, p.shape[1]).copy_(p)

    def _of(self, room: Tensor, width: int) -> Tensor:
        return room[: len(self._hidden) * width].view(len(self._hidden), width)


def _minus_one_at(p: Tensor, targets: Tensor, rows: slice) -> None:
    """p[c, targets[c] − start] −= 1 for the targets inside the slice, in place."""
    inside = ((targets >= rows.start) & (targets < rows.stop)).nonzero()[:, 0]
    p[inside, targets[inside] - rows.start] -= 1


def _put(grad_weight: Tensor, p: Tensor, states: Tensor, first: bool) -> None:
    """pᵀ·states into a slice of the head's gradient, or onto it."""
    if first:
        torch.mm(p.t(), states, out=grad_weight)
    else:
        grad_weight += p.t() @ states


def _tokens(count: int) -> list[slice]:
    return [slice(start, min(start + _TOKENS, count)) for start in range(0, count, _TOKENS)]


def _slices(tokens: int, weight: Tensor) -> Iterator[slice]:
    """The vocabulary in slices whose logits are few enough; a multiple of 64 wide, as matrix kernels like it."""
    vocabulary = len(weight)
    size = max(64, _SLICE_LOGITS.get(weight.device.type, 1 << 26) // tokens // 64 * 64)
    for start in range(0, vocabulary, size):
        yield slice(start, min(start + size, vocabulary))

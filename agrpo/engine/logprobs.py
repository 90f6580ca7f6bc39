"""Log-probability and exact entropy from hidden states, the (C, V) logits never held at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 24  # logits of one chunk; 64 MiB in float32


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
        pass computes each chunk's logits again. With no targets, two empty tensors.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, 1.0 / temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        logp, entropy, norm = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(3))
        for part in _chunks(len(targets), weight.shape[0]):
            z = (hidden[part] @ weight.t()).float().mul_(scale)
            chosen = z.gather(1, targets[part, None])[:, 0]
            norm[part] = z.logsumexp(1)
            logp[part] = chosen - norm[part]
            probability = (z - norm[part, None]).exp_()
            entropy[part] = norm[part] - probability.mul_(z).sum(1)  # H = log Z − E[z]
        ctx.save_for_backward(hidden, weight, targets, norm, entropy)
        ctx.scale = scale
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, norm, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(targets), weight.shape[0]):
            z = (hidden[part] @ weight.t()).float().mul_(ctx.scale)
            log_p = z.sub_(norm[part, None])
            p = log_p.exp()
            # ∂logp/∂z = onehot − p and ∂H/∂z = −p·(log p + H)
            grad = log_p.add_(entropy[part, None]).mul_(-grad_entropy[part, None]).sub_(grad_logp[part, None]).mul_(p)
            grad.scatter_add_(1, targets[part, None], grad_logp[part, None]).mul_(ctx.scale)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), hidden[part])
                else:
                    grad_weight += grad.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, None, None


def _chunks(count: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]

"""Attention of many short rows on a CPU, as plain products: there it is twice as fast as the flash kernel and more.

The flash kernel is made for long rows; for rows of a few hundred tokens its backward pass costs more than the layer's
matrices. Here the scores of some rows exist at once, few enough to stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROW_SCORES = 1 << 20  # scores of one row over all heads up to which this is the faster way
_SLAB_SCORES = 1 << 20  # scores that exist at once; 4 MiB in float32


def is_short(query: Tensor, key: Tensor) -> bool:
    """Is this the faster way for (rows, width, heads, D) queries and (rows, keys, key heads, D) keys?"""
    return query.device.type == "cpu" and query.shape[1] * query.shape[2] * key.shape[1] <= _ROW_SCORES


def short_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(query·keyᵀ·scale)·value for each row and head, differentiable in the three.

    Args:
        query: (rows, width, heads, D).
        key, value: (rows, keys, key heads, D); heads is a multiple of key heads.
        mask: (rows or 1, 1, width, keys) bool, true where seen; None: causal, with as many keys as queries.
        scale: default D^(−1/2).

    Returns:
        (rows, width, heads, D). Scores and softmax are float32; the backward pass computes the scores again.
    """
    if mask is None:
        mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()[None, None]
    bias = torch.zeros(mask.shape, device=query.device).masked_fill_(~mask, -torch.inf)
    return _Short.apply(query, key, value, bias, query.shape[-1] ** -0.5 if scale is None else scale)


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, bias)
        ctx.scale = scale
        out = torch.empty_like(query)
        for rows in _slabs(query, key):
            q, k, v = _by_key_head(query[rows], key.shape[2]), key[rows].transpose(1, 2), value[rows].transpose(1, 2)
            p = _probabilities(q, k, _of(bias, rows), scale, query.shape[1]).to(v.dtype)
            _back(p @ v, out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, bias = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for rows in _slabs(query, key):
            q, k, v = _by_key_head(query[rows], key.shape[2]), key[rows].transpose(1, 2), value[rows].transpose(1, 2)
            g = _by_key_head(grad[rows], key.shape[2])  # (b, key heads, shared · width, D)
            p = _probabilities(q, k, _of(bias, rows), ctx.scale, query.shape[1])
            of_value[rows] = (p.to(v.dtype).transpose(2, 3) @ g).transpose(1, 2)
            of_p = (g @ v.transpose(2, 3)).float()
            of_scores = torch.ops.aten._softmax_backward_data(of_p, p, -1, torch.float32).mul_(ctx.scale).to(q.dtype)
            _back(of_scores @ k, of_query[rows])
            of_key[rows] = (of_scores.transpose(2, 3) @ q).transpose(1, 2)
        return of_query, of_key, of_value, None, None


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, scale: float, width: int) -> Tensor:
    """(b, key heads, shared · width, keys) float32."""
    scores = (q @ k.transpose(2, 3)).unflatten(2, (-1, width))  # (b, key heads, shared, width, keys)
    return torch.add(bias[:, :, None], scores, alpha=scale).flatten(2, 3).softmax(-1)


def _slabs(query: Tensor, key: Tensor) -> list[slice]:
    size = max(1, _SLAB_SCORES // (query.shape[1] * query.shape[2] * key.shape[1]))
    return [slice(start, min(start + size, len(query))) for start in range(0, len(query), size)]


def _of(bias: Tensor, rows: slice) -> Tensor:
    return bias if len(bias) == 1 else bias[rows]


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """(b, width, heads, D) → (b, key heads, shared · width, D): the queries that read the same keys stand together."""
    b, width, heads, size = x.shape
    return x.view(b, width, key_heads, heads // key_heads, size).permute(0, 2, 3, 1, 4).reshape(b, key_heads, -1, size)


def _back(x: Tensor, out: Tensor) -> None:
    """The inverse of `_by_key_head`, into `out`."""
    b, width, heads, size = out.shape
    shared = heads // x.shape[1]
    out.view(b, width, x.shape[1], shared, size).copy_(
        x.view(b, x.shape[1], shared, width, size).permute(0, 3, 1, 2, 4)
    )

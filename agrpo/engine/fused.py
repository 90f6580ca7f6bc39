"""Fused pieces of a decoder layer for training: fewer passes over memory than the models' own, and less kept of them.

They replace the forward of single modules in place, so hooks, adapters and sharding go on as they were. Only modules
of the flat families are touched, and only where their mathematics is known: root-mean-square norms and gated linear
units with SiLU. `tests/engine/test_flat_forward.py` compares models with and without them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
_GATED = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP")


def fuse_layers(lm: nn.Module) -> int:
    """Replace the forward of every module that is known; returns how many."""
    fused = 0
    for module in lm.modules():
        kind = type(module).__name__
        if kind in _NORMS:
            module.forward = MethodType(_norm, module)
            fused += 1
        elif kind in _GATED and isinstance(module.act_fn, _SILU):
            module.forward = MethodType(_gated, module)
            fused += 1
    return fused


def _norm(module: Any, x: Tensor) -> Tensor:
    return _RmsNorm.apply(x, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_SiluGate.apply(module.gate_proj(x), module.up_proj(x)))


class _RmsNorm(torch.autograd.Function):
    """w · x / √(mean(x²) + ε), in float32 inside. Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows = x.float()
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale  # the normalised rows
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        g = grad.float() * weight
        share = (g * normal).mean(-1, keepdim=True)
        return g.sub_(normal.mul_(share)).mul_(scale).to(x.dtype), of_weight, None


class _SiluGate(torch.autograd.Function):
    """silu(gate) · up. Keeps its two arguments only; the backward pass computes silu again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), of_up

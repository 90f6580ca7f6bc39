"""A decoder layer by layer for single tokens: weights fused, and on a CPU packed for the matrix kernels.

Decoding reads every weight for a handful of tokens, so what counts is few, large products and little between them. This
is the arithmetic of transformers' Llama, Qwen2 and Qwen3, in the same order and precision, on copies of the weights
whose products are joined: query, key and value in one, gate and up in one. The copies live for one call of the sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from agrpo.engine.attention import FAMILIES, Attend

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    before: Tensor  # (H,) norm ahead of attention
    qkv: Linear
    query_norm: Tensor | None  # (D,) Qwen3's
    key_norm: Tensor | None
    out: Linear
    after: Tensor  # (H,) norm ahead of the gated unit
    gate_up: Linear
    down: Linear


def can_fuse(lm: PreTrainedModel) -> bool:
    """Is this a model whose layers are plain linear maps in a known order? Not so with adapters."""
    if lm.config.model_type not in FAMILIES or lm.config.hidden_act not in ("silu", "swish"):
        return False
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    return all(type(m) is nn.Linear for name, m in lm.named_modules() if name.rpartition(".")[2] in names)


class FusedDecoder:
    """One token of each of some rows through a model, its keys and values kept by `attend`.

    Args:
        lm: the model, of a family that `can_fuse`.
        rows: how many rows most calls have; the weights are packed for it.
    """

    def __init__(self, lm: PreTrainedModel, rows: int) -> None:
        config, body = lm.config, lm.get_decoder()
        self.body = body
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.norm = body.norm.weight
        self.epsilon = torch.tensor(config.rms_norm_eps, device=self.norm.device)
        self.head = _linear([lm.get_output_embeddings()], rows)
        self.layers = [_layer(layer, rows) for layer in body.layers]

    @torch.inference_mode()
    def __call__(self, token: Tensor, position: Tensor, attend: Attend) -> Tensor:
        """(B,) tokens at their (B,) positions → (B, V) logits."""
        h = self.body.embed_tokens(token)  # (B, H)
        cos, sin = self.body.rotary_emb(h, position_ids=position[None])  # (1, B, D)
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., : self.size // 2].neg_()  # the sign of rotate_half
        both, scale = self.heads + self.key_heads, self.size**-0.5
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(self._normal(h, layer.before)).unflatten(-1, (-1, self.size))  # (B, heads + 2·key heads, D)
            if layer.query_norm is None:
                turned = _rotate(qkv[:, :both], cos, sin)
            else:
                query = self._normal(qkv[:, : self.heads], layer.query_norm)
                key = self._normal(qkv[:, self.heads : both], layer.key_norm)
                turned = _rotate(torch.cat([query, key], 1), cos, sin)
            query, key, value = turned[:, : self.heads], turned[:, self.heads :], qkv[:, both:]
            seen = attend(number, query[:, :, None], key[:, :, None], value[:, :, None], scale)  # (B, 1, heads, D)
            h = layer.out(seen.flatten(1)).add_(h)
            gate, up = layer.gate_up(self._normal(h, layer.after)).chunk(2, -1)
            h = layer.down(F.silu(gate).mul_(up)).add_(h)
        return self.head(self._normal(h, self.norm))

    def _normal(self, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.float()
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale = torch.addcmul(self.epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
        return rows.mul_(scale).to(x.dtype).mul_(weight) if rows is not x else x * scale * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, heads, D) turned by its position; `sin` has its first half negated."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def _layer(layer: Any, rows: int) -> _Layer:
    attention, unit = layer.self_attn, layer.mlp
    norms = [getattr(attention, name).weight if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
    return _Layer(
        before=layer.input_layernorm.weight,
        qkv=_linear([attention.q_proj, attention.k_proj, attention.v_proj], rows),
        query_norm=norms[0],
        key_norm=norms[1],
        out=_linear([attention.o_proj], rows),
        after=layer.post_attention_layernorm.weight,
        gate_up=_linear([unit.gate_proj, unit.up_proj], rows),
        down=_linear([unit.down_proj], rows),
    )


def _linear(maps: list[nn.Linear], rows: int) -> Linear:
    """Linear maps of the same input as one."""
    weight = maps[0].weight if len(maps) == 1 else torch.cat([one.weight for one in maps])
    weight = weight.detach()
    biases = [one.bias for one in maps]
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)

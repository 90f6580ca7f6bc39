"""Attention for the flat layout and for decoding, plugged into transformers' own model code.

transformers calls the registered function from every layer with queries, keys and values; the object passed as `attend`
says what a token may see: `FlatAttention` (training, prefill) or the sampler's cache (decoding).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from agrpo.engine.layout import Block, Layout
from agrpo.engine.short_attention import is_short, short_attention

NAME = "agrpo"
FAMILIES = ("llama", "qwen2", "qwen3")


class Attend(Protocol):
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor: ...


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    attend: Attend,
    **options: Any,
) -> tuple[Tensor, None]:
    return attend(module.layer_idx, query, key, value, options.get("scaling")), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def head_size(config: Any) -> int:
    """Width of one attention head, of a model's configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def why_not_flat(config: Any) -> str | None:
    """The reason why a model cannot use the flat layout, or None when it can."""
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type} is not one of {', '.join(FAMILIES)}"
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows:
        return f"it uses {', '.join(sorted(windows))}"
    if getattr(config, "rope_scaling", None) and config.rope_scaling.get("rope_type") in ("dynamic", "longrope"):
        return f"its rope ({config.rope_scaling['rope_type']}) depends on the sequence length of the whole batch"
    return None


def use_flat_attention(lm: PreTrainedModel) -> None:
    """Route the model's attention through `attend`; afterwards every forward must pass one."""
    lm.config._attn_implementation = NAME


class _MoveRows(torch.autograd.Function):
    """out[to[i]] = rows[of[i]], zero elsewhere, for indices without repeats: gather and scatter both ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, of: Tensor, to: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(of, to)
        ctx.size = rows.shape[0]
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, to, rows.index_select(0, of))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        of, to = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, of, grad.index_select(0, to)), None, None, None


class FlatAttention:
    """Every token of a layout sees its prompt and, inside a completion, the completion up to itself.

    `stored` collects the layers' keys and values, (S, heads, head size), when the sampler asks for them. `fast` takes
    plain products where they are faster than PyTorch's kernel.
    """

    def __init__(self, layout: Layout, store: bool = False, fast: bool = True) -> None:
        self.layout, self.fast = layout, fast
        self.stored: list[tuple[Tensor, Tensor]] | None = [] if store else None
        self._order = torch.cat([block.places for block in layout.blocks])  # (S,) places in the order of the blocks
        self._all = torch.arange(len(self._order), device=self._order.device)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query (1, heads, S, D), key and value (1, key heads, S, D) → (1, S, heads, D)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, D)
        if self.stored is not None:
            self.stored.append((k, v))
        parts = [self._block(block, q, k, v, scale) for block in self.layout.blocks]
        return _MoveRows.apply(torch.cat(parts), self._all, self._order, len(q))[None]

    def _block(self, block: Block, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of one block → (R, heads, D), its real tokens in the order of `block.places`."""
        size = block.rows * block.width

        def own(x: Tensor) -> Tensor:  # (rows, width, heads, D)
            return _MoveRows.apply(x, block.places, block.slots, size).unflatten(0, (block.rows, block.width))

        def keys(x: Tensor) -> Tensor:  # (rows, prompt width + width, heads, D)
            if block.prompt_rows == 0:
                return own(x)
            shape = (block.prompt_rows, block.prompt_width)
            prompt = _MoveRows.apply(x, block.prompt_places, block.prompt_slots, shape[0] * shape[1]).unflatten(
                0, shape
            )
            return torch.cat([prompt.index_select(0, block.prompt_of_row), own(x)], 1)

        query, key, value = own(q), keys(k), keys(v)
        if self.fast and is_short(query, key):
            return short_attention(query, key, value, block.mask, scale).flatten(0, 1).index_select(0, block.slots)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=block.mask,
            is_causal=block.mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (rows, heads, width, D)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, block.slots)

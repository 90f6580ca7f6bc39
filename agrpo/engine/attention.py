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
    """out[to[i]] = rows[of[i]], zero elsewhere, for indices without repeats: gather and scatter both ways.

    None instead of indices: all, in order.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, of: Tensor | None, to: Tensor | None, size: int) -> Tensor:
        ctx.indices, ctx.size = (of, to), len(rows)
        return _moved(rows, of, to, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        of, to = ctx.indices
        return _moved(grad, to, of, ctx.size), None, None, None


def _moved(rows: Tensor, of: Tensor | None, to: Tensor | None, size: int) -> Tensor:
    picked = rows if of is None else rows.index_select(0, of)
    if to is None:
        return picked
    shape = (size, *rows.shape[1:])
    return (rows.new_empty(shape) if len(to) == size else rows.new_zeros(shape)).index_copy_(0, to, picked)


class FlatAttention:
    """Every token of a layout sees its prompt and, inside a completion, the completion up to itself.

    `stored` collects the layers' keys and values, (S, heads, head size), when the sampler asks for them. `fast` takes
    plain products where they are faster than PyTorch's kernel.
    """

    def __init__(self, layout: Layout, store: bool = False, fast: bool = True) -> None:
        self.layout, self.fast = layout, fast
        self.stored: list[tuple[Tensor, Tensor]] | None = [] if store else None
        self._order = torch.cat([block.places for block in layout.blocks])  # (S,) places in the order of the blocks

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query (1, heads, S, D), key and value (1, key heads, S, D) → (1, S, heads, D)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, D)
        if self.stored is not None:
            self.stored.append((k, v))
        parts = [self._block(block, q, k, v, scale) for block in self.layout.blocks]
        return _MoveRows.apply(torch.cat(parts), None, self._order, len(q))[None]

    def _block(self, block: Block, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of one block → (R, heads, D), its real tokens in the order of `block.places`."""

        def own(x: Tensor) -> Tensor:  # (rows, width, heads, D)
            return _in_rows(x, block.places, block.slots, block.rows, block.width)

        def keys(x: Tensor) -> Tensor:  # (rows, prompt width + width, heads, D)
            if block.prompt_rows == 0:
                return own(x)
            prompt = _in_rows(x, block.prompt_places, block.prompt_slots, block.prompt_rows, block.prompt_width)
            return torch.cat([prompt.index_select(0, block.prompt_of_row), own(x)], 1)

        query, key, value = own(q), keys(k), keys(v)
        if self.fast and is_short(query, key):
            return _out_of_rows(short_attention(query, key, value, block.mask, scale), block.slots)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=block.mask,
            is_causal=block.mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (rows, heads, width, D)
        return _out_of_rows(out.transpose(1, 2), block.slots)


def _in_rows(x: Tensor, places: Tensor, slots: Tensor, rows: int, width: int) -> Tensor:
    """(S, heads, D) → (rows, width, heads, D), zeros where no token stands."""
    to = None if len(slots) == rows * width else slots  # rows that are full have their slots in order
    return _MoveRows.apply(x, places, to, rows * width).unflatten(0, (rows, width))


def _out_of_rows(x: Tensor, slots: Tensor) -> Tensor:
    """(rows, width, heads, D) → (R, heads, D), the real tokens."""
    x = x.flatten(0, 1)
    return x if len(slots) == len(x) else x.index_select(0, slots)

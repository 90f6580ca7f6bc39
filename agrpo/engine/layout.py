"""The flat layout: each prompt once for its whole group, its completions unpadded behind it.

    | prompt 0 | completion 0 | completion 1 | prompt 1 | completion 2 | …          S tokens in all

A completion sees its own prompt and itself, nothing else; positions restart behind the prompt for each completion. The
one shift of the library is here: `source[c]` is the place whose hidden state predicts completion token c.

What others say between the turns of a completion stands in its place and is seen like everything else. It is no target:
of the C completion tokens, those that are learnt, it has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_SCORES = 1 << 24  # attention scores of one block and head: bounds the mask's memory
_SMALL_SCORES = 1 << 15  # below this a block costs its kernel launch, whatever its padding
_WASTE = 1.35  # padded over real attention scores that a larger block may cost


@dataclass(frozen=True)
class Block:
    """Sequences of like size whose attention is computed together, padded only inside the attention kernel.

    A block of prompts has keys of its own; a block of completions has the keys of its prompts before its own.
    Places are indices into the flat axis (S,); slots are indices into the block's padded rows.
    """

    rows: int
    width: int
    places: Tensor  # (R,) the rows' real tokens
    slots: Tensor  # (R,) where each stands in rows × width
    prompt_rows: int  # 0 for a block of prompts
    prompt_width: int
    prompt_places: Tensor
    prompt_slots: Tensor
    prompt_of_row: Tensor  # (rows,) which of prompt_rows each row continues
    mask: Tensor | None  # (rows, 1, width, prompt_width + width) bool, true where seen; None: plain causal


@dataclass(frozen=True)
class Layout:
    """P prompts and N completions on one flat axis of S tokens, C of them in completions."""

    ids: Tensor  # (S,)
    positions: Tensor  # (S,)
    targets: Tensor  # (C,) completion tokens
    source: Tensor  # (C,) place of the token before each target
    last: Tensor  # (N,) place of each completion's last token
    lengths: Tensor  # (N,) targets of each completion
    spans: Tensor  # (N,) its tokens, with those between its turns
    start: Tensor  # (N,) place of its first
    offsets: Tensor  # (C,) how far behind that each target stands
    group: Tensor  # (N,)
    prompt_lengths: Tensor  # (P,)
    prompt_places: Tensor  # (sum of prompt_lengths,) flat places of the prompts' tokens, prompt by prompt
    blocks: tuple[Block, ...]

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        moved["blocks"] = tuple(
            Block(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(b).items()}) for b in self.blocks
        )
        return Layout(**moved)


def exclusive_cumsum(values: Tensor) -> Tensor:
    return values.cumsum(0) - values


def _within(lengths: Tensor) -> Tensor:
    """0, 1, … restarting at every segment: (sum of lengths,)."""
    return torch.arange(int(lengths.sum())) - exclusive_cumsum(lengths).repeat_interleave(lengths)


_NONE = torch.zeros(0, dtype=torch.long)


def build_layout(
    prompts: Sequence[Sequence[int]],
    group: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    heard: Tensor = _NONE,
    gaps: Tensor = _NONE,
) -> Layout:
    """Lay out prompts and their completions.

    Args:
        prompts: P token sequences, none empty. A prompt without completions is laid out all the same.
        group: (N,) prompt of each completion, non-decreasing.
        lengths: (N,) completion tokens, each at least 1.
        tokens: (C,) completion tokens, in order.
        heard: (E,) tokens that are read between them, in order.
        gaps: (C,) how many of those stand directly before each completion token; empty: none anywhere.

    Raises:
        ValueError: an empty prompt or completion, groups out of order, or gaps that are not heard's.
    """
    prompt_lengths = torch.tensor([len(ids) for ids in prompts])  # (P,)
    if len(prompts) == 0 or int(prompt_lengths.min()) == 0 or (len(lengths) and int(lengths.min()) == 0):
        raise ValueError("an empty prompt or completion has no place in a layout: every one needs at least one token")
    if len(group) > 1 and bool((group[1:] < group[:-1]).any()):
        raise ValueError("group must not decrease: completions stand behind their own prompt")
    spans, offset = _spans(lengths, heard, gaps)
    in_group = torch.zeros_like(prompt_lengths).index_add_(0, group, spans)  # (P,) tokens behind each prompt
    group_start = exclusive_cumsum(prompt_lengths + in_group)  # (P,)
    start = group_start[group] + prompt_lengths[group] + exclusive_cumsum(spans) - exclusive_cumsum(in_group)[group]

    prompt_places = group_start.repeat_interleave(prompt_lengths) + _within(prompt_lengths)
    places = start.repeat_interleave(lengths) + offset  # (C,)
    before = (group_start + prompt_lengths - 1)[group].repeat_interleave(lengths)  # (C,) its prompt's last place

    ids = torch.empty(len(prompt_places) + len(places) + len(heard), dtype=torch.long)
    ids[prompt_places] = torch.tensor([token for ids_ in prompts for token in ids_])
    ids[places] = tokens
    if len(heard):
        ids[(places - gaps).repeat_interleave(gaps) + _within(gaps)] = heard
    positions = torch.empty_like(ids)
    positions[prompt_places] = _within(prompt_lengths)
    positions[start.repeat_interleave(spans) + _within(spans)] = prompt_lengths[group].repeat_interleave(
        spans
    ) + _within(spans)
    return Layout(
        ids=ids,
        positions=positions,
        targets=tokens,
        source=torch.where(offset == 0, before, places - 1),
        last=start + spans - 1,
        lengths=lengths,
        spans=spans,
        start=start,
        offsets=offset,
        group=group,
        prompt_lengths=prompt_lengths,
        prompt_places=prompt_places,
        blocks=tuple(_blocks(prompt_lengths, group_start, group, spans, start)),
    )


def _spans(lengths: Tensor, heard: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) tokens of each completion with those heard in it, and (C,) the place of each of its own among them."""
    if len(gaps) == 0 and len(heard) == 0:
        return lengths, _within(lengths)
    if len(gaps) != int(lengths.sum()) or int(gaps.sum()) != len(heard) or bool((gaps < 0).any()):
        raise ValueError(
            f"{len(gaps)} gaps, {int(gaps.sum())} wide in all, for {int(lengths.sum())} completion tokens and"
            f" {len(heard)} tokens heard between them"
        )
    completion = torch.arange(len(lengths)).repeat_interleave(lengths)
    spans = lengths.index_add(0, completion, gaps)
    return spans, (gaps + 1).cumsum(0) - 1 - exclusive_cumsum(spans)[completion]


def _blocks(prompt_lengths: Tensor, group_start: Tensor, group: Tensor, lengths: Tensor, start: Tensor) -> list[Block]:
    nothing = torch.zeros(0, dtype=torch.long)
    blocks = []
    for rows in _bucket(torch.zeros_like(prompt_lengths), prompt_lengths):
        width = int(prompt_lengths[rows].max())
        places, slots = _places(group_start[rows], prompt_lengths[rows], width)
        blocks.append(Block(len(rows), width, places, slots, 0, 0, nothing, nothing, nothing, None))
    for rows in _bucket(prompt_lengths[group], lengths):
        own, seen = group[rows].unique(return_inverse=True)  # the block's prompts, and which one each row continues
        before, width = int(prompt_lengths[own].max()), int(lengths[rows].max())
        places, slots = _places(start[rows], lengths[rows], width)
        prompt_places, prompt_slots = _places(group_start[own], prompt_lengths[own], before)
        key, query = torch.arange(before + width), torch.arange(width)
        causal = (key >= before) & (key - before <= query[:, None])  # (width, before + width)
        in_prompt = key < prompt_lengths[group[rows]][:, None]  # (rows, before + width)
        mask = causal[None, None] | (in_prompt & (key < before))[:, None, None]
        if bool((prompt_lengths[own] == before).all()):
            mask = mask[:1]
        blocks.append(Block(len(rows), width, places, slots, len(own), before, prompt_places, prompt_slots, seen, mask))
    return blocks


def _places(start: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Flat places of the rows' tokens, and their slots in a padded (rows × width) array."""
    offset = _within(lengths)
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    return start.repeat_interleave(lengths) + offset, row * width + offset


def _bucket(before: Tensor, lengths: Tensor) -> list[Tensor]:
    """Group sequences of like size: padding may cost `_WASTE`, unless the block is so small that it does not matter."""
    if len(lengths) == 0:
        return []
    order = sorted(range(len(lengths)), key=lambda i: (int(before[i]), int(lengths[i])))
    prefix, own = before.tolist(), lengths.tolist()
    buckets: list[list[int]] = []
    real = widest = longest = 0
    for i in order:
        scores = own[i] * (prefix[i] + own[i])
        width, prompt = max(widest, own[i]), max(longest, prefix[i])
        rows = len(buckets[-1]) + 1 if buckets else 0
        padded = rows * width * (prompt + width)
        fits = padded <= _BLOCK_SCORES and (padded <= _WASTE * (real + scores) or padded <= _SMALL_SCORES)
        if buckets and fits:
            buckets[-1].append(i)
            real, widest, longest = real + scores, width, prompt
        else:
            buckets.append([i])
            real, widest, longest = scores, own[i], prefix[i]
    return [torch.tensor(sorted(bucket)) for bucket in buckets]

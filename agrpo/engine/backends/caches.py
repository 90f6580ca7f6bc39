"""Keys and values of the native sampler's lines: a line holds one completion after another behind its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from agrpo.engine.attention import FlatAttention
from agrpo.engine.backends.decoder import FusedDecoder
from agrpo.engine.layout import build_layout

_GROWTH = 32  # columns of keys and values that are added at a time where products read them whole
_NOTHING = torch.zeros(0, dtype=torch.long)


class FlatCache:
    """For models routed through `attend`: each line has its prompt and its completion from its first column on.

    A line is written where its own completion stands, so a new one can begin in it at any time.

    Args:
        lines: completions that decode together.
        prompt: tokens of the longest prompt.
        completion: tokens of the longest completion.
        device: where the model is.
    """

    def __init__(self, lines: int, prompt: int, completion: int, device: torch.device) -> None:
        self.lines, self.columns = lines, prompt + completion
        self.at = torch.zeros(lines, dtype=torch.long)  # on the host: the column where each line goes on
        self.mask: Tensor | None = None  # (lines, columns) 0 where seen, else −inf
        self.keys: list[Tensor] = []  # a layer: (lines, key heads, columns, D)
        self.values: list[Tensor] = []

    def join(self, lm: PreTrainedModel, ids: Sequence[tuple[int, ...]], places: Tensor) -> Tensor:
        """Read prompts, each once however often it is asked for, into these lines; returns their (B, V) logits."""
        distinct, which = _distinct(ids, places.device)
        hidden, stored = _read(lm, distinct, places.device)
        length = torch.tensor([len(prompt) for prompt in distinct])
        for layer, both in enumerate(stored):
            for flat, store in zip(both, (self.keys, self.values), strict=True):
                padded = _padded(flat, length)  # (P, width, key heads, D)
                if layer == len(store):
                    store.append(flat.new_zeros(self.lines, flat.shape[1], self.columns, flat.shape[2]))
                store[layer][places, :, : padded.shape[1]] = padded.transpose(1, 2)[which]
            stored[layer] = None
        own = length[which.cpu()]
        self.at[places.cpu()] = own
        if self.mask is None:
            self.mask = hidden.new_zeros(self.lines, self.columns)
        self.mask[places] = _unseen(own.to(places.device), self.columns, hidden)
        return lm.get_output_embeddings()(hidden)[which]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query (lines, heads, 1, D), key and value (lines, key heads, 1, D) → (lines, 1, heads, D)."""
        lines, heads, _, size = query.shape
        k, v = self.keys[layer], self.values[layer]
        k[self._now], v[self._now] = key[:, :, 0], value[:, :, 0]
        shared = heads // key.shape[1]  # query heads of a key head become query positions: no copy of the keys
        q, k, v = query.reshape(lines, -1, shared, size), k[:lines, :, : self._used], v[:lines, :, : self._used]
        mask = None if self._seen is None else self._seen.expand(-1, 1, shared, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(lines, 1, heads, size)

    def step(self, lm: PreTrainedModel, token: Tensor, running: Tensor, decoder: FusedDecoder | None) -> Tensor:
        """Append a token (lines,) to each line and return the next (lines, V) logits: any where none is running."""
        self.at[~running] = 0  # what is written there is never read
        at, line = self.at.to(token.device), torch.arange(len(self.at), device=token.device)
        self.mask[line, at] = 0
        own = self.at[running]
        self._used = int(own.max()) + 1
        even = bool((own == own[0]).all())
        self._now = (slice(0, len(line)), slice(None), int(own[0])) if even else (line, slice(None), at)
        self._seen = None if even else self.mask[: len(line), None, None, : self._used]
        self.at = self.at + 1  # a new tensor: `at` is the old one
        return _logits(lm, token, at, self, decoder)

    def idle(self, lm: PreTrainedModel, device: torch.device) -> None:
        """A forward for nothing, through the modules of `join` and `step`: the other ranks gather weights with it."""
        hidden, _ = _read(lm, [(0,)], device)
        lm.get_output_embeddings()(hidden[0])

    def keep(self, places: Tensor) -> None:
        """Drop every line but these, in place."""
        self.at = self.at[places.cpu()]
        used = int(self.at.max())
        self.mask = self.mask[places]
        for store in (self.keys, self.values):
            for room in store:
                room[: len(places), :, :used] = room[places, :, :used]


class SharedCache:
    """The same on a CPU, where attention is plain products and a prompt's keys are read once for all its lines.

    For one token the kernels are slow there, and what counts is how much memory is read: the prompts stand in rooms of
    their own, and a line has but its completion. Products read whole tensors, as a part of one would be copied first:
    completions grow in blocks.
    """

    def __init__(self, lines: int, prompt: int, completion: int, device: torch.device) -> None:
        self.lines, self._most = lines, completion
        self.width = 0  # columns of the completions so far
        self.length = torch.zeros(lines, dtype=torch.long)  # on the host, as are the next two: of each line's prompt
        self.own = torch.zeros(lines, dtype=torch.long)  # the column of its completion where each line goes on
        self.room = torch.zeros(lines, dtype=torch.long)  # where its prompt stands
        self.prompt_keys: list[Tensor] = []  # a layer: (rooms, key heads, prompt width, D)
        self.prompt_values: list[Tensor] = []
        self.keys: list[Tensor] = []  # a layer: (lines, key heads, width, D)
        self.values: list[Tensor] = []
        self.mask = torch.zeros(lines, 0)  # (lines, prompt width + most) 0 where seen, else −inf

    def join(self, lm: PreTrainedModel, ids: Sequence[tuple[int, ...]], places: Tensor) -> Tensor:
        """Read prompts, each once however often it is asked for, for these lines; returns their (B, V) logits."""
        distinct, which = _distinct(ids, places.device)
        hidden, stored = _read(lm, distinct, places.device)
        length = torch.tensor([len(prompt) for prompt in distinct])
        stays = torch.ones(len(self.room), dtype=torch.bool)
        stays[places] = False
        rooms = self._renumber(stays) if self.keys else _NOTHING
        for layer, both in enumerate(stored):
            for flat, prompts, lines in zip(both, self._prompts, self._completions, strict=True):
                read = _padded(flat, length).transpose(1, 2)  # (P, key heads, width, D)
                if layer == len(prompts):
                    prompts.append(read.contiguous())
                    lines.append(flat.new_empty(self.lines, flat.shape[1], 0, flat.shape[2]))
                else:
                    prompts[layer] = _together(prompts[layer][rooms], read)
            stored[layer] = None
        self.room[places] = len(rooms) + which
        self.length[places], self.own[places] = length[which], 0
        self._regroup()
        of_prompt = _unseen(self.length, self.prompt_keys[0].shape[2], hidden)
        self.mask = torch.cat([of_prompt, _unseen(self.own, self._most, hidden)], 1)
        return lm.get_output_embeddings()(hidden)[which]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query (lines, heads, 1, D), key and value (lines, key heads, 1, D) → (lines, 1, heads, D)."""
        lines, heads, _, size = query.shape
        k, v = self.keys[layer], self.values[layer]
        k[self._now], v[self._now] = key[:, :, 0], value[:, :, 0]
        prompt_key, prompt_value = self.prompt_keys[layer], self.prompt_values[layer]
        q = query.reshape(lines, key.shape[1], -1, size)  # the query heads of a key head are its query positions
        of_prompt = self._to_lines(self._to_rooms(q) @ prompt_key.transpose(2, 3))
        scores = torch.cat([of_prompt, q @ k.transpose(2, 3)], -1)
        p = torch.add(self._seen, scores, alpha=size**-0.5 if scale is None else scale).softmax(-1)
        of_prompt, of_own = p.split([prompt_key.shape[2], self.width], -1)
        seen = self._to_lines(self._to_rooms(of_prompt) @ prompt_value) + of_own @ v
        return seen.reshape(lines, 1, heads, size)

    def step(self, lm: PreTrainedModel, token: Tensor, running: Tensor, decoder: FusedDecoder | None) -> Tensor:
        """Append a token (lines,) to each line and return the next (lines, V) logits: any where none is running."""
        self.own[~running] = 0  # what is written there is never read
        line, at, prompts = torch.arange(len(self.own)), self.own, self.mask.shape[1] - self._most
        self.mask[line, prompts + at] = 0
        least, most = int(at[running].min()), int(at.max())
        self._now = (slice(None), slice(None), most) if least == most else (line, slice(None), at)
        self._reach(most + 1)
        self._seen = self.mask[:, None, None, : prompts + self.width]
        self.own = at + 1
        return _logits(lm, token, self.length + at, self, decoder)

    def keep(self, places: Tensor) -> None:
        """Drop every line but these, and the prompts that no line has any more."""
        rooms = self._renumber(places)
        for store in self._prompts:
            store[:] = [of_layer[rooms] for of_layer in store]
        for store in self._completions:
            store[:] = [of_layer[places] for of_layer in store]
        self.lines, self.mask = len(places), self.mask[places]
        self.length, self.own, self.room = self.length[places], self.own[places], self.room[places]
        self._regroup()

    @property
    def _prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.prompt_keys, self.prompt_values

    @property
    def _completions(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.keys, self.values

    def _renumber(self, lines: Tensor) -> Tensor:
        """The rooms that these lines need, which will stand in this order; the lines are told."""
        rooms, number = self.room[lines].unique(return_inverse=True)
        self.room[lines] = number
        return rooms

    def _regroup(self) -> None:
        """Lines by room: as many places a room as the fullest has lines."""
        count = self.room.bincount()
        self._a_room = int(count.max())
        order = self.room.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - (count.cumsum(0) - count).repeat_interleave(count)
        self._place = self.room * self._a_room + rank  # (lines,) where each stands
        self._of_place = torch.zeros(len(count) * self._a_room, dtype=torch.long)  # any line where none stands
        self._of_place[self._place] = torch.arange(len(order))
        self._in_order = torch.equal(self._place, torch.arange(len(self._of_place)))

    def _to_rooms(self, x: Tensor) -> Tensor:
        """(lines, key heads, shared, n) → (rooms, key heads, lines a room · shared, n)."""
        x = x if self._in_order else x[self._of_place]
        return x.unflatten(0, (-1, self._a_room)).transpose(1, 2).flatten(2, 3)

    def _to_lines(self, x: Tensor) -> Tensor:
        """The inverse of `_to_rooms`."""
        x = x.unflatten(2, (self._a_room, -1)).transpose(1, 2).flatten(0, 1)
        return x if self._in_order else x[self._place]

    def _reach(self, columns: int) -> None:
        """Make room for so many columns of the completions."""
        if columns <= self.width:
            return
        self.width = min(self._most, -(-columns // _GROWTH) * _GROWTH)
        for store in self._completions:
            store[:] = [_wider(of_layer, self.width) for of_layer in store]


class PlainCache:
    """transformers' own cache and attention, prompts padded on the left: for every other family. Filled once."""

    def __init__(self, lines: int, prompt: int, completion: int, device: torch.device) -> None:
        self.mask = torch.zeros(lines, 0)  # (lines, tokens so far) 1 where real

    def join(self, lm: PreTrainedModel, ids: Sequence[tuple[int, ...]], places: Tensor) -> Tensor:
        """Read prompts, each once however often it is asked for; returns their (lines, V) logits."""
        device = places.device
        distinct, which = _distinct(ids, device)
        width = max(map(len, distinct))
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=device)
        self.cache, self.mask = DynamicCache(config=lm.config), mask[which]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = lm(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        self.cache.batch_select_indices(which)
        return output.logits[:, -1][which]

    def step(self, lm: PreTrainedModel, token: Tensor, running: Tensor, decoder: None) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        output = lm(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def idle(self, lm: PreTrainedModel, device: torch.device) -> None:
        """A forward for nothing, for the other ranks' sake."""
        lm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)

    def keep(self, places: Tensor) -> None:
        self.cache.batch_select_indices(places)
        self.mask = self.mask[places]


def _distinct(ids: Sequence[tuple[int, ...]], device: torch.device) -> tuple[list[tuple[int, ...]], Tensor]:
    """Each prompt once, and (B,) which of them each was."""
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(ids))}
    return list(number), torch.tensor([number[prompt] for prompt in ids], device=device)


def _read(
    lm: PreTrainedModel, prompts: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
    """(P, H) last states of P prompts, and a layer's keys and values (S, key heads, D), prompt behind prompt."""
    layout = build_layout(prompts, _NOTHING, _NOTHING, _NOTHING).to(device)
    attend = FlatAttention(layout, store=True)
    hidden = lm.get_decoder()(
        input_ids=layout.ids[None], position_ids=layout.positions[None], attend=attend, use_cache=False
    ).last_hidden_state[0]
    return hidden[layout.prompt_lengths.cumsum(0) - 1], attend.stored


def _logits(
    lm: PreTrainedModel, token: Tensor, at: Tensor, cache: FlatCache | SharedCache, decoder: FusedDecoder | None
) -> Tensor:
    """(lines, V) logits behind a token (lines,) at these positions (lines,)."""
    if decoder is not None:
        return decoder(token, at, cache)
    hidden = lm.get_decoder()(
        input_ids=token[:, None], position_ids=at[:, None], attend=cache, use_cache=False
    ).last_hidden_state[:, 0]
    return lm.get_output_embeddings()(hidden)


def _padded(flat: Tensor, length: Tensor) -> Tensor:
    """(S, …) rows of sequences one behind the other → (P, width, …), anything behind a sequence's end."""
    width = int(length.max())
    place = (length.cumsum(0) - length)[:, None] + torch.arange(width)
    place = place.clamp_(max=len(flat) - 1).flatten().to(flat.device)
    return flat[place].unflatten(0, (len(length), width))


def _unseen(length: Tensor, width: int, like: Tensor) -> Tensor:
    """(B, width) 0 before each length, −inf from there on."""
    unseen = torch.arange(width, device=length.device) >= length[:, None]
    return like.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))


def _wider(x: Tensor, width: int) -> Tensor:
    """(B, heads, columns, D) with zeros behind its columns."""
    wide = x.new_empty(x.shape[0], x.shape[1], width, x.shape[3])
    wide[:, :, : x.shape[2]] = x
    wide[:, :, x.shape[2] :] = 0
    return wide


def _together(first: Tensor, second: Tensor) -> Tensor:
    """Both, one behind the other, the narrower one widened."""
    width = max(first.shape[2], second.shape[2])
    return torch.cat([_wider(x, width) for x in (first, second)])

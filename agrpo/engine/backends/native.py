"""The native sampler: each prompt is read once for all its samples, finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from agrpo.engine.attention import FlatAttention
from agrpo.engine.backends.sampling import draw, uniforms
from agrpo.engine.layout import build_layout
from agrpo.types import Prompt, Rollout

_COMPACT_AT = 0.75  # finished rows are dropped when fewer than this share of the rows still live


@dataclass(frozen=True)
class Sampling:
    """How to sample. `greedy` takes the most likely token and ignores temperature and top_p."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False


class NativeBackend:
    """Samples from a transformers model in place.

    Args:
        lm: the model. One routed through flat attention decodes on the static cache below; any other on transformers'
            own cache.
        flat: whether it is.
        tokenizer: decodes the texts.
        stop: token ids that end a completion.
        max_sequences: completions that decode together.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        flat: bool,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[int],
        max_sequences: int,
    ) -> None:
        self.lm, self.flat, self.tokenizer, self.max_sequences = lm, flat, tokenizer, max_sequences
        self.stop = torch.tensor(list(stop))
        self.weight_version = 0

    def follow(self, weight_version: int) -> None:
        self.weight_version = weight_version

    def rest(self) -> None:
        """It holds nothing between two calls."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int = 0,
    ) -> Rollout:
        """Sample counts[p] completions of prompt p, its samples first, first + 1, …; `key` is (seed, step)."""
        device = self.lm.get_input_embeddings().weight.device
        group = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))  # (N,)
        streams = [
            (p.slot, sample) for p, count in zip(prompts, counts, strict=True) for sample in range(first, first + count)
        ]
        random = None if sampling.greedy else uniforms(key, streams, sampling.max_completion_length).to(device)
        rows = torch.arange(len(group)).split(self.max_sequences)
        parts = [self._decode(prompts, group[r], None if random is None else random[r], sampling, device) for r in rows]
        tokens, logp, lengths, finished = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        texts = self.tokenizer.batch_decode(
            [t.tolist() for t in tokens.split(lengths.tolist())], skip_special_tokens=True
        )
        return Rollout(
            prompts=tuple(prompts),
            group=group,
            lengths=lengths,
            tokens=tokens,
            logp=logp,
            finished=finished,
            texts=tuple(texts),
            weight_version=self.weight_version,
        )

    def _decode(
        self, prompts: Sequence[Prompt], group: Tensor, random: Tensor | None, sampling: Sampling, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (C,), log-probabilities (C,), lengths (N,) and finished (N,) of one batch of rows."""
        rows, limit = len(group), sampling.max_completion_length
        own, which = group.unique(return_inverse=True)
        start = _FlatCache.prefill if self.flat else _PlainCache.prefill
        cache, logits = start(self.lm, [prompts[p].ids for p in own.tolist()], which.to(device), limit, device)
        stop = self.stop.to(device)
        tokens = torch.zeros(rows, limit, dtype=torch.long, device=device)
        logp = torch.zeros(rows, limit, device=device)
        length = torch.full((rows,), limit, device=device)
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        live = torch.arange(rows, device=device)  # the row that each line of the batch belongs to
        for t in range(limit):
            token, token_logp = draw(
                logits, None if random is None else random[live, t], sampling.temperature, sampling.top_p
            )
            tokens[live, t], logp[live, t] = token, token_logp
            ended = torch.isin(token, stop) & ~done[live]
            length[live[ended]] = t + 1
            done[live[ended]] = True
            running = ~done[live]
            count = int(running.sum())
            if count == 0 or t == limit - 1:
                break
            if count < _COMPACT_AT * len(live):
                keep = running.nonzero()[:, 0]
                live, token = live[keep], token[keep]
                cache.keep(keep)
            logits = cache.step(self.lm, token)
        real = torch.arange(limit, device=device) < length[:, None]
        return tokens[real], logp[real], length, done


class _FlatCache:
    """Static keys and values, prompts aligned at their ends, for models routed through `attend`."""

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], mask: Tensor | None, positions: Tensor, used: int
    ) -> None:
        self.keys, self.values = keys, values  # a layer: (rows, key heads, prompt width + limit, D)
        self.mask = mask  # (rows, prompt width + limit) 0 or −inf; None where no prompt is padded
        self.positions, self.used, self.rows = positions, used, len(positions)

    @classmethod
    def prefill(
        cls, lm: PreTrainedModel, prompts: list[tuple[int, ...]], which: Tensor, limit: int, device: torch.device
    ) -> tuple[_FlatCache, Tensor]:
        """Read each prompt once; row r continues prompts[which[r]]. Returns cache and first (rows, V) logits."""
        nothing = torch.zeros(0, dtype=torch.long)
        layout = build_layout(prompts, nothing, nothing, nothing).to(device)
        attend = FlatAttention(layout, store=True)
        hidden = lm.get_decoder()(
            input_ids=layout.ids[None], position_ids=layout.positions[None], attend=attend, use_cache=False
        ).last_hidden_state[0]
        length = layout.prompt_lengths
        end = length.cumsum(0)
        width = int(length.max())
        column = torch.arange(width, device=device) - (width - length)[:, None]  # (P, width) place in its prompt
        place = ((end - length)[:, None] + column.clamp(min=0)).flatten()
        keys, values = [], []
        for layer in range(len(attend.stored)):
            for stored, store in zip(attend.stored[layer], (keys, values), strict=True):
                padded = stored[place].unflatten(0, (len(prompts), width)).transpose(1, 2)  # (P, key heads, width, D)
                room = padded.new_empty(len(which), padded.shape[1], width + limit, padded.shape[3])
                room[:, :, :width] = padded[which]
                store.append(room)
            attend.stored[layer] = None
        mask = None
        if int(length.min()) < width:
            mask = torch.zeros(len(which), width + limit, dtype=hidden.dtype, device=device)
            mask[:, :width].masked_fill_((column < 0)[which], float("-inf"))
        logits = lm.get_output_embeddings()(hidden[end - 1])[which]
        return cls(keys, values, mask, length[which], width), logits

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query (rows, heads, 1, D), key and value (rows, key heads, 1, D) → (rows, 1, heads, D)."""
        rows, heads, _, size = query.shape
        k, v, now = self.keys[layer], self.values[layer], self.used
        k[:rows, :, now], v[:rows, :, now] = key[:, :, 0], value[:, :, 0]
        shared = heads // key.shape[1]  # query heads of a key head become query positions: no copy of the keys
        mask = None if self.mask is None else self.mask[:rows, None, None, : now + 1].expand(-1, 1, shared, -1)
        out = F.scaled_dot_product_attention(
            query.reshape(rows, -1, shared, size),
            k[:rows, :, : now + 1],
            v[:rows, :, : now + 1],
            attn_mask=mask,
            scale=scale,
        )
        return out.reshape(rows, 1, heads, size)

    def step(self, lm: PreTrainedModel, token: Tensor) -> Tensor:
        """Append one (rows,) token and return the next (rows, V) logits."""
        hidden = lm.get_decoder()(
            input_ids=token[:, None], position_ids=self.positions[:, None], attend=self, use_cache=False
        ).last_hidden_state[:, 0]
        self.positions, self.used = self.positions + 1, self.used + 1
        return lm.get_output_embeddings()(hidden)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these, in place."""
        self.positions = self.positions[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]
        for store in (self.keys, self.values):
            for room in store:
                room[: len(rows), :, : self.used] = room[rows, :, : self.used]


class _PlainCache:
    """transformers' own cache and attention, prompts padded on the left: for every other family."""

    def __init__(self, cache: DynamicCache, mask: Tensor) -> None:
        self.cache, self.mask = cache, mask  # (rows, tokens so far) 1 where real

    @classmethod
    def prefill(
        cls, lm: PreTrainedModel, prompts: list[tuple[int, ...]], which: Tensor, limit: int, device: torch.device
    ) -> tuple[_PlainCache, Tensor]:
        width = max(len(ids) for ids in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache = DynamicCache(config=lm.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = lm(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(which)
        return cls(cache, mask[which]), output.logits[:, -1][which]

    def step(self, lm: PreTrainedModel, token: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        output = lm(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

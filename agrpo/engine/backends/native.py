"""The native sampler: each prompt is read once for all its samples, finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from agrpo.config import SamplingConfig
from agrpo.engine import distributed
from agrpo.engine.attention import FlatAttention
from agrpo.engine.backends.decoder import FusedDecoder, can_fuse
from agrpo.engine.backends.sampling import draw, uniforms
from agrpo.engine.backends.stopping import StopStrings
from agrpo.engine.layout import build_layout
from agrpo.types import Ended, Prompt, Rollout

_COMPACT_AT = 0.75  # lines that have ended are dropped when fewer than this share of the lines still run
_GROWTH = 32  # columns of keys and values that are added at a time where products read them whole
_REFILL_AT = 0.25  # waiting completions take the lines that have ended once these are this share

_Tell = Callable[[list[int], list[list[int]], list[bool]], None]  # places, tokens and finished of those that ended


@dataclass(frozen=True)
class Sampling:
    """How to sample. `greedy` takes the most likely token: temperature and filters then change nothing."""

    max_completion_length: int
    temperature: float = 1.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # strings that end a completion
    greedy: bool = False

    @classmethod
    def of(cls, config: SamplingConfig) -> Sampling:
        return cls(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            stop=tuple(config.stop),
        )


class NativeBackend:
    """Samples from a transformers model in place.

    Args:
        lm: the model. One routed through flat attention decodes on the static cache below; any other on transformers'
            own cache.
        flat: whether it is.
        tokenizer: decodes the texts.
        stop: token ids that end a completion.
        max_sequences: completions that decode together.
        fused: decode on joined copies of the weights where the model allows it, on the flat path alone.
        in_step: the weights are shards that every forward gathers from all ranks (ZeRO-3): a rank whose completions
            have ended runs along with the others, and every rank must make the same calls of `generate`.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        flat: bool,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[int],
        max_sequences: int,
        fused: bool = True,
        in_step: bool = False,
    ) -> None:
        self.in_step = in_step
        self.lm, self.flat, self.tokenizer, self.max_sequences = lm, flat, tokenizer, max_sequences
        self.stop = torch.tensor(list(stop))
        self.weight_version = 0
        self._fuses = fused and flat and can_fuse(lm)

    def follow(self, weight_version: int) -> None:
        self.weight_version = weight_version

    def rest(self) -> None:
        """It holds nothing between two calls."""

    def shrink(self) -> bool:
        """Half as many completions decode together: each still draws what it would have drawn."""
        self.max_sequences //= 2
        return self.max_sequences >= 1

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int = 0,
        ended: Ended | None = None,
    ) -> Rollout:
        """Sample counts[p] completions of prompt p, its samples first, first + 1, …; `key` is (seed, step).

        `ended` is told of completions as they end.
        """
        device = self.lm.get_input_embeddings().weight.device
        group = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))  # (N,)
        streams = [
            (p.slot, sample) for p, count in zip(prompts, counts, strict=True) for sample in range(first, first + count)
        ]
        random = None if sampling.greedy else uniforms(key, streams, sampling.max_completion_length).to(device)
        batches = [torch.arange(len(group))] if self.flat else torch.arange(len(group)).split(self.max_sequences)
        if self.in_step:
            more = distributed.max_over_ranks(len(batches)) - len(batches)
            batches = [*batches, *[torch.zeros(0, dtype=torch.long)] * more]

        def tell(rows: Tensor, places: list[int], ids: list[list[int]], finished: list[bool]) -> None:
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            ended(rows[places].tolist(), ids, texts, finished)

        parts = [
            self._decode(
                prompts, group[r], None if random is None else random[r], sampling, device, ended and partial(tell, r)
            )
            for r in batches
        ]
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
        self,
        prompts: Sequence[Prompt],
        group: Tensor,
        random: Tensor | None,
        sampling: Sampling,
        device: torch.device,
        tell: _Tell | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (C,), log-probabilities (C,), lengths (N,) and finished (N,) of some completions.

        A line of the batch holds one completion after another: those that wait take the lines of those that ended.
        """
        ids = [prompts[p].ids for p in group.tolist()]
        completions = _Completions(len(ids), random, sampling, self.stop.to(device), self.tokenizer, device, tell)
        lines = min(len(ids), self.max_sequences)
        kind = _FlatCache if self.flat else _PlainCache
        longest = max(map(len, ids), default=0) + sampling.max_completion_length
        cache = kind(lines, longest, self._fuses, device)
        row = torch.zeros(lines, dtype=torch.long)  # the completion in each line
        running = torch.zeros(lines, dtype=torch.bool)
        token = torch.zeros(lines, dtype=torch.long, device=device)  # its last
        began = 0
        decoder = FusedDecoder(self.lm, lines) if self._fuses else None  # copies of the weights as they are now
        while True:
            alive, waiting = int(running.sum()), len(ids) - began
            if not self._anyone_goes_on(alive + waiting > 0):
                break
            if alive + waiting == 0:
                cache.idle(self.lm, device)
                continue
            if waiting and len(row) - alive >= min(waiting, _REFILL_AT * lines):
                places = (~running).nonzero()[:waiting, 0]
                row[places] = torch.arange(began, began + len(places))
                logits = cache.join(self.lm, ids[began : began + len(places)], places.to(device))
                token[places.to(device)], running[places] = completions.draw(row[places], logits)
                began += len(places)
                continue  # a first token may be the last one
            if not waiting and alive < _COMPACT_AT * len(row):
                on = running.nonzero()[:, 0]
                row, token, running = row[on], token[on.to(device)], running[on]
                cache.keep(on.to(device))
            logits = cache.step(self.lm, token, running, decoder)
            if alive == len(row):
                token, running = completions.draw(row, logits)
            else:
                on = running.nonzero()[:, 0]
                token[on.to(device)], running[on] = completions.draw(row[on], logits[on.to(device)])
        return completions.result()

    def _anyone_goes_on(self, this_rank: bool) -> bool:
        """Each turn of the loop is one forward: in step, all ranks take it as long as one of them has work."""
        return bool(distributed.max_over_ranks(int(this_rank))) if self.in_step else this_rank


class _Completions:
    """The tokens of some completions so far, and how to draw the next.

    Lengths are kept on the host, where the loop decides what runs: one wait for the device a step.
    """

    def __init__(
        self,
        rows: int,
        random: Tensor | None,
        sampling: Sampling,
        stop: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        tell: _Tell | None,
    ) -> None:
        self.random, self.sampling, self.stop, self.device, self.tell = random, sampling, stop, device, tell
        self.tokens = torch.zeros(rows, sampling.max_completion_length, dtype=torch.long, device=device)
        self.logp = torch.zeros(rows, sampling.max_completion_length, device=device)
        self.length = torch.zeros(rows, dtype=torch.long)
        self.finished = torch.zeros(rows, dtype=torch.bool)
        self.strings = StopStrings(tokenizer, sampling.stop, rows) if sampling.stop else None

    def draw(self, row: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of these rows (B,) from their (B, V) logits, and on the host whether they go on."""
        how, at = self.sampling, self.length[row]
        place = row.to(self.device), at.to(self.device)
        uniform = None if self.random is None else self.random[place]
        token, logp = draw(logits, uniform, how.temperature, how.top_k, how.top_p, how.min_p)
        self.tokens[place], self.logp[place] = token, logp
        ended = torch.isin(token, self.stop).cpu()
        if self.strings is not None:
            ended |= torch.tensor(self.strings.ended(row.tolist(), token.tolist()))
        self.length[row], self.finished[row] = at + 1, ended
        goes_on = ~ended & (at + 1 < how.max_completion_length)
        if self.tell is not None and len(over := row[~goes_on].tolist()):
            ids = [self.tokens[n, : self.length[n]].tolist() for n in over]
            self.tell(over, ids, self.finished[over].tolist())
        return token, goes_on

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        real = (torch.arange(self.tokens.shape[1]) < self.length[:, None]).to(self.device)
        return self.tokens[real], self.logp[real], self.length, self.finished


class _FlatCache:
    """Keys and values of each line from its first column on, for models routed through `attend`.

    A line is written where its own completion stands, so a new one can begin in it at any time.
    """

    def __init__(self, lines: int, columns: int, fused: bool, device: torch.device) -> None:
        self.lines, self.columns = lines, columns
        self._products = fused and device.type == "cpu"  # attention as products: for one token the kernels are slow
        # Products read whole rooms, as a part of one would be copied first: there they grow with the completions.
        self._width, self._block = (0, _GROWTH) if self._products else (columns, columns)
        self.at = torch.zeros(lines, dtype=torch.long)  # on the host: the column where each line goes on
        self.mask: Tensor | None = None  # (lines, columns) 0 where seen, else −inf
        self.keys: list[Tensor] = []  # a layer: (lines, key heads, columns, D)
        self.values: list[Tensor] = []

    def join(self, lm: PreTrainedModel, ids: list[tuple[int, ...]], places: Tensor) -> Tensor:
        """Read prompts, each once however often it is asked for, into these lines; returns their (B, V) logits."""
        device = places.device
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(ids))}
        which = torch.tensor([number[prompt] for prompt in ids], device=device)
        nothing = torch.zeros(0, dtype=torch.long)
        layout = build_layout(list(number), nothing, nothing, nothing).to(device)
        attend = FlatAttention(layout, store=True)
        hidden = lm.get_decoder()(
            input_ids=layout.ids[None], position_ids=layout.positions[None], attend=attend, use_cache=False
        ).last_hidden_state[0]
        length = layout.prompt_lengths
        end = length.cumsum(0)
        width = int(length.max())
        self._reach(width)
        column = torch.arange(width, device=device)
        place = ((end - length)[:, None] + column).clamp(max=len(layout.ids) - 1).flatten()  # behind its end: any
        for layer, both in enumerate(attend.stored):
            for stored, store in zip(both, (self.keys, self.values), strict=True):
                padded = stored[place].unflatten(0, (len(number), width)).transpose(1, 2)  # (P, key heads, width, D)
                if layer == len(store):
                    store.append(self._room(padded, turned=store is self.keys))
                store[layer][places, :, :width] = padded[which]
            attend.stored[layer] = None
        self.at[places.cpu()] = layout.prompt_lengths.cpu()[which.cpu()]
        if self.mask is None:
            self.mask = hidden.new_zeros(self.lines, self.columns)
        unseen = torch.arange(self.columns, device=device) >= length[which][:, None]
        self.mask[places] = hidden.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))
        return lm.get_output_embeddings()(hidden[end - 1])[which]

    def _room(self, like: Tensor, turned: bool) -> Tensor:
        """(lines, key heads, width, D) zeros; keys for plain products lie with their columns side by side."""
        if turned and self._products:
            return like.new_zeros(self.lines, like.shape[1], like.shape[3], self._width).transpose(2, 3)
        return like.new_zeros(self.lines, like.shape[1], self._width, like.shape[3])

    def _reach(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns <= self._width:
            return
        self._width = min(self.columns, -(-columns // self._block) * self._block)
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = self._room(old, turned=store is self.keys)
                store[layer][:, :, : old.shape[2]] = old

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query (lines, heads, 1, D), key and value (lines, key heads, 1, D) → (lines, 1, heads, D)."""
        lines, heads, _, size = query.shape
        k, v = self.keys[layer], self.values[layer]
        k[self._now], v[self._now] = key[:, :, 0], value[:, :, 0]
        shared = heads // key.shape[1]  # query heads of a key head become query positions: no copy of the keys
        q, k, v = query.reshape(lines, -1, shared, size), k[:lines, :, : self._used], v[:lines, :, : self._used]
        mask = None if self._seen is None else self._seen.expand(-1, 1, shared, -1)
        if self._products:
            scores = (q @ k.transpose(2, 3)).mul_(size**-0.5 if scale is None else scale)
            p = (scores if mask is None else scores.add_(mask)).softmax(-1, dtype=torch.float32)
            return (p.to(v.dtype) @ v).reshape(lines, 1, heads, size)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(lines, 1, heads, size)

    def step(self, lm: PreTrainedModel, token: Tensor, running: Tensor, decoder: FusedDecoder | None) -> Tensor:
        """Append a token (lines,) to each line and return the next (lines, V) logits: any where none is running."""
        self.at[~running] = 0  # what is written there is never read
        at, line = self.at.to(token.device), torch.arange(len(self.at), device=token.device)
        self.mask[line, at] = 0
        own = self.at[running]
        used = int(own.max()) + 1
        self._reach(used)
        self._used = self._width if self._products else used
        even = bool((own == own[0]).all())
        self._now = (slice(0, len(line)), slice(None), int(own[0])) if even else (line, slice(None), at)
        self._seen = None if even and used == self._used else self.mask[: len(line), None, None, : self._used]
        self.at = self.at + 1  # a new tensor: `at` is the old one
        if decoder is not None:
            return decoder(token, at, self)
        hidden = lm.get_decoder()(
            input_ids=token[:, None], position_ids=at[:, None], attend=self, use_cache=False
        ).last_hidden_state[:, 0]
        return lm.get_output_embeddings()(hidden)

    def idle(self, lm: PreTrainedModel, device: torch.device) -> None:
        """A forward for nothing, through the modules of `join` and `step`: the other ranks gather weights with it."""
        nothing = torch.zeros(0, dtype=torch.long)
        layout = build_layout([(0,)], nothing, nothing, nothing).to(device)
        states = lm.get_decoder()(
            input_ids=layout.ids[None],
            position_ids=layout.positions[None],
            attend=FlatAttention(layout),
            use_cache=False,
        )
        lm.get_output_embeddings()(states.last_hidden_state[0])

    def keep(self, places: Tensor) -> None:
        """Drop every line but these, in place."""
        self.at = self.at[places.cpu()]
        used = int(self.at.max())
        self.mask = self.mask[places]
        for store in (self.keys, self.values):
            for room in store:
                room[: len(places), :, :used] = room[places, :, :used]


class _PlainCache:
    """transformers' own cache and attention, prompts padded on the left: for every other family. Filled once."""

    def __init__(self, lines: int, columns: int, fused: bool, device: torch.device) -> None:
        self.mask = torch.zeros(lines, 0)  # (lines, tokens so far) 1 where real

    def join(self, lm: PreTrainedModel, ids: list[tuple[int, ...]], places: Tensor) -> Tensor:
        """Read prompts, each once however often it is asked for; returns their (lines, V) logits."""
        device = places.device
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(ids))}
        which = torch.tensor([number[prompt] for prompt in ids], device=device)
        width = max(map(len, number))
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in number], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in number], device=device)
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

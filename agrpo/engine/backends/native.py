"""The native sampler: each prompt is read once for all its samples, finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agrpo.config import SamplingConfig
from agrpo.engine import distributed
from agrpo.engine.backends.caches import FlatCache, PlainCache, SharedCache
from agrpo.engine.backends.decoder import FusedDecoder, can_fuse
from agrpo.engine.backends.sampling import draw, uniforms
from agrpo.engine.backends.stopping import StopStrings
from agrpo.types import Ended, Prompt, Rollout

_COMPACT_AT = 0.75  # lines that have ended are dropped when fewer than this share of the lines still run
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
        longest = max(map(len, ids), default=0)
        cache = self._cache(device)(lines, longest, sampling.max_completion_length, device)
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

    def _cache(self, device: torch.device) -> type[FlatCache | SharedCache | PlainCache]:
        if not self.flat:
            return PlainCache
        return SharedCache if self._fuses and device.type == "cpu" else FlatCache

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

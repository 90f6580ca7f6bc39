"""DeepSpeed's own Hybrid Engine: it generates from the training engine by kernels that take its layers' place.

Those kernels serve few models, and where they do not fit they garble weights or text without an error. So a probe asks
before `deepspeed.initialize` whether they can be sound, and a self-test compares what they generate with the native
sampler. Whatever speaks against them is named, and the native sampler generates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from agrpo.engine import distributed
from agrpo.engine.attention import NAME
from agrpo.engine.backends.native import NativeBackend, Sampling
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy, causal_lm
from agrpo.types import Prompt, Rollout

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # nats between tokens that tie
SELF_TEST_TOKENS = 32  # of its longest prompt and completion
_TESTED_TOKENS = 8  # of each completion of the self-test


class Kernels(Protocol):
    """`zero.KernelRollout`: prompts padded on the left, their mask, a length → (B, length) tokens."""

    def __call__(self, ids: Tensor, mask: Tensor, length: int, **sampling: Any) -> Tensor: ...


def why_not_sound(lm: nn.Module, zero_stage: int, layers: Collection[type], cuda: bool | None = None) -> list[str]:
    """All that speaks against DeepSpeed's kernels for a model, in words; empty where nothing is known to.

    Args:
        lm: the model as it will train, with its adapters. Its weights are not read.
        layers: the layer classes that the kernels replace (`zero.kernel_layers`).
        cuda: is there a CUDA device? By default this machine's.
    """
    found = []
    if not (torch.cuda.is_available() if cuda is None else cuda):
        found.append("its kernels need CUDA: on a CPU there are none")
    config = causal_lm(lm).config
    replaced = {type(module) for module in lm.modules()} & set(layers)
    if not replaced:
        found.append(f"it has no kernels for {config.model_type}")
    heads = getattr(config, "num_attention_heads", None)
    if replaced and getattr(config, "num_key_value_heads", None) not in (None, heads):
        found.append("it damages the weights of models with grouped-query attention")
    for layer in sorted(replaced, key=lambda one: one.__name__):
        if any(_is_cache(given) for given in inspect.signature(layer.forward).parameters.values()):
            found.append(
                f"its kernels return a tuple and keep a cache of their own, where {layer.__name__} of transformers"
                f" {transformers.__version__} returns a tensor and is given the cache"
            )
    if hasattr(lm, "disable_adapter"):
        found.append("it does not see LoRA's adapters")
    if zero_stage == 3:
        found.append("with ZeRO-3 it generates gibberish (open reports)")
    return found


def _is_cache(given: inspect.Parameter) -> bool:
    return given.name == "past_key_values" or "Cache" in str(given.annotation)


class DeepspeedBackend:
    """Samples by DeepSpeed's kernels from the engine's own weights, after a self-test; by the native sampler otherwise.

    The self-test runs before the first rollout and again before the first one with weights that a step has changed. If
    it fails on any rank, every rank falls back for good. Log-probabilities are the training forward's: DeepSpeed's
    interface returns tokens alone. It has neither min_p nor stop strings: calls with those go to the native sampler.

    Args:
        policy: what trains.
        kernels: generates; None where the probe refused.
        native: the sampler to fall back on.
        switch: called with True before the kernels generate and with False after.
        reason: why the probe refused.
        note: says, once, why the native sampler generates instead.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        kernels: Kernels | None,
        native: NativeBackend,
        switch: Callable[[bool], None] = lambda generating: None,
        reason: str | None = None,
        note: Callable[[str], None],
    ) -> None:
        self.policy, self.kernels, self.native, self._switch, self._note = policy, kernels, native, switch, note
        self.weight_version = 0
        self._tests: set[int] = set()  # the weight versions whose kernels have passed
        self._told: set[str] = set()
        self.reason = reason
        if kernels is None:
            self._fall_back(reason or "there is no such engine")

    def follow(self, weight_version: int) -> None:
        """Kernels read the weights in place; a new version is tested if only the first one has been."""
        self.weight_version = weight_version
        self.native.follow(weight_version)
        if self.kernels is not None and len(self._tests) < 2 and weight_version not in self._tests:
            failure = self.self_test()
            if distributed.max_over_ranks(int(failure is not None)):
                self._fall_back(failure or "the self-test failed on another rank")
            else:
                self._tests.add(weight_version)

    def rest(self) -> None:
        """It holds nothing of its own but the kernels' workspace, which DeepSpeed keeps."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int = 0,
    ) -> Rollout:
        """Sample counts[p] completions of each prompt.

        The same call draws the same completions; what one draws depends on what else is in the call.
        """
        if self.kernels is not None and (sampling.min_p or sampling.stop):
            self._say(
                "rollout.backend: deepspeed has neither min_p nor stop strings: native samples where they are set"
            )
        if self.kernels is None or sampling.min_p or sampling.stop:
            return self.native.generate(prompts, counts, sampling, key, first)
        seed = np.random.SeedSequence((*key, first, *(p.slot for p in prompts))).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng():
            torch.manual_seed(int(seed >> 2))
            return self._by_kernels(prompts, counts, sampling)

    @torch.no_grad()
    def _by_kernels(self, prompts: Sequence[Prompt], counts: Sequence[int], sampling: Sampling) -> Rollout:
        group = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))  # (N,)
        stop = self.native.stop
        ended, finished = [], []
        for rows in group.split(self.native.max_sequences):
            for tokens in self._complete([prompts[p].ids for p in rows.tolist()], sampling):
                at = torch.isin(tokens, stop).nonzero()
                ended.append(tokens[: int(at[0]) + 1] if len(at) else tokens)
                finished.append(bool(len(at)))
        lengths = torch.tensor([len(tokens) for tokens in ended], dtype=torch.long)
        tokens = torch.cat(ended) if ended else torch.zeros(0, dtype=torch.long)
        temperature = 1.0 if sampling.greedy else sampling.temperature
        return Rollout(
            prompts=tuple(prompts),
            group=group,
            lengths=lengths,
            tokens=tokens,
            logp=self._logprobs(prompts, group, lengths, tokens, temperature),
            finished=torch.tensor(finished, dtype=torch.bool),
            texts=tuple(self.native.tokenizer.batch_decode([t.tolist() for t in ended], skip_special_tokens=True)),
            weight_version=self.weight_version,
        )

    def _complete(self, ids: Sequence[Sequence[int]], sampling: Sampling) -> Tensor:
        """(B, length) tokens behind these prompts, as the kernels draw them."""
        width = max(map(len, ids))
        device = self.policy.head.device
        padded = torch.tensor([[0] * (width - len(p)) + list(p) for p in ids], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids], device=device)
        how = {"temperature": 0.0} if sampling.greedy else {"temperature": sampling.temperature}
        how |= {"top_k": sampling.top_k or -1, "top_p": sampling.top_p}
        self._switch(True)
        try:
            with _own_attention(causal_lm(self.policy.lm)):
                return self.kernels(padded, mask, sampling.max_completion_length, **how).cpu()
        finally:
            self._switch(False)

    def _logprobs(
        self, prompts: Sequence[Prompt], group: Tensor, lengths: Tensor, tokens: Tensor, temperature: float
    ) -> Tensor:
        """(C,) of the training forward, nats."""
        parts = [torch.zeros(0)]
        first = 0
        for rows in torch.arange(len(group)).split(self.native.max_sequences):
            count = int(lengths[rows].sum())
            asked, own = group[rows].unique(return_inverse=True)
            ids = [prompts[p].ids for p in asked.tolist()]
            layout = build_layout(ids, own, lengths[rows], tokens[first : first + count])
            parts.append(self.policy(layout.to(self.policy.head.device), temperature)[0].cpu())
            first += count
        return torch.cat(parts)

    # Self-test

    @torch.no_grad()
    def self_test(self) -> str | None:
        """Why the kernels do not generate as the policy does, or None when they do.

        Greedy completions of prompts of unequal length must be the native sampler's; where the two first differ, the
        training forward must hold both tokens equally likely, up to rounding.
        """
        vocabulary = self.policy.head.shape[0]
        ids = [tuple((7 * n * n + 3 * i) % vocabulary for i in range(2 + 5 * n)) for n in range(4)]
        prompts = [Prompt("", one, slot, {}) for slot, one in enumerate(ids)]
        greedy = Sampling(_TESTED_TOKENS, greedy=True)
        try:
            drawn = self._by_kernels(prompts, [1] * len(prompts), greedy)
        except Exception as error:  # whatever DeepSpeed raises: the reason is named, and the native sampler serves
            return f"its kernels do not run here: {type(error).__name__}: {error}"
        own = self.native.generate(prompts, [1] * len(prompts), greedy, (0, 0))
        pairs = zip(_completions(drawn), _completions(own), strict=True)
        for number, (theirs, expected) in enumerate(pairs):
            gap = self._gap(ids[number], theirs, expected)
            if not gap <= TOLERANCE[self.policy.head.dtype]:
                return (
                    f"its self-test failed: a greedy token is {gap:.3g} nats less likely under the training forward"
                    f" than the one that belongs there (weight version {self.weight_version})"
                )
        return None

    def _gap(self, prompt: tuple[int, ...], theirs: list[int], expected: list[int]) -> float:
        """Nats between the first tokens that differ, under the training forward; 0 where none does."""
        at = next((i for i, (a, b) in enumerate(zip(theirs, expected, strict=False)) if a != b), None)
        if at is None:
            return 0.0 if len(theirs) == len(expected) else float("inf")
        lengths = torch.tensor([at + 1, at + 1])
        both = torch.tensor([*theirs[: at + 1], *expected[: at + 1]])
        layout = build_layout([prompt], torch.zeros(2, dtype=torch.long), lengths, both)
        logp = self.policy(layout.to(self.policy.head.device))[0].cpu()
        return float((logp[2 * at + 1] - logp[at]).abs())

    def _fall_back(self, reason: str) -> None:
        self.kernels, self.reason = None, reason
        self._say(f"rollout.backend: deepspeed is not sound here: {reason}; native generates from the same engine")

    def _say(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            self._note(words)


def _completions(rollout: Rollout) -> list[list[int]]:
    return [tokens.tolist() for tokens in rollout.tokens.split(rollout.lengths.tolist())]


@contextmanager
def _own_attention(lm: Any) -> Iterator[None]:
    """The model's masks as transformers makes them: those of the flat layout are made elsewhere."""
    routed = lm.config._attn_implementation == NAME
    if routed:
        lm.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if routed:
            lm.config._attn_implementation = NAME

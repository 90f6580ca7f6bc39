"""Completions that are conversations: the policy's turns, sampled by any backend, and an environment's between them.

What was sampled is never decoded and encoded again: each turn continues the very tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agrpo.config import EnvironmentConfig
from agrpo.data.records import ROLES
from agrpo.data.tokens import encode_heard, rewrites_earlier_turns
from agrpo.engine import distributed
from agrpo.engine.backends.native import Sampling
from agrpo.engine.calls import Failed, call_together
from agrpo.types import Ended, Environment, InputError, Message, Prompt, Rollout, Step

_TOLD = 3  # failures that are told one by one
_MOST_HUNG = 8  # threads that never came back, before the run ends: they cost memory and time
_SAMPLES = 1 << 12  # of a prompt, at most: a later turn's random stream is keyed by prompt and sample in one number
_TURN = 1 << 24  # a turn's share of the step in the key: steps stay below it


class EnvironmentFailed(RuntimeError):
    """No conversation of a step came to an end, or an environment hangs again and again."""


class Samples(Protocol):
    """What samples a turn: the engine, or a backend alone."""

    weight_version: int

    def generate(
        self, prompts: Sequence[Prompt], counts: Sequence[int], sampling: Sampling, key: tuple[int, int], first: int = 0
    ) -> Rollout: ...


@dataclass
class _Conversation:
    """One sample of a prompt, and how far it is."""

    prompt: Prompt
    sample: int
    environment: Environment
    behind: list[int] = field(default_factory=list)  # all tokens behind the prompt
    tokens: list[int] = field(default_factory=list)  # those that were sampled
    gaps: list[int] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)  # without what no turn follows
    pending: list[int] = field(default_factory=list)  # heard since the last turn
    turns: list[Message] = field(default_factory=list)
    reward: float = 0.0  # NaN: the environment failed
    goes_on: bool = True
    finished: bool = False

    def say(self, tokens: Sequence[int], logp: Tensor, text: str) -> None:
        self.gaps += [len(self.pending), *[0] * (len(tokens) - 1)]
        self.heard += self.pending
        self.pending = []
        self.tokens += tokens
        self.behind += tokens
        self.logp.append(logp)
        self.turns.append({"role": "assistant", "content": text})

    def hear(self, tokens: Sequence[int]) -> None:
        self.pending = list(tokens)
        self.behind += tokens

    def as_prompt(self) -> Prompt:
        """What the next turn continues; its slot tells samples of a prompt apart."""
        if self.sample >= _SAMPLES or self.prompt.slot >= (1 << 32) // _SAMPLES:
            raise ValueError(f"sample {self.sample} of slot {self.prompt.slot}: too many for a conversation's streams")
        ids = (*self.prompt.ids, *self.behind)
        return Prompt(self.prompt.text, ids, self.prompt.slot * _SAMPLES + self.sample, {})


class Conversations:
    """Samples conversations of a policy with an environment, through the interface of a backend.

    `max_completion_length` of the sampling bounds all tokens behind the prompt, sampled and heard. A conversation is
    finished when the environment says so; one that runs out of tokens or turns is not. A conversation whose environment
    raises or takes too long ends there: its outcome is NaN, and nothing is learnt from it.

    Args:
        samples: what samples a turn.
        config: of the environment.
        make: makes one for a conversation.
        tokenizer: the policy's.
        in_step: every rank must make the same calls of `samples.generate` (`NativeBackend`).
        strict: the first environment that fails ends the run.
        note: where to say what a person should know.
    """

    def __init__(
        self,
        samples: Samples,
        config: EnvironmentConfig,
        make: Callable[[], Environment],
        tokenizer: PreTrainedTokenizerBase,
        *,
        in_step: bool = False,
        strict: bool = False,
        note: Callable[[str], None] = print,
    ) -> None:
        self.samples, self.config, self.make, self.tokenizer = samples, config, make, tokenizer
        self.in_step, self.strict, self.note = in_step, strict, note
        self._template_seen = False
        self._told = self._hung = 0
        self._reason = "it has none on this rank"  # of the last failure

    @property
    def weight_version(self) -> int:
        return self.samples.weight_version

    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int = 0,
        ended: Ended | None = None,
    ) -> Rollout:
        """counts[p] conversations of each prompt (`RolloutBackend.generate`); `ended` is not told of them."""
        talks = [
            _Conversation(prompt, sample, self.make())
            for prompt, count in zip(prompts, counts, strict=True)
            for sample in range(first, first + count)
        ]
        self._look_at_template(prompts)
        self._reset(talks, key)
        rollout = self.samples.generate(prompts, counts, sampling, key, first)  # prompts are read once for all samples
        group, version = rollout.group, rollout.weight_version
        speaking = talks
        for turn in range(1, self.config.max_turns + 1):
            self._take(speaking, rollout, sampling.max_completion_length)
            self._answer([t for t in speaking if t.goes_on], sampling.max_completion_length)
            speaking = [t for t in talks if t.goes_on]
            if turn == self.config.max_turns or not self._anyone(speaking):
                break
            asked, each = [t.as_prompt() for t in speaking], [1] * len(speaking)
            if not asked:  # nothing; other ranks may need this one's shards
                asked, each = list(prompts[:1]), [0] * len(prompts[:1])
            room = max((sampling.max_completion_length - len(t.behind) for t in speaking), default=1)
            how, now = replace(sampling, max_completion_length=room), (key[0], key[1] + turn * _TURN)
            rollout = self.samples.generate(asked, each, how, now)
        self._require_some(talks)
        return self._rollout(tuple(prompts), group, talks, version)

    def _look_at_template(self, prompts: Sequence[Prompt]) -> None:
        """Once: tell of a template through which a program would show the model less than it reads here."""
        if self._template_seen or not prompts:
            return
        self._template_seen = True
        text = prompts[0].text
        if not isinstance(text, str) and rewrites_earlier_turns(self.tokenizer, text):
            self.note(
                "the chat template leaves the reasoning out of earlier turns; here the policy reads all that it said"
            )

    def _anyone(self, speaking: Sequence[_Conversation]) -> bool:
        return bool(distributed.max_over_ranks(int(bool(speaking)))) if self.in_step else bool(speaking)

    def _take(self, talks: Sequence[_Conversation], rollout: Rollout, limit: int) -> None:
        """A turn of each conversation; one that is longer than it has room for is cut, and ends there."""
        lengths = rollout.lengths.tolist()
        parts = zip(rollout.tokens.split(lengths), rollout.logp.split(lengths), strict=True)
        for n, (talk, (tokens, logp)) in enumerate(zip(talks, parts, strict=True)):
            room, text, ended = limit - len(talk.behind), rollout.texts[n], bool(rollout.finished[n])
            if len(tokens) > room:
                tokens, logp, ended = tokens[:room], logp[:room], False
                text = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
            talk.say(tokens.tolist(), logp, text)
            talk.goes_on &= ended

    def _reset(self, talks: Sequence[_Conversation], key: tuple[int, int]) -> None:
        calls = []
        for talk in talks:
            seed = int(np.random.SeedSequence([*key, talk.prompt.slot, talk.sample]).generate_state(1)[0])
            calls.append(partial(_reset, talk.environment, {**talk.prompt.columns, "prompt": talk.prompt.text}, seed))
        for talk, outcome in zip(talks, self._call(calls), strict=True):
            if isinstance(outcome, Failed):
                self._fail(talk, "reset", outcome)

    def _answer(self, talks: Sequence[_Conversation], limit: int) -> None:
        calls = [partial(_step, talk.environment, talk.turns[-1]["content"]) for talk in talks]
        for talk, outcome in zip(talks, self._call(calls), strict=True):
            if isinstance(outcome, Failed):
                self._fail(talk, "step", outcome)
                continue
            talk.reward += float(outcome.reward)
            talk.goes_on, talk.finished = not outcome.done, outcome.done
            if not outcome.observation:
                continue
            role = "tool" if isinstance(talk.prompt.text, str) else "user"
            plain = isinstance(outcome.observation, str)
            talk.turns += [{"role": role, "content": outcome.observation}] if plain else outcome.observation
            if talk.goes_on:
                try:
                    heard = encode_heard(self.tokenizer, talk.prompt.text, outcome.observation, talk.behind[-1])
                except InputError as error:
                    raise InputError(f"environment {self.config.target}: {error}") from None
                talk.hear(heard)
                talk.goes_on = len(talk.behind) < limit

    def _call(self, calls: Sequence[Callable[[], Step | None]]) -> list[Step | Failed | None]:
        return call_together(calls, self.config.timeout_s, self.config.concurrency)

    def _fail(self, talk: _Conversation, method: str, failed: Failed) -> None:
        talk.reward, talk.goes_on, talk.finished = math.nan, False, False
        self._hung += failed.hung
        text = talk.prompt.text if isinstance(talk.prompt.text, str) else talk.prompt.text[-1]["content"]
        where = f"on the prompt {text[:80]!r} (slot {talk.prompt.slot}, sample {talk.sample})"
        self._reason = f"environment {self.config.target}: {method} failed {where}: {failed.reason}"
        if self._hung > _MOST_HUNG:
            raise EnvironmentFailed(f"{self._reason}; {self._hung} calls hang by now")
        if self.strict:
            raise EnvironmentFailed(self._reason)
        if self._told < _TOLD:
            self._told += 1
            last = "; further ones are only counted, in environment/errors" if self._told == _TOLD else ""
            self.note(f"{self._reason}; nothing is learnt from this conversation{last}")

    def _require_some(self, talks: Sequence[_Conversation]) -> None:
        """Of all ranks together, where they are in step."""
        sums = {"all": float(len(talks)), "failed": float(sum(math.isnan(talk.reward) for talk in talks))}
        if self.in_step:
            sums = distributed.sum_over_ranks(sums)
        if sums["all"] and sums["failed"] == sums["all"]:
            raise EnvironmentFailed(f"all {sums['all']:.0f} conversations failed; the last one: {self._reason}")

    def _rollout(
        self, prompts: tuple[Prompt, ...], group: Tensor, talks: Sequence[_Conversation], version: int
    ) -> Rollout:
        def flat(name: str) -> Tensor:
            return torch.tensor([value for talk in talks for value in getattr(talk, name)], dtype=torch.long)

        return Rollout(
            prompts=prompts,
            group=group,
            lengths=torch.tensor([len(talk.tokens) for talk in talks], dtype=torch.long),
            tokens=flat("tokens"),
            logp=torch.cat([torch.zeros(0), *(part for talk in talks for part in talk.logp)]),
            finished=torch.tensor([talk.finished for talk in talks], dtype=torch.bool),
            texts=tuple(
                ("" if isinstance(talk.prompt.text, str) else "\n").join(turn["content"] for turn in talk.turns)
                for talk in talks
            ),
            weight_version=version,
            heard=flat("heard"),
            gaps=flat("gaps"),
            turns=tuple(tuple(talk.turns) for talk in talks),
            outcomes=torch.tensor([talk.reward for talk in talks], dtype=torch.float32),
        )


def _reset(environment: Environment, row: dict, seed: int) -> None:
    first = environment.reset(row, seed)
    if first is not None:
        raise TypeError(
            f"reset gave {str(first)[:80]!r}: the first observation is the row's prompt, and reset gives None"
        )


def _step(environment: Environment, said: str) -> Step:
    step = environment.step(said)
    if not isinstance(step, Step):
        raise TypeError(f"step gave a {type(step).__name__}, not an agrpo.types.Step")
    if not math.isfinite(step.reward):
        raise ValueError(f"step gave the reward {step.reward}, not a finite number")
    if not step.observation and not step.done:
        raise ValueError("step gave no observation, and the conversation is not done")
    if not isinstance(step.observation, str):
        for message in step.observation:
            if message["role"] not in ROLES or not isinstance(message["content"], str):
                raise ValueError(f"step gave the message {str(message)[:80]}: write it as {{role, content}}")
    return step


def with_environment(
    samples: Samples,
    config: EnvironmentConfig | None,
    make: Callable[[], Environment] | None,
    tokenizer: PreTrainedTokenizerBase,
    **how: Any,
) -> Samples:
    """`Conversations` of what samples, or that itself where no environment answers."""
    return samples if config is None else Conversations(samples, config, make, tokenizer, **how)

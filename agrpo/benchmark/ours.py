"""Our contestant: stage 3's own step, on the engine that a run would have."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from agrpo.benchmark.work import Clock, Shape, Turns, Work, prompt_ids, reward_of
from agrpo.config import PolicyConfig
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.engine.modules import Policy, causal_lm
from agrpo.models import load_language_model, load_tokenizer
from agrpo.training.controllers import Controllers
from agrpo.training.experience import make_experience, prune
from agrpo.training.grouping import Sampler
from agrpo.training.samples import rollout_metrics
from agrpo.training.update import update_policy
from agrpo.types import Prompt


class _Rewards:
    """The one reward of the benchmark, as a set."""

    names = ("benchmark",)
    weights = torch.ones(1)

    def begin(self, prompts: Any, columns: Any) -> None: ...

    def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any, early: None = None) -> Tensor:
        return torch.tensor([[reward_of(ids)] for ids in completion_ids])

    def shaped(self, scores: Tensor) -> Tensor:
        return scores

    def observe(self, scores: Tensor) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def take_errors(self) -> dict[str, int]:
        return {}

    def total(self, scores: Tensor) -> Tensor:
        return scores[:, 0]


def configuration(work: Work) -> PolicyConfig:
    """GRPO's: one update a rollout, a fixed β, and nothing that adapts."""
    return PolicyConfig.model_validate(
        {
            "model": {"name_or_path": work.model, "dtype": work.dtype},
            "data": {"source": "python:agrpo.data.tasks.instructions:prompts"},
            "training": {
                "max_steps": work.steps,
                "learning_rate": work.learning_rate,
                "micro_batch_tokens": work.micro_batch_tokens,
            },
            "sampling": {
                "num_generations": work.group,
                "prompts_per_step": work.prompts,
                "max_prompt_length": max(512, work.prompt_tokens),
                "max_completion_length": work.completion_tokens,
            },
            "objective": {"kl": "forward" if work.beta else "none", "beta": work.beta, "updates_per_rollout": 1},
            "controllers": {
                "beta": {"kind": "fixed"},
                "epsilon": {"kind": "fixed"},
                "lambda": {"kind": "fixed", "value": 0.0},
            },
            "advantage": {"kind": "group"},
            "pruning": {"rate": work.pruned},
            "engine": {"zero_stage": 1 if work.dtype == "bfloat16" else 0, "fast": not work.plain},
            "rewards": [{"target": "agrpo.benchmark.work.reward_of"}],
        }
    )


def run(work: Work) -> None:
    """Takes its turns until the referee hangs up or the steps are done."""
    clock = Clock()
    turns = Turns(work.steps, clock)
    config = configuration(work)
    tokenizer, _ = load_tokenizer(config.model)
    lm = load_language_model(config.model, tokenizer, config.seed)
    shape = Shape.of(lm)
    engine = HybridEngine(
        Policy(lm),
        engine=config.engine,
        training=config.training,
        tokenizer=tokenizer,
        stop=(),  # end tokens are ignored
        rollout=config.rollout,
        longest=config.longest_sequence,
        dtype=config.model.dtype,
        with_reference=config.needs_reference,
    )
    controllers, rewards = Controllers(config), _Rewards()
    asked = [prompt_ids(work, tokenizer, causal_lm(lm).config.vocab_size, step) for step in range(work.steps)]
    prompts = [Prompt("", tuple(ids), 0, {}) for of_step in asked for ids in of_step]
    rank, world = distributed.rank(), distributed.world()
    stream = iter(
        [(slot, step * work.prompts + slot) for slot in range(rank, work.prompts, world)] for step in range(work.steps)
    )
    sample = Sampler(config, prompts, stream, rewards)
    for method, phase in (
        ("generate", "generation"),
        ("reference_logprobs", "reference"),
        ("forward", "forward"),
        ("backward", "backward"),
        ("step", "optimiser"),
        ("generation_mode", "sync"),
    ):
        clock.wrap(engine, method, phase)
    turns.tell("ready", shape=vars(shape), name="agrpo", settings={"engine": config.engine.model_dump(mode="json")})
    for step in range(work.steps):
        turns.wait()
        profile = _trace() if work.trace and step == work.steps - 1 else None
        rollout, scores, metrics = sample(engine, step)
        experience = make_experience(engine, rollout, scores, rewards, config, work.beta)
        kept = prune(experience, config.pruning)
        metrics |= update_policy(engine, kept, controllers.coefficients(), config, work.learning_rate)
        metrics |= rollout_metrics(experience, rewards)
        if profile is not None:
            profile.__exit__(None, None, None)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40), file=sys.stderr)
        turns.done(
            prompts=_of_all([len(p.ids) for p in rollout.prompts]),
            lengths=_of_all(rollout.lengths.tolist()),
            kept=len(_of_all(kept.rollout.lengths.tolist())),
            kl=metrics["kl"],
            entropy=metrics["entropy"],
            grad_norm=metrics["grad_norm"],
        )


def _of_all(values: list[int]) -> list[int]:
    return [value for own in distributed.gather_objects(values) for value in own]


def _trace() -> Any:
    from torch.profiler import profile

    return profile().__enter__()

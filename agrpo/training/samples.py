"""What a step looked like: its metrics beside the update's, and samples a person can read."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from agrpo.algorithms.advantages import zero_signal_fraction
from agrpo.algorithms.segments import segment_sum
from agrpo.engine import distributed
from agrpo.engine.memory import peak_memory
from agrpo.evaluation.policy import PolicyEvaluation
from agrpo.reporting.files import to_json
from agrpo.training.scoring import Scores
from agrpo.training.session import Session
from agrpo.types import Experience


def rollout_metrics(experience: Experience, rewards: Scores, seconds: float) -> dict[str, float]:
    """Of a step's rollout before pruning, over all ranks; `seconds` are the whole step's."""
    rollout, total, scores = experience.rollout, experience.rewards, experience.scores
    scored = torch.isfinite(total)
    finite = total[scored].double()
    errors, told = rewards.take_errors(), rewards.metrics()
    sums = distributed.sum_over_ranks(
        {
            "reward": finite.sum(),
            "square": finite.square().sum(),
            "scored": len(finite),
            "completions": len(total),
            "tokens": len(rollout.tokens),
            "finished": rollout.finished.sum(),
            "advantage": _of_completions(experience).square().sum(),
            "groups": len(rollout.prompts),
            "silent": zero_signal_fraction(total, rollout.group) * len(rollout.prompts),
            "errors": sum(errors.values()),
            **{f"sum/{name}": scores[:, k].nansum() for k, name in enumerate(rewards.names)},
            **{f"count/{name}": scores[:, k].isfinite().sum() for k, name in enumerate(rewards.names)},
            **{f"told/{key}": value for key, value in told.items()},
        }
    )
    mean = sums["reward"] / max(1, sums["scored"])
    return {
        "reward": mean,
        "reward_std": max(0.0, sums["square"] / max(1, sums["scored"]) - mean**2) ** 0.5,
        **{f"rewards/{name}/mean": sums[f"sum/{name}"] / max(1, sums[f"count/{name}"]) for name in rewards.names},
        **{f"rewards/{key}": sums[f"told/{key}"] / distributed.world() for key in told},
        "reward/errors": sums["errors"],
        "completions/mean_length": sums["tokens"] / sums["completions"],
        "completions/clipped_ratio": 1 - sums["finished"] / sums["completions"],
        "frac_reward_zero_std": sums["silent"] / sums["groups"],
        "agrpo/advantage_variance": sums["advantage"] / sums["completions"],
        "num_tokens": sums["tokens"],
        "time/step_s": seconds,
        "throughput/completion_tokens_per_s": sums["tokens"] / seconds,
        "memory/peak_gib": distributed.max_over_ranks(peak_memory()) / 2**30,
    }


def _of_completions(experience: Experience) -> Tensor:
    """(N,) advantage of each completion: the mean over its tokens."""
    lengths = experience.rollout.lengths
    return segment_sum(experience.advantages, lengths) / lengths


def sample_rows(experience: Experience, rewards: Scores, count: int) -> list[dict[str, Any]]:
    """The first completions of the step: prompt, completion, each reward, advantage."""
    rollout, advantages = experience.rollout, _of_completions(experience)
    return [
        {
            "prompt": rollout.prompts[int(rollout.group[n])].text,
            "completion": rollout.texts[n],
            "rewards": dict(zip(rewards.names, experience.scores[n].tolist(), strict=True)),
            "reward": float(experience.rewards[n]),
            "advantage": float(advantages[n]),
            "tokens": int(rollout.lengths[n]),
        }
        for n in range(min(count, len(rollout.texts)))
    ]


def write_evaluation(session: Session, name: str, evaluation: PolicyEvaluation) -> dict[str, Any]:
    """Keep every prompt's result in `evaluation-<name>.jsonl`, say the shares, and return them for the summary."""
    prefix = "" if name == "test" else f"{name}_"
    if distributed.rank() == 0:
        with (session.directory / f"evaluation-{name}.jsonl").open("w", encoding="utf-8") as file:
            for r in evaluation.results:
                file.write(to_json(vars(r)) + "\n")
    low, high = evaluation.interval
    session.log.note(
        f"{name}: {evaluation.n} prompts: pass@1 {evaluation.pass1:.3f} [{low:.3f}, {high:.3f}],"
        f" pass@{evaluation.k} {evaluation.pass_k:.3f}, greedy {evaluation.greedy:.3f},"
        f" mean length {evaluation.mean_length:.1f} tokens, mixed groups {evaluation.mixed:.2f}"
    )
    return {prefix + key: value for key, value in json.loads(to_json(evaluation.summary())).items()}

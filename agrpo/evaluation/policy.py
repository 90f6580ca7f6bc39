"""Pass rates of a policy on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from agrpo.config import EvaluationConfig
from agrpo.engine import distributed
from agrpo.engine.backends.native import Sampling
from agrpo.engine.turns import Samples
from agrpo.evaluation.intervals import bootstrap_interval
from agrpo.training.scoring import Scores, score
from agrpo.types import Prompt, Rollout

# Steps of training count from 0: evaluation draws from streams that training never reaches.
_FIRST_STREAM = 1 << 31


@dataclass(frozen=True)
class PromptResult:
    """What happened on one prompt."""

    slot: int
    columns: dict[str, Any]
    text: Any
    greedy: str
    greedy_passes: bool
    sample: str
    passes: int  # of the samples


@dataclass(frozen=True)
class PolicyEvaluation:
    """Shares over n prompts. pass_k: at least one of the k samples passes. mixed: some samples pass and some do not."""

    pass1: float
    pass_k: float
    greedy: float
    mean_length: float  # tokens of a sample
    mixed: float
    clipped: float  # samples cut by the length limit
    k: int
    n: int
    interval: tuple[float, float]  # of pass1, 95%
    results: tuple[PromptResult, ...]

    def metrics(self) -> dict[str, float]:
        return {
            "evaluation/pass1": self.pass1,
            f"evaluation/pass{self.k}": self.pass_k,
            "evaluation/greedy": self.greedy,
            "evaluation/mean_length": self.mean_length,
            "evaluation/mixed_groups": self.mixed,
            "evaluation/clipped_ratio": self.clipped,
        }

    def summary(self) -> dict[str, Any]:
        return {
            "test_pass1": self.pass1,
            f"test_pass{self.k}": self.pass_k,
            "test_greedy": self.greedy,
            "mean_length": self.mean_length,
            "mixed_groups": self.mixed,
            "test_prompts": self.n,
            "test_pass1_interval": list(self.interval),
        }


def evaluate_policy(
    samples: Samples, prompts: Sequence[Prompt], rewards: Scores, config: EvaluationConfig, seed: int
) -> PolicyEvaluation:
    """Greedy and sampled completions of every prompt, graded by the rewards. Every rank must call it.

    A completion passes when its weighted reward reaches `config.pass_at`; one that no reward could score does not pass.

    Args:
        samples: the engine, or its conversations with an environment.
    """
    own = prompts[distributed.rank() :: distributed.world()]
    key = (seed, _FIRST_STREAM)
    limit, stop = config.max_completion_length, tuple(config.stop)
    greedy = samples.generate(own, [1] * len(own), Sampling(limit, stop=stop, greedy=True), key)
    sampling = Sampling(limit, config.temperature, stop=stop)
    sampled = samples.generate(own, [config.samples] * len(own), sampling, key)
    greedy_passes = _passes(greedy, rewards, config.pass_at)
    passes = _passes(sampled, rewards, config.pass_at).view(len(own), config.samples)
    results = [
        PromptResult(
            slot=prompt.slot,
            columns=dict(prompt.columns),
            text=prompt.text,
            greedy=greedy.texts[i],
            greedy_passes=bool(greedy_passes[i]),
            sample=sampled.texts[i * config.samples],
            passes=int(passes[i].sum()),
        )
        for i, prompt in enumerate(own)
    ]
    everything = sorted((r for part in distributed.gather_objects(results) for r in part), key=lambda r: r.slot)
    sums = distributed.sum_over_ranks(
        {"tokens": len(sampled.tokens), "samples": len(sampled.lengths), "finished": sampled.finished.sum()}
    )
    k, n = config.samples, len(everything)
    rates = [r.passes / k for r in everything]
    return PolicyEvaluation(
        pass1=sum(rates) / n,
        pass_k=sum(r.passes > 0 for r in everything) / n,
        greedy=sum(r.greedy_passes for r in everything) / n,
        mean_length=sums["tokens"] / sums["samples"],
        mixed=sum(0 < r.passes < k for r in everything) / n,
        clipped=1 - sums["finished"] / sums["samples"],
        k=k,
        n=n,
        interval=bootstrap_interval(rates),
        results=tuple(everything),
    )


def _passes(rollout: Rollout, rewards: Scores, pass_at: float) -> Tensor:
    """(N,) bool. NaN compares as false."""
    return rewards.total(score(rewards, rollout)) >= pass_at - 1e-6

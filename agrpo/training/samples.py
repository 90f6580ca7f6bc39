"""What a step looked like: its metrics beside the update's, and samples a person can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agrpo.algorithms.advantages import zero_signal_fraction
from agrpo.algorithms.segments import segment_sum
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.engine.memory import peak_memory
from agrpo.evaluation.policy import PolicyEvaluation
from agrpo.reporting.files import to_json
from agrpo.training.batches import Sequences
from agrpo.training.rollouts import take, without_silent_prompts
from agrpo.training.scoring import Scores
from agrpo.training.session import Session
from agrpo.types import Experience, Rollout

MOST_PIECES = 1024  # tokens of a sample that are listed one by one
LONGEST_CHARACTER = 4  # bytes, and so tokens, of a character in UTF-8


def rollout_metrics(experience: Experience, rewards: Scores) -> dict[str, float]:
    """Of a step's rollout before pruning, over all ranks."""
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
            **_talks(rollout),
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
        **_length_spread(rollout),
        "completions/clipped_ratio": 1 - sums["finished"] / sums["completions"],
        **_talk_metrics(sums),
        "frac_reward_zero_std": sums["silent"] / sums["groups"],
        "agrpo/advantage_variance": sums["advantage"] / sums["completions"],
        "num_tokens": sums["tokens"],
        "memory/peak_gib": distributed.max_over_ranks(peak_memory()) / 2**30,
    }


def _talks(rollout: Rollout) -> dict[str, Any]:
    """Sums over this rank's conversations; nothing where no environment answered."""
    if not rollout.turns:
        return {}
    return {
        "talks": len(rollout.turns),
        "talks/turns": sum(turn["role"] == "assistant" for turns in rollout.turns for turn in turns),
        "talks/heard": len(rollout.heard),
        "talks/errors": rollout.outcomes.isnan().sum(),
        "talks/reward": rollout.outcomes.nansum(),
    }


def _talk_metrics(sums: dict[str, float]) -> dict[str, float]:
    if not sums.get("talks"):
        return {}
    return {
        "environment/turns": sums["talks/turns"] / sums["talks"],
        "environment/heard_tokens": sums["talks/heard"] / sums["talks"],
        "environment/errors": sums["talks/errors"],
        "environment/reward": sums["talks/reward"] / max(1, sums["talks"] - sums["talks/errors"]),
    }


def _length_spread(rollout: Rollout) -> dict[str, float]:
    """How long the completions of all ranks are, in tokens."""
    lengths = torch.cat(distributed.gather_objects(rollout.lengths)).double()
    p10, median, p90 = torch.quantile(lengths, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/length_p10": p10,
        "completions/length_median": median,
        "completions/length_p90": p90,
    }


def _of_completions(experience: Experience) -> Tensor:
    """(N,) advantage of each completion: the mean over its tokens."""
    lengths = experience.rollout.lengths
    return segment_sum(experience.advantages, lengths) / lengths


def sample_rows(
    engine: HybridEngine, experience: Experience, rewards: Scores, count: int, temperature: float
) -> list[dict[str, Any]]:
    """The first completions of the step: prompt, completion, each reward, advantage, and its tokens one by one.

    `pieces` are the tokens' texts, the end token's too; `logp` their log-probabilities as sampled, in nats, and
    `log_ratio` those less the reference's, where there is one; `advantages` where each token has its own. At most
    MOST_PIECES tokens of a completion are listed. Every rank takes part, since the reference may be sharded.
    """
    n = min(count, len(experience.rollout.texts))
    if n == 0:
        return []
    advantages, of_tokens = _of_completions(experience), experience.advantages
    first = take(experience.rollout, torch.arange(n))
    columns: dict[str, tuple[Tensor, ...]] = {"logp": first.logp.split(first.lengths.tolist())}
    if engine.has_reference:
        columns["log_ratio"] = (first.logp - _reference(engine, first, temperature)).split(first.lengths.tolist())
    own = of_tokens[: len(first.tokens)].split(first.lengths.tolist())
    if any(bool((part != part[0]).any()) for part in own):
        columns["advantages"] = own
    tokens = first.tokens.split(first.lengths.tolist())
    return [
        {
            "prompt": first.prompts[int(first.group[k])].text,
            "completion": first.texts[k],
            **({"turns": list(first.turns[k])} if first.turns else {}),
            "rewards": dict(zip(rewards.names, experience.scores[k].tolist(), strict=True)),
            "reward": float(experience.rewards[k]),
            "advantage": float(advantages[k]),
            "tokens": int(first.lengths[k]),
            "pieces": pieces(engine.tokenizer, tokens[k][:MOST_PIECES].tolist()),
            **{name: [round(v, 3) for v in parts[k][:MOST_PIECES].tolist()] for name, parts in columns.items()},
        }
        for k in range(n)
    ]


def _reference(engine: HybridEngine, rollout: Rollout, temperature: float) -> Tensor:
    """(C,) nats, of the rollout's tokens under the reference."""
    rollout = without_silent_prompts(rollout)
    sequences = Sequences.of_rollout(rollout)
    layout = sequences.layout(range(len(rollout.prompts)))
    return engine.reference_logprobs(layout, temperature).cpu()


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token. Of a character that several tokens spell, the last token has it, the others nothing."""
    texts: list[str] = []
    pending: list[int] = []
    for number in ids:
        pending.append(number)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        whole = not text.endswith("\ufffd") or len(pending) == LONGEST_CHARACTER
        texts.append(text if whole else "")
        if whole:
            pending = []
    if pending:
        texts[-1] = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
    return texts


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

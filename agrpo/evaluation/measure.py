"""Measure a model on graded prompts, a batch of prompts at a time, so that an interruption costs one batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import agrpo
from agrpo.config import EnvironmentConfig, ModelConfig, RolloutConfig
from agrpo.data.load import encode_prompts
from agrpo.data.records import PromptRow, Records
from agrpo.engine import distributed
from agrpo.engine.backends.build import build_backend
from agrpo.engine.backends.native import Sampling
from agrpo.engine.modules import Policy, cast_weights
from agrpo.engine.turns import EnvironmentFailed, Samples, with_environment
from agrpo.environments.loading import load_environment
from agrpo.evaluation.benchmarks import short_columns
from agrpo.evaluation.ledger import Ledger
from agrpo.evaluation.runs import fingerprint
from agrpo.models import load_language_model, load_tokenizer, stop_ids
from agrpo.training.scoring import Scores, score
from agrpo.types import InputError, Prompt, Rollout, RolloutBackend
from agrpo.yaml_input import to_yaml

Vote = Callable[[str, Mapping[str, Any]], str | None]  # (completion, the row's columns) → the answer it votes for
Note = Callable[[str], None]
_STREAM = 1 << 31  # of the random streams: training's steps count from 0 and never get there


@dataclass(frozen=True)
class How:
    """What an evaluation's numbers depend on, beside the model, the data and the rewards."""

    samples: int = 8  # completions a prompt
    greedy: bool = True  # also the greedy completion
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_prompt_length: int = 4096
    max_completion_length: int = 2048
    stop: tuple[str, ...] = ()
    pass_at: float = 1.0  # a completion passes when its weighted reward reaches this
    seed: int = 0
    dtype: str = "float32"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_completion_length, self.temperature, self.top_k, self.top_p, stop=self.stop)


@dataclass(frozen=True)
class Grading:
    """Rewards, and how a completion's vote is read. Without rewards completions are kept and nothing is graded."""

    rewards: Scores | None
    vote: Vote | None
    named: Any = None  # the rewards as the configuration has them: results of others do not count


def measure(
    model: str,
    rows: Records[PromptRow],
    grading: Grading,
    how: How,
    rollout: RolloutConfig,
    out: Path,
    note: Note,
    *,
    environment: EnvironmentConfig | None = None,
    again: bool = False,
) -> list[dict[str, Any]]:
    """Every prompt's completions and grades, in the order of the data; what `out` has of them already is kept.

    Each prompt's completions come from random streams of its own, and a batch that was cut off is sampled anew whole,
    so an interrupted evaluation that is run again ends in the same results. Every process must call it.

    Args:
        out: the directory of `results.jsonl`. `{identity}` in its name stands for a digest of everything that the
            numbers depend on.
        environment: what answers between the turns of a completion.
        again: forget what is there.

    Raises:
        InputError: `out` holds another evaluation, or a reward or an environment failed.
    """
    make = load_environment(environment)
    tokenizer, _ = load_tokenizer(ModelConfig(name_or_path=model))
    prompts = encode_prompts(rows, tokenizer, how.max_prompt_length, note)
    batch = max(1, rollout.max_sequences // max(1, how.samples))
    identity = {
        "model": fingerprint(model),
        "data": _digest([(p.ids, p.text, p.columns) for p in prompts]),
        "rewards": grading.named,
        "how": asdict(how),
        "rollout": to_yaml(rollout),
        "batch": batch,
        "version": agrpo.__version__,
    }
    if environment is not None:
        identity["environment"] = environment.model_dump()
    path = Path(str(out).replace("{identity}", _digest(identity)[:8])) / "results.jsonl"
    if again and distributed.rank() == 0:
        path.unlink(missing_ok=True)
    distributed.barrier()
    ledger = Ledger(path, identity)
    if ledger.damaged:
        note(f"{path}: {ledger.damaged} lines were cut off or changed: their prompts are measured again")
    batches = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    open_batches = [one for one in batches if any(p.slot not in ledger.rows for p in one)]
    distributed.barrier()  # all have read before one writes
    if len(open_batches) < len(batches):
        note(f"{path}: {sum(len(b) for b in batches) - sum(map(len, open_batches))} of {len(prompts)} prompts are done")
    if open_batches:
        longest = max(len(p.ids) for p in prompts) + (0 if environment is None else how.max_completion_length)
        backend = load_backend(model, tokenizer, rollout, how, longest)
        speaker = with_environment(backend, environment, make, tokenizer, strict=True, note=note)
        for found in _rounds(open_batches, lambda one: _measure_batch(speaker, one, grading, how)):
            if distributed.rank() == 0:
                ledger.append(found)
            else:
                ledger.rows |= {row["slot"]: row for row in found}
            note(_progress(ledger, len(prompts)))
    return [ledger.rows[p.slot] for p in prompts]


def load_backend(model: str, tokenizer: Any, rollout: RolloutConfig, how: How, longest_prompt: int) -> RolloutBackend:
    """A backend that samples from the model's weights; nothing of it trains."""
    lm = load_language_model(ModelConfig(name_or_path=model), tokenizer, seed=0)
    stop = stop_ids(tokenizer, lm)
    policy = cast_weights(Policy(lm), getattr(torch, how.dtype)).to(distributed.device()).eval().requires_grad_(False)
    longest = longest_prompt + how.max_completion_length
    backend = build_backend(rollout, policy, tokenizer=tokenizer, stop=stop, longest=longest)
    backend.follow(0)
    return backend


def _rounds(
    batches: Sequence[list[Prompt]], measured: Callable[[list[Prompt]], list[dict[str, Any]]]
) -> Iterator[list[dict[str, Any]]]:
    """Results of one batch for each process at a time, of all processes together."""
    world = distributed.world()
    for start in range(0, len(batches), world):
        mine = batches[start + distributed.rank() : start + distributed.rank() + 1]
        own = [row for one in mine for row in measured(one)]
        yield [row for part in distributed.gather_objects(own) for row in part]


@torch.no_grad()
def _measure_batch(samples: Samples, prompts: Sequence[Prompt], grading: Grading, how: How) -> list[dict[str, Any]]:
    key = (how.seed, _STREAM)
    rows = [{"slot": p.slot, "prompt": p.text, "columns": short_columns(p.columns)} for p in prompts]
    if how.greedy:
        sampling = Sampling(how.max_completion_length, stop=how.stop, greedy=True)
        greedy = _completions(samples, prompts, [1] * len(prompts), sampling, key)
        for row, (graded,) in zip(rows, _graded(greedy, grading, how), strict=True):
            row["greedy"] = graded
    if how.samples:
        sampled = _completions(samples, prompts, [how.samples] * len(prompts), how.sampling, key)
        for row, graded in zip(rows, _graded(sampled, grading, how), strict=True):
            row["samples"] = graded
    return rows


def _completions(samples: Samples, prompts: Sequence[Prompt], *how: Any) -> Rollout:
    try:
        return samples.generate(prompts, *how)
    except EnvironmentFailed as error:
        raise InputError(str(error)) from None


def _graded(rollout: Rollout, grading: Grading, how: How) -> list[list[dict[str, Any]]]:
    """Of each prompt its completions: text, tokens, finished, and what the rewards say of them."""
    results: list[list[dict[str, Any]]] = [[] for _ in rollout.prompts]
    rewards = grading.rewards
    if rewards is not None:
        scores = score(rewards, rollout)  # (N, K)
        total = rewards.total(scores)  # (N,) NaN where none could score
        _require_grades(rewards, scores)
    for n, (p, text) in enumerate(zip(rollout.group.tolist(), rollout.texts, strict=True)):
        row = {"text": text, "tokens": int(rollout.lengths[n]), "finished": bool(rollout.finished[n])}
        if rollout.turns:
            row["turns"] = list(rollout.turns[n])
        if rewards is not None:
            row["reward"] = float(total[n])
            row["scores"] = dict(zip(rewards.names, scores[n].tolist(), strict=True))
            row["passes"] = bool(total[n] >= how.pass_at - 1e-6)  # NaN does not
        if grading.vote is not None:
            row["vote"] = grading.vote(text, rollout.prompts[p].columns)
        results[p].append(row)
    return results


def _require_grades(rewards: Any, scores: torch.Tensor) -> None:
    """An evaluation does not go on where a reward fails: its numbers would be of something else."""
    errors = rewards.take_errors()
    if errors:
        reasons = "; ".join(f"{name}: {rewards.first_error[name].strip().splitlines()[-1]}" for name in errors)
        raise InputError(f"a reward failed on {sum(errors.values())} completions: {reasons}")


def _progress(ledger: Ledger, total: int) -> str:
    done = list(ledger.rows.values())
    graded = [row for row in done if row.get("samples") and "passes" in row["samples"][0]]
    rate = f", pass@1 {sum(map(_rate, graded)) / len(graded):.3f} so far" if graded else ""
    return f"{len(done)} of {total} prompts{rate}"


def _rate(row: Mapping[str, Any]) -> float:
    return sum(one["passes"] for one in row["samples"]) / len(row["samples"])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

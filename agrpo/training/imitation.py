"""Supervised fine-tuning: the likelihood of completions, prompts excluded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.training.batches import Sequences, in_step, micro_batches


def imitate(engine: HybridEngine, batch: Sequences, micro_batch_tokens: int, learning_rate: float) -> dict[str, float]:
    """One optimiser step on this rank's demonstrations: the mean over all completion tokens of all ranks."""
    tokens = distributed.sum_over_ranks({"tokens": len(batch.tokens)})["tokens"]
    loss_sum = entropy_sum = 0.0
    parts = micro_batches(batch.costs, micro_batch_tokens)
    for i, counts, last in in_step(parts):
        logp, entropy = engine.forward(batch.layout(parts[i]))
        loss = -logp.sum() / tokens * counts
        engine.backward(loss, last)
        loss_sum += float(loss.detach())
        entropy_sum += float(entropy.detach().sum()) / tokens * counts
    norm = engine.step(learning_rate)
    return {
        **distributed.sum_over_ranks({"loss": loss_sum, "entropy": entropy_sum}),
        "grad_norm": norm,
        "agrpo/skipped_steps": engine.skipped_steps,
        "num_tokens": tokens,
    }


def evaluation_loss(
    engine: HybridEngine, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], budget: int
) -> float:
    """Mean negative log-likelihood of held-out completions, nats a token, over all ranks."""
    own = slice(distributed.rank(), None, distributed.world())
    batch = Sequences.of(prompts[own], completions[own])
    total = 0.0
    parts = micro_batches(batch.costs, budget)
    for i, counts, _ in in_step(parts):
        total -= float(engine.evaluate(batch.layout(parts[i]))[0].sum()) * counts
    sums = distributed.sum_over_ranks({"loss": total, "tokens": len(batch.tokens)})
    return sums["loss"] / sums["tokens"] if sums["tokens"] else math.nan

"""A learned reward: any sequence-classification model with one label, such as stage 2 leaves behind."""

from __future__ import annotations

from typing import Any

import torch

from agrpo.data.tokens import encode_completion, encode_prompt
from agrpo.engine import distributed
from agrpo.engine.attention import use_flat_attention, why_not_flat
from agrpo.engine.modules import last_states
from agrpo.models import load_reward_model
from agrpo.training.batches import Sequences, micro_batches
from agrpo.types import Text


class LearnedReward:
    """Scores completions by the model's head on their last token. Prompts of a group are read once.

    Args:
        model: a folder or a Hub id.
        batch_tokens: tokens that are scored together.
        trust_remote_code: run code that comes with the model.
    """

    __name__ = "learned"

    def __init__(self, model: str, batch_tokens: int = 16384, trust_remote_code: bool = False) -> None:
        self.model, self.tokenizer = load_reward_model(model, trust_remote_code=trust_remote_code)
        self.model.to(distributed.device()).requires_grad_(False)
        self.batch_tokens = batch_tokens
        self.flat = why_not_flat(self.model.config) is None
        if self.flat:
            use_flat_attention(self.model)

    @torch.no_grad()
    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        grouped: list[tuple[list[int], list[list[int]]]] = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if i == 0 or prompt != prompts[i - 1]:
                grouped.append((encode_prompt(self.tokenizer, prompt), []))
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            grouped[-1][1].append(encode_completion(self.tokenizer, text, prompt))
        batch = Sequences.of([p for p, _ in grouped], [c for _, c in grouped])
        scores: list[float] = []
        for part in micro_batches(batch.costs, self.batch_tokens):
            layout = batch.layout(part).to(distributed.device())
            last, _, _ = last_states(self.model.get_decoder(), layout, self.flat)
            scores += self.model.score(last)[:, 0].float().tolist()
        return scores


def build(model: str, **parameters: Any) -> LearnedReward:
    return LearnedReward(model, **parameters)

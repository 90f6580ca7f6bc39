"""A learned reward: any sequence-classification model with one label, such as stage 2 leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agrpo.data.tokens import Turns, encode_completion, encode_prompt, encode_turns
from agrpo.engine import distributed
from agrpo.engine.attention import use_flat_attention, why_not_flat
from agrpo.engine.layout import Layout
from agrpo.engine.modules import last_states
from agrpo.models import ModelError, load_reward_model
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
        self.heads: int = self.model.config.num_labels
        self.batch_tokens = batch_tokens
        self.flat = why_not_flat(self.model.config) is None
        if self.flat:
            use_flat_attention(self.model)

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        return self.scores(prompts, completions)[:, 0].tolist()

    @torch.no_grad()
    def scores(self, prompts: list[Text], completions: list[Text]) -> Tensor:
        """(N, heads) float32."""
        batch = sequences_of(self.tokenizer, prompts, completions)
        found = []
        for layout in slices(batch, self.batch_tokens):
            last, _, _ = last_states(self.model.get_decoder(), layout.to(distributed.device()), self.flat)
            found.append(self.model.score(last).float().cpu())
        return torch.cat(found)


def sequences_of(tokenizer: PreTrainedTokenizerBase, prompts: list[Text], completions: list[Text]) -> Sequences:
    """Texts as tokens, completions of one prompt that stand together in one group.

    Of a completion of several turns the assistant's are its tokens, up to its last; where the chat template rewrites
    earlier turns, the last one alone is, behind the others as the template writes them.
    """
    grouped: list[tuple[list[int], list[Turns]]] = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if i == 0 or prompt != prompts[i - 1]:
            opened = encode_prompt(tokenizer, prompt)
        ids, turns = opened, completion
        if not isinstance(turns, str):
            last = max(n for n, turn in enumerate(turns) if turn["role"] == "assistant")
            turns = turns[0]["content"] if last == 0 else turns[: last + 1]
        if isinstance(turns, str):
            own = Turns(tuple(encode_completion(tokenizer, turns, prompt)))
        else:
            ids, own = encode_turns(tokenizer, prompt, turns)[-1]
        if not grouped or ids != grouped[-1][0]:
            grouped.append((ids, []))
        grouped[-1][1].append(own)
    return Sequences.of([p for p, _ in grouped], [c for _, c in grouped])


def slices(batch: Sequences, batch_tokens: int) -> Iterator[Layout]:
    for part in micro_batches(batch.costs, batch_tokens):
        yield batch.layout(part)


def build(model: str, batch_tokens: int = 16384, trust_remote_code: bool = False) -> LearnedReward:
    """The reward of a model with one head."""
    reward = LearnedReward(model, batch_tokens, trust_remote_code)
    if reward.heads != 1:
        raise ModelError(f"{model} has {reward.heads} labels; score with reward_models.ensemble, or name another model")
    return reward

"""The reward that a policy implies: how much likelier it makes a completion than its reference does."""

from __future__ import annotations

from typing import Any

import torch

from agrpo.algorithms.preference import implicit_reward
from agrpo.config import ModelConfig
from agrpo.engine import distributed
from agrpo.engine.layout import Layout
from agrpo.engine.modules import Policy
from agrpo.models import ModelError, load_language_model, load_tokenizer
from agrpo.types import Text
from reward_models.learned import sequences_of, slices


class ImplicitReward:
    """α·[log π(y|x) − log π_ref(y|x)], summed over the completion's tokens or their mean.

    Args:
        model, reference: folders or Hub ids of language models with one tokenizer, such as stages 2 (`kind: implicit`)
            and 1 leave.
        alpha: scale; reduction: `sum` or `mean`.
        batch_tokens, trust_remote_code: as of the learned reward.

    Raises:
        ModelError: a model cannot be loaded, or the two tokenizers differ.

    Source: DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 5, without the term of x alone.
    """

    __name__ = "implicit"

    def __init__(
        self,
        model: str,
        reference: str,
        alpha: float = 1.0,
        reduction: str = "mean",
        batch_tokens: int = 16384,
        trust_remote_code: bool = False,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: {reduction!r} is not sum or mean")
        self.alpha, self.reduction, self.batch_tokens = alpha, reduction, batch_tokens
        self.policy, self.tokenizer = _load(model, trust_remote_code)
        self.reference, other = _load(reference, trust_remote_code)
        if other.get_vocab() != self.tokenizer.get_vocab():
            raise ModelError(f"{model} and {reference} have different tokenizers: an implicit reward needs one of both")

    @torch.no_grad()
    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        batch = sequences_of(self.tokenizer, prompts, completions)
        scores: list[float] = []
        for layout in slices(batch, self.batch_tokens):
            scores += self._score(layout.to(distributed.device()))
        return scores

    def _score(self, layout: Layout) -> list[float]:
        logp, reference = self.policy(layout)[0], self.reference(layout)[0]
        return implicit_reward(logp, reference, layout.lengths, alpha=self.alpha, reduction=self.reduction).tolist()


def _load(path: str, trust_remote_code: bool) -> tuple[Policy, Any]:
    config = ModelConfig(name_or_path=path, trust_remote_code=trust_remote_code)
    tokenizer, _ = load_tokenizer(config)
    lm = load_language_model(config, tokenizer, seed=0)
    return Policy(lm).to(distributed.device()).eval().requires_grad_(False), tokenizer


build = ImplicitReward

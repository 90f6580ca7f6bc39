"""The modules that DeepSpeed trains: a language model that reads a layout, with a chunked or a score head on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from agrpo.engine.attention import FlatAttention, use_flat_attention, why_not_flat
from agrpo.engine.layout import Layout
from agrpo.engine.logprobs import chunked_logprobs
from agrpo.models import merged_weights


def causal_lm(lm: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without a PEFT wrapper (adapters are injected into its layers)."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def whole_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """What another program needs to be this policy: plain names, LoRA merged, a tied head only as the embeddings."""
    tied_head = "lm_head.weight" if causal_lm(policy.lm).config.tie_word_embeddings else None
    for name, weight in merged_weights(policy.lm):
        if name != tied_head:
            yield name, weight.detach()


class Policy(nn.Module):
    """A causal language model over layouts: forward(layout) → log-probabilities and entropies of its completion tokens.

    Families with flat attention run the flat axis as it is and put the head on completion positions, in chunks. Any
    other family runs plain rows, each completion behind its own copy of the prompt, through its unmodified forward;
    `fallback_reason` says why.
    """

    fast = True  # plain products in attention where they are faster

    def __init__(self, lm: nn.Module, flat: bool = True) -> None:
        super().__init__()
        self.lm = lm
        self.fallback_reason = why_not_flat(causal_lm(lm).config) if flat else "asked for plain rows"
        if self.fallback_reason is None:
            use_flat_attention(causal_lm(lm))

    @property
    def head(self) -> nn.Parameter:
        """(V, H) weight of the language-model head."""
        return causal_lm(self.lm).get_output_embeddings().weight

    def forward(self, layout: Layout, temperature: float = 1.0) -> tuple[Tensor, ...]:
        """(C,) log-probabilities and (C,) entropies at the temperature, nats."""
        return self._run(layout, temperature)[:2]

    def generate(self, *inputs: Tensor, **options: Any) -> Tensor:
        """transformers' own generate: DeepSpeed's rollout interface asks the module that trains for it."""
        return causal_lm(self.lm).generate(*inputs, **options)

    def _run(self, layout: Layout, temperature: float, states: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same, and where asked for the (C, H) last hidden states that predict the tokens."""
        if self.fallback_reason is None:
            body = causal_lm(self.lm).get_decoder()
            hidden = flat_states(body, layout, self.fast).index_select(0, layout.source)  # (C, H)
            return *chunked_logprobs(hidden, self.head, layout.targets, temperature), hidden
        rows, mask, where = plain_rows(layout)
        output = self.lm(input_ids=rows, attention_mask=mask, use_cache=False, output_hidden_states=states)
        z = output.logits.flatten(0, 1).index_select(0, where).float() / temperature  # (C, V)
        log_p = z.log_softmax(1)
        logp, entropy = log_p.gather(1, layout.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
        hidden = output.hidden_states[-1].flatten(0, 1).index_select(0, where) if states else None
        return logp, entropy, hidden


class ActorCritic(Policy):
    """A policy with a value head on the same backbone: forward(layout) → log-probabilities, entropies and values.

    values (C,), float32: what the completion's reward will be, judged from the state before each token. The head starts
    at 0, so the first advantages are the returns themselves.
    """

    def __init__(self, lm: nn.Module, flat: bool = True) -> None:
        super().__init__(lm, flat)
        self.value = nn.Linear(causal_lm(lm).config.hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self.value.to(device=self.head.device, dtype=self.head.dtype)

    def forward(self, layout: Layout, temperature: float = 1.0) -> tuple[Tensor, ...]:
        logp, entropy, states = self._run(layout, temperature, states=True)
        return logp, entropy, self.value(states)[:, 0].float()


class Scorer(nn.Module):
    """A reward model: score heads on the last token of each completion, on a backbone that stays a language model.

    forward(layout, spoken) → (N, heads) scores, and the (C',) log-probabilities of the completions `spoken` (indices
    into N), which the text-generation regulariser reads.
    """

    def __init__(self, policy: Policy, heads: int = 1) -> None:
        super().__init__()
        self.policy = policy
        size = causal_lm(policy.lm).config.hidden_size
        self.score = nn.Linear(size, heads, bias=False)
        nn.init.normal_(self.score.weight, std=1 / (size + 1) ** 0.5)
        self.score.to(device=policy.head.device, dtype=policy.head.dtype)

    def forward(self, layout: Layout, spoken: Tensor | None = None) -> tuple[Tensor, Tensor]:
        body = causal_lm(self.policy.lm).get_decoder()
        last, hidden, source = last_states(body, layout, self.policy.fallback_reason is None, self.policy.fast)
        scores = self.score(last).float()  # (N, heads)
        if spoken is None:
            return scores, scores.new_zeros(0)
        chosen = torch.zeros(len(layout.lengths), dtype=torch.bool, device=scores.device).index_fill_(0, spoken, True)
        tokens = chosen.repeat_interleave(layout.lengths).nonzero()[:, 0]
        states = hidden.index_select(0, source.index_select(0, tokens))
        logp, _ = chunked_logprobs(states, self.policy.head, layout.targets.index_select(0, tokens))
        return scores, logp


def cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters to dtype, in place; buffers (rotary frequencies) keep their precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def flat_states(body: nn.Module, layout: Layout, fast: bool = True) -> Tensor:
    """(S, H) last hidden states of a model with flat attention."""
    attend = FlatAttention(layout, fast=fast)
    output = body(input_ids=layout.ids[None], position_ids=layout.positions[None], attend=attend, use_cache=False)
    return output.last_hidden_state[0]


def last_states(body: nn.Module, layout: Layout, flat: bool, fast: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H) state of each completion's last token; all states, (·, H); and (C,) the state that predicts each token."""
    if flat:
        states, last, source = flat_states(body, layout, fast), layout.last, layout.source
    else:
        rows, mask, source = plain_rows(layout)
        states = body(input_ids=rows, attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)
        last = source.index_select(0, layout.lengths.cumsum(0) - 1) + 1
    return states.index_select(0, last), states, source


def plain_rows(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Each completion behind its own copy of its prompt, padded on the right.

    Returns:
        (N, width) token ids, (N, width) attention mask, and (C,) the place in the flattened rows that predicts each
        completion token.
    """
    own = layout.prompt_lengths[layout.group]  # (N,) length of each row's prompt
    total = own + layout.spans
    device = layout.ids.device
    width = int(total.max())
    column = torch.arange(width, device=device)
    prompt_start = layout.prompt_lengths.cumsum(0) - layout.prompt_lengths  # into prompt_places
    in_prompt = (prompt_start[layout.group][:, None] + column).clamp(max=len(layout.prompt_places) - 1)
    in_completion = (layout.start[:, None] + column - own[:, None]).clamp(0, len(layout.ids) - 1)
    ids = layout.ids[torch.where(column < own[:, None], layout.prompt_places[in_prompt], in_completion)]
    mask = column < total[:, None]
    row = torch.arange(len(own), device=device).repeat_interleave(layout.lengths)
    return ids * mask, mask.long(), row * width + own[row] + layout.offsets - 1

"""Is what sampled the policy? Another program's log-probabilities against the training forward's."""

from __future__ import annotations

import math

import torch

from agrpo.engine.backends.native import Sampling
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy, causal_lm
from agrpo.types import Rollout

# Nats a token, mean. In bfloat16 vLLM's CPU build was off by 0.072 at most on SmolLM2-135M (prompts of random tokens;
# 0.045 on questions) and by 0.017 on tiny random models. With one made-up matrix SmolLM2 is off by 1.0,
# with all weights made up by 3.7. What no tolerance can see is one small step, which moves less than rounding does.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
_CHECKED_TOKENS = 512


class SamplerMismatch(RuntimeError):
    """What samples does not sample from the policy's weights."""


@torch.no_grad()
def require_policy(policy: Policy, rollout: Rollout, sampling: Sampling, backend: str) -> float:
    """Compare a rollout's log-probabilities with the training forward's, on its first completions.

    Args:
        policy: with the weights that should have sampled.
        backend: its name, for the message.

    Returns:
        The mean distance, nats a token.

    Raises:
        SamplerMismatch: it is larger than two programs' rounding explains.
    """
    some = max(1, int((rollout.lengths.cumsum(0) <= _CHECKED_TOKENS).sum()))
    group, lengths = rollout.group[:some], rollout.lengths[:some]
    asked = rollout.prompts[: int(group[-1]) + 1]
    count = int(lengths.sum())
    layout = build_layout([p.ids for p in asked], group, lengths, rollout.tokens[:count])
    temperature, raised = 1.0, 0.0  # what filters leave out raises the rest: top_p by −log top_p at most
    if not sampling.greedy:
        temperature = sampling.temperature
        raised = math.inf if sampling.top_k or sampling.min_p else -math.log(sampling.top_p)
    own = policy(layout.to(policy.head.device), temperature)[0].cpu()
    gap = rollout.logp[:count] - own
    distance = float(torch.where(gap < 0, -gap, (gap - raised).clamp(min=0)).mean())
    if not distance <= TOLERANCE[policy.head.dtype]:
        raise SamplerMismatch(
            f"rollout.backend: {backend}: its log-probabilities are {distance:.3g} nats a token from the training"
            f" forward's, with the weights of version {rollout.weight_version}, where rounding explains"
            f" {TOLERANCE[policy.head.dtype]:g}: it has other weights, or computes this model"
            f" ({causal_lm(policy.lm).config.model_type}) otherwise; use rollout.backend=native"
        )
    return distance

"""The backend that `rollout.backend` names."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from agrpo.config import RolloutConfig
from agrpo.engine.backends.native import NativeBackend
from agrpo.engine.backends.remote import RemoteBackend
from agrpo.engine.backends.vllm import VllmBackend
from agrpo.engine.modules import Policy, causal_lm
from agrpo.types import RolloutBackend


def build_backend(
    rollout: RolloutConfig,
    policy: Policy,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[int],
    longest: int | None = None,
) -> RolloutBackend:
    """What generates from a policy whose weights are in place.

    Args:
        tokenizer: decodes the texts.
        stop: token ids that end a completion.
        longest: tokens of the longest prompt and completion to come, where known.
    """
    if rollout.backend == "vllm":
        return VllmBackend(policy, tokenizer=tokenizer, stop=stop, rollout=rollout, longest=longest)
    if rollout.backend == "server":
        return RemoteBackend(policy, tokenizer=tokenizer, stop=stop, servers=rollout.servers, longest=longest)
    return NativeBackend(
        causal_lm(policy.lm),
        flat=policy.fallback_reason is None,
        tokenizer=tokenizer,
        stop=stop,
        max_sequences=rollout.max_sequences,
    )

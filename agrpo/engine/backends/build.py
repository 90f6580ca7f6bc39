"""The backend that `rollout.backend` names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from agrpo.config import RolloutConfig
from agrpo.engine.backends.native import NativeBackend
from agrpo.engine.backends.remote import RemoteBackend
from agrpo.engine.backends.vllm import VllmBackend, require_attention
from agrpo.engine.modules import Policy, causal_lm
from agrpo.types import RolloutBackend


def build_backend(
    rollout: RolloutConfig,
    policy: Policy,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[int],
    longest: int | None = None,
    in_step: bool = False,
) -> RolloutBackend:
    """What generates from a policy whose weights are in place, outside the engine's own module.

    `deepspeed` is the engine's affair: without one, native samples in its place.

    Args:
        tokenizer: decodes the texts.
        stop: token ids that end a completion.
        longest: tokens of the longest prompt and completion to come, where known.
        in_step: the policy's weights are shards of ZeRO-3 (`NativeBackend`).
    """
    if rollout.backend == "vllm":
        return VllmBackend(policy, tokenizer=tokenizer, stop=stop, rollout=rollout, longest=longest)
    if rollout.backend == "server":
        return RemoteBackend(policy, tokenizer=tokenizer, stop=stop, servers=rollout.servers, longest=longest)
    return native_backend(rollout, policy, tokenizer=tokenizer, stop=stop, in_step=in_step)


def require_backend(rollout: RolloutConfig, config: PretrainedConfig) -> None:
    """Refuse a model that the backend cannot generate from, by its configuration alone.

    Raises:
        InputError: what it lacks, and what to do.
    """
    if rollout.backend == "vllm" and not torch.cuda.is_available():
        require_attention(config, rollout)


def native_backend(
    rollout: RolloutConfig,
    policy: Policy,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[int],
    in_step: bool = False,
) -> NativeBackend:
    """The native sampler of a policy."""
    return NativeBackend(
        causal_lm(policy.lm),
        flat=policy.fallback_reason is None,
        tokenizer=tokenizer,
        stop=stop,
        max_sequences=rollout.max_sequences,
        fused=policy.fast and not in_step,  # of shards there is nothing to join
        in_step=in_step,
    )

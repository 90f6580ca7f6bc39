"""The backend that `rollout.backend` names."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from agrpo.config import RolloutConfig
from agrpo.engine.backends.native import NativeBackend
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
    return native_backend(rollout, policy, tokenizer=tokenizer, stop=stop, in_step=in_step)


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
        in_step=in_step,
    )

"""Sampling, and the program that samples."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agrpo.config.base import Count, NonEmpty, Positive, Section


class SamplingConfig(Section):
    num_generations: Count = 8  # of a prompt
    max_prompt_length: Count = 512
    max_completion_length: Count = 512
    temperature: Positive = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0 keeps every token
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stop: list[NonEmpty] = []  # strings that end a completion


class StepSamplingConfig(SamplingConfig):
    prompts_per_step: Count = 8


class VllmConfig(Section):
    """vLLM's own memory and limits, with `backend: vllm`."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5  # GPU: share for its weights and its KV cache
    kv_cache_gib: Count = 1  # CPU: memory for its KV cache, a process
    enforce_eager: bool | None = None  # without compiled graphs; null: on a CPU
    max_model_len: Count | None = None  # tokens of a prompt and its completion; null: as long as the run can need


class ServersConfig(Section):
    """Processes that sample elsewhere, with `backend: server`: each runs `agrpo serve-rollout`."""

    urls: Annotated[list[NonEmpty], Field(min_length=1)]  # each prompt goes to one of them
    token_env: NonEmpty = "AGRPO_ROLLOUT_TOKEN"  # the environment variable that holds their token
    timeout_s: Positive = 1800.0  # of one request: weights on their way, or one rollout's completions
    allow_plain_http: bool = False  # token and weights over http to another machine, for everyone on the way to read


class RolloutConfig(Section):
    backend: Literal["native", "vllm", "server", "deepspeed"] = "native"
    max_sequences: Count = 256  # completions that decode together
    vllm: VllmConfig = VllmConfig()
    servers: ServersConfig | None = None

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if self.backend == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "backend: vllm is not installed; install it: bash scripts/setup.sh --vllm, or outside a checkout"
                " pip install 'agrpo[vllm]'"
            )
        return self

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if self.backend == "server" and self.servers is None:
            raise ValueError("backend: server needs servers.urls, where agrpo serve-rollout listens")
        if self.backend != "server" and self.servers is not None:
            raise ValueError(
                f"servers: has no effect with backend: {self.backend}; set backend: server, or leave it out"
            )
        return self


class StepRolloutConfig(RolloutConfig):
    ahead: Literal[0, 1] = 0  # 1: a step's completions are sampled while the step before updates

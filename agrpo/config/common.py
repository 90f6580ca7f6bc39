"""The sections that every stage has: run, model, data, training, engine, checkpoint, evaluation, logging, hub."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from agrpo.config.base import Count, Fraction, NonEmpty, Positive, Section
from agrpo.config.rewards import RewardSpec
from agrpo.places import configuration


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "quickstart"
    dir: Path = Path("runs")


class LoraConfig(Section):
    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Fraction = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class TokenizerConfig(Section):
    """A tokenizer trained on the stage's own data, for models made from a configuration alone."""

    kind: Literal["characters", "bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=64)] = 4096  # bpe only: characters takes every character of the data
    added_tokens: list[str] = []  # whole strings that become one token, such as "<think>"


class ModelConfig(Section):
    """Exactly one of name_or_path, gguf and config; none of them means the previous stage's model."""

    name_or_path: str | None = None
    gguf: str | None = None  # package:FILE inside an installed package, or a path
    config: dict[str, Any] | None = None  # an architecture (model_type, hidden_size, …), initialised at random
    tokenizer: TokenizerConfig = TokenizerConfig()
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the computation; the master weights are float32
    chat_template: Path | None = None
    lora: LoraConfig | None = None
    quantization: Literal["none", "nf4"] = "none"  # nf4: 4 bits for each frozen weight under LoRA (QLoRA)
    trainable_layers: Count | None = None  # train only the last so many layers and the final norm

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [key for key in ("name_or_path", "gguf", "config") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given together: keep one of them")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example model_type: qwen2")
        if self.lora and self.trainable_layers:
            raise ValueError("lora and trainable_layers exclude each other: keep one of them")
        if self.quantization != "none" and self.lora is None:
            raise ValueError("quantization: 4-bit weights cannot learn: set lora, or quantization to none")
        if self.chat_template is not None and not configuration(self.chat_template).is_file():
            raise ValueError(f"chat_template: {self.chat_template} is no file; it holds a Jinja template")
        return self


class DataConfig(Section):
    source: str | None = None  # Hub id | reasoning_gym:<task> | python:<module>:<function>
    path: Path | None = None  # a local .json, .jsonl, .csv or .parquet, also .gz
    split: str = "train"
    revision: str | None = None
    parameters: dict[str, Any] = {}  # of a procedural source
    columns: dict[str, str] = {}  # our name: the data's name
    chat: bool = False  # prompts that are strings become a user's turn
    system: NonEmpty | None = None  # what a system turn before them says
    on_bad_row: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.source is None) == (self.path is None):
            raise ValueError("give exactly one of source (a Hub id or a task) and path (a local file)")
        if self.path is not None and not self.path.exists():
            raise ValueError(f"path: {self.path} does not exist; make it first, or correct the path")
        if self.system is not None and "system" in self.columns:
            raise ValueError("system: and columns: {system: …} both give the system turn; keep one of them")
        return self


class TrainingConfig(Section):
    max_steps: Count
    batch_size: Count = 32  # demonstrations or preference groups a step; stage 3 counts sampling.prompts_per_step
    learning_rate: Positive = 1e-5
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    min_lr_ratio: Fraction = 0.1  # the schedule ends at this share of the learning rate
    warmup_ratio: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    micro_batch_tokens: Count = 16384
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0  # global norm; 0 turns it off
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3  # optimiser steps in a row that are not finite; one more ends it


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu", "nvme"] = "none"  # where the optimiser's state lives
    offload_path: Path | None = None  # nvme: a directory on the drive
    activation_checkpointing: bool = False
    hang_timeout_s: Positive = 1800.0  # of several processes: without progress for so long, the job ends and names one
    fast: bool = True  # fused layers, joined and packed weights while sampling; false: the models' own modules
    # ZeRO-3
    sample_from: Literal["auto", "whole", "layers"] = "auto"  # a copy made whole once a rollout | one layer at a time
    param_persistence_threshold: Annotated[int, Field(ge=0)] = 100_000  # smaller parameters are not sharded

    @model_validator(mode="after")
    def _places(self) -> Self:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload: {self.offload} needs engine.zero_stage 1, 2 or 3")
        if self.offload == "nvme" and self.zero_stage != 3:
            raise ValueError("offload: nvme is DeepSpeed's with ZeRO-3 alone: set engine.zero_stage to 3")
        if (self.offload == "nvme") != (self.offload_path is not None):
            raise ValueError(
                "offload_path: the directory for offload: nvme, and for nothing else: give both or neither"
            )
        if self.sample_from == "layers" and self.zero_stage != 3:
            raise ValueError("sample_from: layers are gathered from ZeRO-3's shards: set engine.zero_stage to 3")
        return self


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 0  # steps; 0 keeps only the finished model
    keep: Count = 2  # the newest
    best_metric: str | None = None  # keep also the one at whose step this metric was best
    best_mode: Literal["max", "min"] = "max"
    asynchronous: bool = False  # write from a copy in memory while training goes on
    resume: bool = True  # continue from the newest whole checkpoint of this run


class HeldOutConfig(Section):
    every: Annotated[int, Field(ge=0)] = 0  # steps between evaluations on `data`; 0: none before the end
    data: DataConfig | None = None  # validation: watched while it runs
    test: DataConfig | None = None  # measured once, at the end


class EvaluationConfig(HeldOutConfig):
    """Held-out prompts, graded by rewards."""

    test_before: bool = False  # also before the first step, to compare with
    samples: Count = 8  # completions a prompt for pass@1 and pass@k
    temperature: Positive = 1.0
    max_completion_length: Count = 512
    stop: list[NonEmpty] = []
    rewards: list[RewardSpec] = []  # a completion passes when their weighted sum reaches pass_at
    pass_at: float = 1.0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.test is not None and not self.rewards:
            raise ValueError(
                "test: needs evaluation.rewards to grade completions, such as reward_models.rules.accuracy"
            )
        if self.test_before and self.test is None:
            raise ValueError("test_before: needs evaluation.test, the prompts to measure")
        return self


class LoggingConfig(Section):
    samples_per_step: Annotated[int, Field(ge=0)] = 2
    console: bool = True
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    report_every_s: Annotated[float, Field(ge=0)] = 60.0  # report.html while the run goes on; 0: none at all

    @model_validator(mode="after")
    def _installed(self) -> Self:
        missing = [name for name in ("wandb", "trackio") if name in self.loggers and find_spec(name) is None]
        if missing:
            raise ValueError(
                f"loggers: {missing[0]} is not installed: pip install 'agrpo[{missing[0]}]', or take it out of the list"
            )
        return self


class HubConfig(Section):
    """Sharing the model on the Hub: off unless a repository is named. The token is HF_TOKEN of the environment."""

    push: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None  # owner/name; null: nothing is sent
    strategy: Literal["end", "every_save"] = "end"  # every_save: with each checkpoint too
    private: bool = True  # of a repository that is made; a public one is refused

    @model_validator(mode="after")
    def _allowed(self) -> Self:
        if self.push is not None and not os.environ.get("HF_TOKEN"):
            raise ValueError("push: needs a token that may write: set HF_TOKEN in the environment, in no file")
        return self

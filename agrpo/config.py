"""Configuration: the one place where YAML and command line become objects.

Typed, bounded, read-only, free of heavy imports: a wrong configuration is refused before torch is loaded. Every section
is a frozen pydantic model; unknown keys are errors that name the nearest known one. `docs/configuration.md` explains
the keys.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agrpo.algorithms.controllers import check_beta_gain
from agrpo.algorithms.grouping import kept_of
from agrpo.yaml_input import ConfigError, explain, merge, read_yaml, set_path, to_yaml

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "quickstart"
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
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; the master weights are float32
    chat_template: Path | None = None
    lora: LoraConfig | None = None
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
        return self


class DataConfig(Section):
    source: str | None = None  # Hub id | reasoning_gym:<task> | python:<module>:<function>
    path: Path | None = None  # a local .json, .jsonl, .csv or .parquet, also .gz
    split: str = "train"
    revision: str | None = None
    parameters: dict[str, Any] = {}  # of a procedural source
    columns: dict[str, str] = {}  # our name: the data's name
    on_bad_row: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.source is None) == (self.path is None):
            raise ValueError("give exactly one of source (a Hub id or a task) and path (a local file)")
        if self.path is not None and not self.path.exists():
            raise ValueError(f"path: {self.path} does not exist; make it first, or correct the path")
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


class PairLossConfig(Section):
    """The confidence-weighted group preference loss."""

    pair_weighting: Literal["confidence", "hierarchical", "uniform"] = "confidence"
    labels: Literal["weighted", "soft"] = "weighted"  # what a pair's confidence does: weigh it, or soften its label
    implicit_reward: Literal["sum", "mean"] = "mean"  # of the log-ratios of a completion's tokens
    alpha: Positive = 1.0  # scale of the implicit reward


class PreferenceLossConfig(PairLossConfig):
    """The same in stage 2, with its siblings."""

    loss: Literal["logistic", "ipo", "robust"] = "logistic"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # how many labels are the wrong way round

    @model_validator(mode="after")
    def _one_reading_of_labels(self) -> Self:
        if self.label_smoothing and (self.labels == "soft" or self.loss == "ipo"):
            other = "labels: soft" if self.labels == "soft" else "loss: ipo"
            raise ValueError(f"label_smoothing: has no meaning beside {other}; set it to 0")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss: robust needs label_smoothing, the share of labels that are the wrong way round")
        if self.labels == "soft" and self.loss != "logistic":
            raise ValueError(f"labels: soft softens the logistic loss; use loss: logistic with it, not {self.loss}")
        return self


class RankedConfig(Section):
    """Ranked data beside the sampled groups of the policy stage."""

    data: DataConfig
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5  # its share of the group preference loss
    groups_per_step: Count = 8
    max_length: Count = 2048


class GroupLossConfig(PairLossConfig):
    """The same in the policy stage, where a completion's score is the reward that the policy implies."""

    confidence: Literal["rewards", "ensemble"] = "rewards"  # of a sampled pair: of the sum, or of K rewards that vote
    ranked: RankedConfig | None = None


class ObjectiveConfig(Section):
    kl: Literal["none", "reverse", "forward", "symmetric"] = "symmetric"
    beta: Annotated[float, Field(ge=0)] = 0.04
    kl_in: Literal["loss", "reward"] = "loss"  # reward: −β·(log π − log π_ref) of each token, before the advantages
    epsilon_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epsilon_high: Positive = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    group_loss: GroupLossConfig = GroupLossConfig()
    aggregation: Literal["token", "sequence", "constant"] = "token"
    ratio: Literal["token", "sequence", "trajectory"] = "token"
    updates_per_rollout: Count = 2
    sampler_correction: Literal["none", "token", "sequence", "mask"] = "token"  # where another program samples
    sampler_cap: Annotated[float, Field(gt=1)] = 2.0
    value_coef: Positive = 0.5  # weight of the value loss, with advantage.kind: gae
    value_clip: Positive | None = 0.2  # how far an update may move a value from the rollout's


class BetaController(Section):
    kind: Literal["fixed", "adaptive"] = "adaptive"
    target: Positive = 0.05  # symmetric KL, nats a token
    gain: Positive = 0.02
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    bounds: tuple[Positive, Positive] = (1e-4, 1.0)


class EpsilonController(Section):
    kind: Literal["fixed", "adaptive"] = "adaptive"
    target: Positive | None = None  # KL(π_old‖π) before a rollout's last update, nats a token; default ε²/8
    gain: Positive = 0.02
    bounds: tuple[Positive, Positive] = (0.1, 0.5)


class LambdaController(Section):
    kind: Literal["fixed", "adaptive"] = "adaptive"
    value: Fraction = 0.05  # where it starts, or stays when fixed
    target: Fraction = 0.9  # τ, the uncertainty that λ is driven to
    gain: Positive = 0.02
    bounds: tuple[Fraction, Fraction] = (0.05, 0.9)

    @model_validator(mode="after")
    def _starts_inside(self) -> Self:
        low, high = self.bounds
        if self.kind == "adaptive" and not low <= self.value <= high:
            raise ValueError(f"value: {self.value} is outside bounds [{low}, {high}]; widen them, or set kind to fixed")
        return self


class EntropyController(Section):
    kind: Literal["fixed", "adaptive"] = "fixed"
    target: Positive = 0.3  # entropy, nats a token
    gain: Positive = 0.02
    bounds: tuple[Positive, Positive] = (1e-5, 0.1)


class ControllersConfig(Section):
    beta: BetaController = BetaController()
    epsilon: EpsilonController = EpsilonController()
    lambda_: LambdaController = Field(LambdaController(), alias="lambda")
    entropy: EntropyController = EntropyController()

    @model_validator(mode="after")
    def _stable(self) -> Self:
        if self.beta.kind == "adaptive":
            check_beta_gain(self.beta.gain, self.beta.decay)
        for name in ("beta", "epsilon", "lambda", "entropy"):
            low, high = getattr(self, name.replace("lambda", "lambda_")).bounds
            if low > high:
                raise ValueError(f"{name}.bounds: {low} > {high}; write the lower bound first")
        return self


class AdvantageConfig(Section):
    kind: Literal[
        "group",
        "none",
        "batch",
        "weighted",
        "rloo",
        "gdpo",
        "kalman",
        "kalman_recursive",
        "reinforce_pp",
        "gae",
    ] = "weighted"
    std_ddof: Literal[0, 1] = 0
    delta: Positive = 1e-4
    kappa: Annotated[float, Field(ge=0)] = 4.0  # weighted: how many completions the batch's variance is worth
    gamma: Fraction = 1.0  # gae, reinforce_pp: discount of a later token's reward
    gae_lambda: Fraction = 0.95  # gae: bias against variance

    @property
    def of_tokens(self) -> bool:
        """Has each token an advantage of its own?"""
        return self.kind in ("gae", "reinforce_pp")


class PruningConfig(Section):
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.0  # CPPO: the share of each group that is dropped
    scope: Literal["group", "batch"] = "group"  # where the largest |A| are looked for
    refill: bool = False  # sample more prompts, so that the update is as large as without pruning


class GroupingConfig(Section):
    """How many completions a prompt gets, out of prompts_per_step × num_generations in all."""

    kind: Literal["fixed", "adaptive", "dynamic"] = "fixed"
    least: Annotated[int, Field(ge=2)] = 2  # adaptive: completions of the pilot, for every prompt
    most: Count = 32  # adaptive: completions of one prompt
    max_rounds: Count = 4  # dynamic: rounds of sampling for enough groups whose rewards differ


class OverlongConfig(Section):
    """DAPO's soft punishment, as one more reward: from 0 down to −1 over the last tokens before the limit."""

    buffer: Fraction = 0.0  # their share of max_completion_length; 0: no punishment
    weight: Positive = 1.0


class GateConfig(Section):
    """A reward counts only where another one scored at least so much."""

    reward: str  # the other's name
    at_least: float = 1.0
    otherwise: float = 0.0  # what counts instead


class RewardSpec(BaseModel):
    """A reward by import path. Keys beyond these are parameters of the reward itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    target: str
    weight: float = 1.0
    name: str | None = None
    normalise: bool = False  # by the mean and deviation of what it has scored so far
    gate: GateConfig | None = None

    @property
    def label(self) -> str:
        return self.name or self.target.replace(":", ".").rsplit(".", 1)[-1]

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _importable(self) -> Self:
        package = self.target.replace(":", ".").split(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"target: no module {package!r} can be found for {self.target!r}; is its folder on PYTHONPATH?"
            )
        return self


class VllmConfig(Section):
    """vLLM's own memory and limits, with `backend: vllm`."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5  # GPU: share for its weights and its KV cache
    kv_cache_gib: Count = 1  # CPU: memory for its KV cache, a process
    enforce_eager: bool | None = None  # without compiled graphs; null: on a CPU
    max_model_len: Count | None = None  # tokens of a prompt and its completion; null: as long as the run can need


class RolloutConfig(Section):
    backend: Literal["native", "vllm"] = "native"
    max_sequences: Count = 256  # completions that decode together
    vllm: VllmConfig = VllmConfig()

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if self.backend == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ValueError("backend: vllm is not installed; install it: bash scripts/setup.sh --vllm")
        return self

    def require(self, sampling: SamplingConfig) -> None:
        """Refuse what the backend cannot sample."""
        if self.backend == "vllm" and sampling.stop:
            raise ValueError(
                "sampling.stop: vLLM is given no tokenizer here; leave it out, or set rollout.backend: native"
            )


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu"] = "none"  # where the optimiser's state lives
    activation_checkpointing: bool = False


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 0  # steps; 0 keeps only the finished model
    keep: Count = 2
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


class StageConfig(Section):
    """What every stage has."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig
    training: TrainingConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: HeldOutConfig = HeldOutConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def run_root(self) -> Path:
        return self.run.dir / self.run.name

    @model_validator(mode="after")
    def _precision(self) -> Self:
        if self.model.dtype == "bfloat16" and self.engine.zero_stage == 0:
            raise ValueError(
                "model.dtype: bfloat16 keeps its float32 master weights in ZeRO: set engine.zero_stage to 1, 2 or 3"
            )
        if self.engine.offload == "cpu" and self.engine.zero_stage == 0:
            raise ValueError("engine.offload: cpu needs engine.zero_stage 1, 2 or 3")
        return self


class SFTConfig(StageConfig):
    """Stage 1: supervised fine-tuning."""

    max_length: Count = 2048  # tokens of prompt and completion; longer demonstrations are left out and counted
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _has_model(self) -> Self:
        if self.model.name_or_path is None and self.model.gguf is None and self.model.config is None:
            raise ValueError("model: stage 1 starts the pipeline: give one of name_or_path, gguf and config")
        _require_a_row_each(self.training)
        return self


class RewardConfig(StageConfig):
    """Stage 2: a reward model from preference groups, or a policy tuned on them."""

    method: Literal["agrpo", "bradley_terry", "dpo", "ipo", "cdpo", "robust_dpo"] = "agrpo"
    heads: Count = 1  # an ensemble on one backbone: each head leaves out another fifth of the groups
    kind: Literal["head", "implicit"] = "head"  # implicit: the score is α·log π/π_ref, and the model stays a policy
    max_length: Count = 2048
    objective: PreferenceLossConfig = PreferenceLossConfig()
    margin: Annotated[float, Field(ge=0)] = 0.0  # of score, asked of every pair
    centring: Annotated[float, Field(ge=0)] = 0.0  # weight of (s_i + s_j)², which keeps scores around 0
    lambda_: LambdaController = Field(LambdaController(value=0.9, target=0.3), alias="lambda")

    @model_validator(mode="after")
    def _trained_before(self) -> Self:
        _require_a_row_each(self.training)
        _refuse_new_model(self.model)
        if self.kind == "implicit" and self.heads > 1:
            raise ValueError("heads: an implicit reward has no heads; leave it 1, or set kind to head")
        if self.kind == "implicit" and self.centring:
            raise ValueError("centring: keeps a score head around 0; an implicit reward has nothing to centre: use 0")
        if self.kind == "head" and self.objective.loss == "ipo":
            raise ValueError("objective.loss: ipo compares log-ratios with the reference; use it with kind: implicit")
        if self.model.lora is not None and self.model.lora.dropout > 0 and self.kind == "implicit":
            raise ValueError("model.lora.dropout: log-ratios must not be noisy with kind: implicit; set it to 0")
        return self


class PolicyConfig(StageConfig):
    """Stage 3: policy optimisation."""

    method: Literal[
        "agrpo",
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "tic_grpo",
        "cppo",
        "gdpo",
        "krpo",
        "rloo",
        "reinforce_pp",
        "ppo",
    ] = "agrpo"
    sampling: StepSamplingConfig = StepSamplingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    controllers: ControllersConfig = ControllersConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    pruning: PruningConfig = PruningConfig()
    grouping: GroupingConfig = GroupingConfig()
    overlong: OverlongConfig = OverlongConfig()
    rewards: Annotated[list[RewardSpec], Field(min_length=1)]
    rollout: RolloutConfig = RolloutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def needs_critic(self) -> bool:
        return self.advantage.kind == "gae"

    @property
    def needs_reference(self) -> bool:
        """Is anything in the objective measured against the frozen reference?"""
        adaptive = self.controllers.beta.kind == "adaptive"
        penalised = self.objective.kl != "none" and (self.objective.beta > 0 or adaptive)
        grouped = self.controllers.lambda_.kind == "adaptive" or self.controllers.lambda_.value > 0
        return penalised or grouped

    @property
    def corrects_sampler(self) -> bool:
        """Is there a sampler whose forward is not the update's, and a correction for it?"""
        return self.rollout.backend != "native" and self.objective.sampler_correction != "none"

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and completion that the run can generate."""
        completion = self.sampling.max_completion_length
        if self.evaluation.data is not None or self.evaluation.test is not None:
            completion = max(completion, self.evaluation.max_completion_length)
        return self.sampling.max_prompt_length + completion

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts of one round of sampling: with `pruning.refill`, as many as the update can take completions of."""
        own, size = self.sampling.prompts_per_step, self.sampling.num_generations
        return own * size // kept_of(size, self.pruning.rate) if self.pruning.refill else own

    @model_validator(mode="after")
    def _tokens_or_groups(self) -> Self:
        kind, size = self.advantage.kind, self.sampling.num_generations
        if self.advantage.of_tokens:
            if self.pruning.rate > 0:
                raise ValueError(f"pruning.rate: ranks whole completions, and {kind} has an advantage for each token")
        elif size < 2:
            raise ValueError(f"sampling.num_generations: {size}; advantage.kind {kind} compares a group: at least 2")
        if self.objective.kl_in == "reward":
            if not self.advantage.of_tokens:
                raise ValueError(f"objective.kl_in: reward needs advantage.kind gae or reinforce_pp, not {kind}")
            if self.objective.kl != "reverse":
                raise ValueError("objective.kl_in: a penalty in the reward is KL(policy‖reference): set kl to reverse")
        group_loss, lambda_ = self.objective.group_loss, self.controllers.lambda_
        if group_loss.ranked is not None and lambda_.kind == "fixed" and lambda_.value == 0:
            raise ValueError(
                "objective.group_loss.ranked: has no effect without a group loss: set controllers.lambda.value above 0"
            )
        if group_loss.confidence == "ensemble" and len(self.rewards) < 2:
            raise ValueError("objective.group_loss.confidence: ensemble needs two rewards or more that vote")
        if self.pruning.refill and self.pruning.scope == "batch":
            raise ValueError("pruning.refill: counts on what is left of each group: set pruning.scope to group")
        return self

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        self.rollout.require(self.sampling)
        grouping, size = self.grouping, self.sampling.num_generations
        if grouping.kind == "adaptive" and not grouping.least <= size <= grouping.most:
            raise ValueError(
                "grouping: needs least ≤ sampling.num_generations ≤ most,"
                f" got {grouping.least}, {size} and {grouping.most}"
            )
        if grouping.kind != "fixed" and self.pruning.refill:
            raise ValueError("grouping.kind: fixes its own number of completions; set pruning.refill to false")
        if grouping.kind == "dynamic" and size < 2:
            raise ValueError("grouping.kind: dynamic looks for groups whose rewards differ: at least 2 generations")
        return self

    @model_validator(mode="after")
    def _group_sizes(self) -> Self:
        if self.sampling.prompts_per_step < world_size():
            raise ValueError(
                f"sampling.prompts_per_step: {self.sampling.prompts_per_step} prompts cannot feed {world_size()}"
                " processes; raise it or lower NPROC"
            )
        if self.objective.epsilon_high < self.objective.epsilon_low:
            raise ValueError(
                "objective.epsilon_high: smaller than epsilon_low; the clip range is [1 − low, 1 + high], high ≥ low"
            )
        if self.objective.kl == "none" and self.objective.beta > 0 and "beta" in self.objective.model_fields_set:
            raise ValueError("objective.beta: has no effect with kl: none; set kl, or beta to 0")
        if self.evaluation.data is not None and not self.evaluation.rewards:
            raise ValueError("evaluation.data: needs evaluation.rewards to grade completions")
        if self.model.lora is not None and self.model.lora.dropout > 0:
            raise ValueError(
                "model.lora.dropout: log-probabilities of the same tokens must not be noisy here; set it to 0"
            )
        _refuse_new_model(self.model)
        _require_temperatures(self.rollout, sampling=self.sampling, evaluation=self.evaluation)
        self._controllers_start_inside()
        _check_names(self.rewards)
        return self

    def _controllers_start_inside(self) -> None:
        for name, key, start, one, moves in (
            ("beta", "objective.beta", self.objective.beta, self.controllers.beta, self.objective.kl != "none"),
            (
                "epsilon",
                "objective.epsilon_low",
                self.objective.epsilon_low,
                self.controllers.epsilon,
                self.objective.updates_per_rollout > 1,
            ),
            ("entropy", "objective.entropy_coef", self.objective.entropy_coef, self.controllers.entropy, True),
        ):
            low, high = one.bounds
            if one.kind == "adaptive" and moves and not low <= start <= high:
                raise ValueError(
                    f"{key}: {start} is outside controllers.{name}.bounds [{low}, {high}];"
                    f" widen them, or set controllers.{name}.kind to fixed"
                )


def _check_names(rewards: list[RewardSpec]) -> None:
    names = [spec.label for spec in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards: two have the same name in {names}; tell them apart with name:")
    for spec in rewards:
        others = [name for name in names if name != spec.label]
        if spec.gate is not None and spec.gate.reward not in others:
            raise ValueError(f"rewards: the gate of {spec.label} is {spec.gate.reward!r}, which is none of {others}")


def _require_temperatures(rollout: RolloutConfig, **sections: SamplingConfig | EvaluationConfig) -> None:
    for name, section in sections.items():
        if rollout.backend == "vllm" and not 0.01 <= section.temperature <= 2:
            raise ValueError(
                f"{name}.temperature: vllm samples at 0.01 to 2, got {section.temperature}; use rollout.backend: native"
            )


def _refuse_new_model(model: ModelConfig) -> None:
    if model.config is not None:
        raise ValueError(
            "model.config: only stage 1 makes a model from a configuration; name a model that stage 1 trained"
        )


def _require_a_row_each(training: TrainingConfig) -> None:
    if training.batch_size < world_size():
        raise ValueError(f"training.batch_size: {training.batch_size} is smaller than the {world_size()} processes")


class PreferencesConfig(Section):
    """Preference groups for stage 2, sampled from a policy and ranked by rewards."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    rewards: Annotated[list[RewardSpec], Field(min_length=1)]
    rollout: RolloutConfig = RolloutConfig()
    held_out: Fraction = 0.2  # the share of the prompts that goes to test.jsonl
    confidence: Literal["none", "ensemble"] = "none"  # ensemble: the rewards vote, and rows say mean and deviation

    @model_validator(mode="after")
    def _voters(self) -> Self:
        self.rollout.require(self.sampling)
        if self.confidence == "ensemble" and len(self.rewards) < 2:
            raise ValueError("confidence: ensemble needs two rewards or more that vote; set it to none, or add one")
        _require_temperatures(self.rollout, sampling=self.sampling)
        _check_names(self.rewards)
        return self

    @property
    def run_root(self) -> Path:
        return self.run.dir / self.run.name

    @property
    def out(self) -> Path:
        return self.run_root / "preferences"


_FIXED = {"beta": {"kind": "fixed"}, "epsilon": {"kind": "fixed"}, "lambda": {"kind": "fixed", "value": 0.0}}
_GRPO = {
    "objective": {"kl": "forward", "aggregation": "sequence", "updates_per_rollout": 1},
    "advantage": {"kind": "group"},
    "controllers": _FIXED,
}
_CLIPPED = {"kl": "none", "beta": 0.0, "updates_per_rollout": 2}
METHODS: dict[str, dict[str, Any]] = {
    # A method is only a set of these settings, laid under what the user wrote.
    "agrpo": {},
    "grpo": _GRPO,
    "dr_grpo": {
        "objective": {"kl": "none", "beta": 0.0, "aggregation": "constant", "updates_per_rollout": 1},
        "advantage": {"kind": "none"},
        "controllers": _FIXED,
    },
    "dapo": {
        "objective": {**_CLIPPED, "aggregation": "token", "epsilon_high": 0.28},
        "advantage": {"kind": "group"},
        "grouping": {"kind": "dynamic"},
        "overlong": {"buffer": 0.2},
        "controllers": _FIXED,
    },
    "gspo": {
        "objective": {
            **_CLIPPED,
            "aggregation": "sequence",
            "ratio": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
        "advantage": {"kind": "group"},
        "controllers": _FIXED,
    },
    "tic_grpo": {
        "objective": {"kl": "forward", "aggregation": "sequence", "ratio": "trajectory", "updates_per_rollout": 2},
        "advantage": {"kind": "group"},
        "controllers": _FIXED,
    },
    "cppo": {**_GRPO, "pruning": {"rate": 0.5, "refill": True}},
    "gdpo": {**_GRPO, "advantage": {"kind": "gdpo"}},
    "krpo": {**_GRPO, "advantage": {"kind": "kalman_recursive"}},
    "rloo": {
        "objective": {"kl": "reverse", "aggregation": "constant", "updates_per_rollout": 1},
        "advantage": {"kind": "rloo"},
        "controllers": _FIXED,
    },
    "reinforce_pp": {
        "objective": {"kl": "reverse", "kl_in": "reward", "aggregation": "token", "updates_per_rollout": 2},
        "advantage": {"kind": "reinforce_pp"},
        "controllers": _FIXED,
    },
    "ppo": {
        "objective": {"kl": "reverse", "kl_in": "reward", "aggregation": "token", "updates_per_rollout": 4},
        "advantage": {"kind": "gae"},
        "controllers": _FIXED,
    },
}
_DPO = {"kind": "implicit", "lambda": {"kind": "fixed", "value": 1.0}}
_PAIRS = {"pair_weighting": "uniform", "implicit_reward": "sum", "alpha": 0.1}
PREFERENCE_METHODS: dict[str, dict[str, Any]] = {
    # The same for stage 2.
    "agrpo": {},
    "bradley_terry": {"objective": {"pair_weighting": "uniform"}, "lambda": {"kind": "fixed", "value": 1.0}},
    "dpo": {**_DPO, "objective": _PAIRS},
    "ipo": {**_DPO, "objective": {**_PAIRS, "loss": "ipo", "implicit_reward": "mean"}},
    "cdpo": {**_DPO, "objective": {**_PAIRS, "label_smoothing": 0.1}},
    "robust_dpo": {**_DPO, "objective": {**_PAIRS, "loss": "robust", "label_smoothing": 0.1}},
}

STAGES: dict[str, type[Section]] = {
    "sft": SFTConfig,
    "preferences": PreferencesConfig,
    "reward": RewardConfig,
    "agrpo": PolicyConfig,
}
_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def world_size() -> int:
    """Processes of this job, as torchrun or the launcher's environment says; 1 before either."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return count_from_environment("NPROC") * count_from_environment("NNODES")


def count_from_environment(name: str) -> int:
    """A positive number from the environment; 1 where it is not set."""
    text = os.environ.get(name) or "1"
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(f"environment: {name}={text} is not a positive number of processes or nodes")
    return int(text)


def load_config(stage: str, path: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Any:
    """The resolved configuration of a stage.

    Args:
        stage: sft, preferences, reward or agrpo.
        path: a YAML file; None takes the quickstart's.
        overrides: `key.path=value` strings, the value read as YAML; they win over the file.

    Raises:
        ConfigError: says file, key and the mend.
    """
    if stage == "preferences" and path is None:
        raise ConfigError(
            "preferences: has no default: give --config FILE, such as configs/smollm2-135m/preferences.yaml"
        )
    path = path or _CONFIGS / "quickstart" / f"{stage}.yaml"
    values = _with_method(stage, read_yaml(path), overrides)
    for override in overrides:
        set_path(values, override)
    values = _in_run(values, _run_root(values))
    try:
        config = STAGES[stage].model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, STAGES[stage], path)) from None
    return _with_previous_stage(config, path)


def _with_method(stage: str, values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The file's values with its method's settings under them; a method of the command line lies over the file."""
    presets = {"agrpo": METHODS, "reward": PREFERENCE_METHODS}.get(stage, {})
    named = [override for override in overrides if override.startswith("method=")]
    for override in named:
        set_path(values, override)
    method = values.get("method", "agrpo")
    settings = copy.deepcopy(presets.get(method, {})) if isinstance(method, str) else {}
    return merge(values, settings) if named else merge(settings, values)


def _run_root(values: dict[str, Any]) -> str:
    run = values.get("run")
    run = run if isinstance(run, dict) else {}
    defaults = RunConfig()
    return str(Path(str(run.get("dir", defaults.dir))) / str(run.get("name", defaults.name)))


def _in_run(value: Any, root: str) -> Any:
    """`{run}` in any text stands for the run's directory, so that one file serves runs of every name."""
    if isinstance(value, dict):
        return {key: _in_run(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_run(item, root) for item in value]
    return value.replace("{run}", root) if isinstance(value, str) else value


def _with_previous_stage(config: Any, path: Path) -> Any:
    """Fill in the model that the previous stage left, and check that every model of this run that is named exists."""
    model = config.model
    if model.name_or_path is None and model.gguf is None and model.config is None:
        model = model.model_copy(update={"name_or_path": str(config.run_root / "sft" / "model")})
        config = config.model_copy(update={"model": model})
    named = [("model.name_or_path", model.name_or_path)]
    if isinstance(config, PolicyConfig):
        config = config.model_copy(update={"rewards": _with_overlong(config)})
    if isinstance(config, PolicyConfig | PreferencesConfig):
        config = config.model_copy(update={"rewards": _with_reward_model(config.rewards, config)})
        named += [(f"rewards: {spec.label}", spec.parameters.get("model")) for spec in config.rewards]
    if isinstance(config, PolicyConfig | SFTConfig):
        rewards = _with_reward_model(config.evaluation.rewards, config)
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"rewards": rewards})})
        named += [(f"evaluation.rewards: {spec.label}", spec.parameters.get("model")) for spec in rewards]
    for key, name in named:
        if name and Path(name).parts[:1] == config.run.dir.parts[:1] and not Path(name).exists():
            stage = "stage2_reward" if "/reward/" in name else "stage1_sft"
            raise ConfigError(
                f"{path}: {key}: {name} does not exist; run the stage that makes it first: bash stages/{stage}/run.sh"
            )
    return config


def _with_overlong(config: PolicyConfig) -> list[RewardSpec]:
    """The rewards, and the punishment of overlong completions where it is asked for and not yet among them."""
    limit, overlong = config.sampling.max_completion_length, config.overlong
    if not overlong.buffer or any(spec.label == "overlong" for spec in config.rewards):
        return config.rewards
    buffer = max(1, round(overlong.buffer * limit))
    rule = {"target": "reward_models.rules.overlong", "weight": overlong.weight}
    return [*config.rewards, RewardSpec(**rule, limit=limit, buffer=buffer)]


def _with_reward_model(rewards: list[RewardSpec], config: Any) -> list[RewardSpec]:
    """A learned or implicit reward without models takes those that stages 2 and 1 of this run leave."""
    stages = {"model": str(config.run_root / "reward" / "model"), "reference": str(config.run_root / "sft" / "model")}
    wanted = {"reward_models.learned": ("model",), "reward_models.implicit": ("model", "reference")}
    return [
        RewardSpec(**{**{key: stages[key] for key in wanted.get(spec.target, ())}, **spec.model_dump()})
        for spec in rewards
    ]


def parse_command_line(stage: str, argv: list[str]) -> Any:
    """The configuration from `[--config FILE] [key.path=value …]`. Exits 0 after --print-config, 2 when it is wrong."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # rewards of one's own: torchrun's workers and console scripts do not look there
    parser = argparse.ArgumentParser(prog=f"stages/*{stage}*/run.sh", description=STAGES[stage].__doc__)
    parser.add_argument("--config", type=Path, help="a YAML file (default: the quickstart's)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(stage, arguments.config, arguments.overrides)
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if arguments.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config

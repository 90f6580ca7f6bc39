"""The configuration of each stage: its sections, and what must hold between them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agrpo.algorithms.grouping import kept_of
from agrpo.config.base import Count, Fraction, Section
from agrpo.config.common import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    HeldOutConfig,
    HubConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from agrpo.config.controllers import ControllersConfig, LambdaController
from agrpo.config.conversation import EnvironmentConfig
from agrpo.config.environment import world_size
from agrpo.config.objective import (
    AdvantageConfig,
    GroupingConfig,
    ObjectiveConfig,
    OverlongConfig,
    PreferenceLossConfig,
    PruningConfig,
)
from agrpo.config.rewards import RewardSpec, check_names
from agrpo.config.rollout import RolloutConfig, SamplingConfig, StepRolloutConfig, StepSamplingConfig


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
    hub: HubConfig = HubConfig()

    @property
    def run_root(self) -> Path:
        return self.run.dir / self.run.name

    def with_micro_batches(self, tokens: int) -> Self:
        """The same with micro-batches of another size."""
        return self.model_copy(update={"training": self.training.model_copy(update={"micro_batch_tokens": tokens})})

    @model_validator(mode="after")
    def _precision(self) -> Self:
        if self.model.dtype != "float32" and self.engine.zero_stage == 0:
            raise ValueError(
                f"model.dtype: {self.model.dtype} keeps its float32 master weights in ZeRO: set engine.zero_stage to 1,"
                " 2 or 3"
            )
        if self.model.quantization != "none" and self.engine.zero_stage == 3:
            raise ValueError("model.quantization: ZeRO-3 would cut the packed weights: set engine.zero_stage to 0 to 2")
        return self

    @model_validator(mode="after")
    def _resumable(self) -> Self:
        if self.engine.offload == "nvme" and self.checkpoint.every:
            raise ValueError(
                "checkpoint.every: DeepSpeed does not bring back all of a run with engine.offload: nvme: set it to 0,"
                " or engine.offload to cpu"
            )
        return self


class SFTConfig(StageConfig):
    """Stage 1: supervised fine-tuning."""

    max_length: Count = 2048  # tokens of prompt and completion; longer demonstrations are left out and counted
    evaluation: EvaluationConfig = EvaluationConfig()
    environment: EnvironmentConfig | None = None  # answers between the turns of what evaluation samples

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
    rollout: StepRolloutConfig = StepRolloutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    environment: EnvironmentConfig | None = None  # answers the policy between its turns

    @property
    def needs_critic(self) -> bool:
        return self.advantage.kind == "gae"

    @property
    def needs_reference(self) -> bool:
        """Is anything in the objective measured against the frozen reference?"""
        adaptive = self.controllers.beta.kind == "adaptive"
        penalised = self.objective.kl != "none" and (self.objective.beta > 0 or adaptive)
        grouped = self.controllers.lambda_.kind == "adaptive" or self.controllers.lambda_.value > 0
        return penalised or grouped or self.objective.watch_kl

    @property
    def corrects_sampler(self) -> bool:
        """Is there a sampler whose forward or weights are not the update's, and a correction for it?"""
        differs = self.rollout.backend not in ("native", "deepspeed") or self.rollout.ahead > 0
        return differs and self.objective.sampler_correction != "none"

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and completion that a sampler of the run is asked for.

        With an environment a later turn's prompt is what was said so far, and all turns are asked for together.
        """
        completion = self.sampling.max_completion_length
        if self.evaluation.data is not None or self.evaluation.test is not None:
            completion = max(completion, self.evaluation.max_completion_length)
        return self.sampling.max_prompt_length + (1 if self.environment is None else 2) * completion

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
        grouping, size = self.grouping, self.sampling.num_generations
        if grouping.kind == "adaptive" and not grouping.least <= size <= grouping.most:
            raise ValueError(
                "grouping: needs least ≤ sampling.num_generations ≤ most,"
                f" got {grouping.least}, {size} and {grouping.most}"
            )
        if grouping.kind != "fixed" and self.pruning.refill:
            raise ValueError("grouping.kind: fixes its own number of completions; set pruning.refill to false")
        if self.rollout.ahead and grouping.kind != "fixed":
            raise ValueError(
                f"rollout.ahead: {grouping.kind} groups are dealt out by rewards, which are not there a step ahead: set"
                " grouping.kind to fixed, or ahead to 0"
            )
        if self.rollout.ahead and self.objective.sampler_correction == "none":
            raise ValueError(
                "rollout.ahead: completions of older weights need their importance weights: set"
                " objective.sampler_correction to token, sequence or mask"
            )
        if self.rollout.ahead and self.environment is not None:
            raise ValueError("rollout.ahead: an environment answers while the policy samples: set rollout.ahead to 0")
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
        if self.objective.kl == "none" and self.objective.beta > 0:
            raise ValueError("objective.beta: has no effect with kl: none; set kl, or beta to 0")
        if self.evaluation.data is not None and not self.evaluation.rewards:
            raise ValueError("evaluation.data: needs evaluation.rewards to grade completions")
        if self.model.lora is not None and self.model.lora.dropout > 0:
            raise ValueError(
                "model.lora.dropout: log-probabilities of the same tokens must not be noisy here; set it to 0"
            )
        if self.engine.sample_from == "layers" and self.rollout.backend in ("vllm", "server"):
            raise ValueError(
                f"engine.sample_from: layers is native's way, and {self.rollout.backend} reads whole weights: set it to"
                " auto, or rollout.backend to native"
            )
        _refuse_new_model(self.model)
        _require_temperatures(self.rollout, sampling=self.sampling, evaluation=self.evaluation)
        self._controllers_start_inside()
        check_names(self.rewards)
        return self

    def _controllers_start_inside(self) -> None:
        for name, key, start, one, moves in (
            ("beta", "objective.beta", self.objective.beta, self.controllers.beta, self.objective.kl != "none"),
            (
                "epsilon",
                "objective.epsilon_low",
                self.objective.epsilon_low,
                self.controllers.epsilon,
                self.objective.updates_per_rollout > 1 and self.objective.clip,
            ),
            ("entropy", "objective.entropy_coef", self.objective.entropy_coef, self.controllers.entropy, True),
        ):
            low, high = one.bounds
            if one.kind == "adaptive" and moves and not low <= start <= high:
                raise ValueError(
                    f"{key}: {start} is outside controllers.{name}.bounds [{low}, {high}];"
                    f" widen them, or set controllers.{name}.kind to fixed"
                )


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
        if self.confidence == "ensemble" and len(self.rewards) < 2:
            raise ValueError("confidence: ensemble needs two rewards or more that vote; set it to none, or add one")
        _require_temperatures(self.rollout, sampling=self.sampling)
        check_names(self.rewards)
        return self

    @property
    def run_root(self) -> Path:
        return self.run.dir / self.run.name

    @property
    def out(self) -> Path:
        return self.run_root / "preferences"


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


STAGES: dict[str, type[Section]] = {
    "sft": SFTConfig,
    "preferences": PreferencesConfig,
    "reward": RewardConfig,
    "agrpo": PolicyConfig,
}

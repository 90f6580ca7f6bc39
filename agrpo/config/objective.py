"""What is learned from: losses, advantages, pruning, grouping."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from agrpo.config.base import Count, Fraction, Positive, Section
from agrpo.config.common import DataConfig


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
    clip: bool = True  # false: the plain ρ·A of every token, whatever its ratio
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
    watch_kl: bool = False  # keep the reference, and report the divergence from it, where no term of the loss needs it

    @model_validator(mode="before")
    @classmethod
    def _beta_of_nothing(cls, values: Any) -> Any:
        """Without a divergence β is 0 where none is given, so that what is dumped is what has an effect."""
        return {"beta": 0.0, **values} if isinstance(values, dict) and values.get("kl") == "none" else values

    @model_validator(mode="after")
    def _one_clip(self) -> Self:
        if self.dual_clip is not None and not self.clip:
            raise ValueError("dual_clip: a bound of the loss, where clip: false asks for none; leave out one of them")
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

"""HybridEngine: the one object that owns the weights. It trains through DeepSpeed and it generates."""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from agrpo.config import EngineConfig, RolloutConfig, TrainingConfig
from agrpo.engine import distributed
from agrpo.engine.backends.build import build_backend
from agrpo.engine.backends.native import Sampling
from agrpo.engine.backends.remote import RemoteBackend
from agrpo.engine.layout import Layout
from agrpo.engine.modules import Policy, Scorer, cast_weights, causal_lm
from agrpo.types import Prompt, Rollout

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.utils import safe_set_full_fp32_param

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # raised by DeepSpeed's own calls
# On a CPU DeepSpeed would compile a shared-memory collective at start-up: that takes a compiler, and gloo will do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


_COUNTS = ("weight_version", "skipped_steps", "skipped_in_a_row")  # in the checkpoint


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite. The weights are the last good step's."""


class HybridEngine:
    """One DeepSpeed engine around a Policy or a Scorer, shared by training and generation.

    Args:
        module: what learns. Its trainable parameters are those that require grad.
        engine, training, rollout: their sections of the configuration.
        longest: tokens of the longest prompt and completion to generate, where known.
        dtype: of the computation: float32, or bfloat16 over float32 master weights.
        tokenizer, stop: for generation: the texts, and the token ids that end a completion.
        with_reference: keep the weights as they are now as the frozen reference. With LoRA that is the base model with
            its adapters off, and costs nothing.
    """

    def __init__(
        self,
        module: Policy | Scorer,
        *,
        engine: EngineConfig,
        training: TrainingConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[int],
        rollout: RolloutConfig | None = None,
        longest: int | None = None,
        dtype: str = "float32",
        with_reference: bool = False,
    ) -> None:
        distributed.start()
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.weight_version = 0
        self.skipped_steps = self.skipped_in_a_row = 0  # optimiser steps whose gradient was not finite
        self.losses_finite = True  # of this rank, in the last or present optimiser step
        self._max_skipped, self._begun = training.max_skipped_steps, False
        self.device = distributed.device()
        self.zero_stage, self._clipping = engine.zero_stage, training.gradient_clipping
        policy = module if isinstance(module, Policy) else module.policy
        if engine.activation_checkpointing:
            causal_lm(policy.lm).gradient_checkpointing_enable({"use_reentrant": False})
        has_adapters = hasattr(policy.lm, "disable_adapter")
        kind = getattr(torch, dtype)
        self.reference: Policy | None = None
        if with_reference and not has_adapters:
            self.reference = cast_weights(copy.deepcopy(policy), kind).to(self.device).eval().requires_grad_(False)
        self._adapters_off = policy.lm.disable_adapter if with_reference and has_adapters else None
        # ZeRO-3 keeps each weight in shards: generation reads a whole copy, made anew when the weights have changed.
        self._whole = (
            cast_weights(copy.deepcopy(module), kind).to(self.device).eval() if engine.zero_stage == 3 else None
        )
        if engine.zero_stage == 3:
            deepspeed.zero.register_external_parameter(policy, policy.head)
            if isinstance(module, Scorer):
                deepspeed.zero.register_external_parameter(module, policy.head)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        halved = dtype != "float32"
        exact = {name: p.detach().clone() for name, p in module.named_parameters() if halved and p.requires_grad}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=_optimizer(module, training),
            config=_deepspeed_config(engine, training, dtype),
        )
        # DeepSpeed's cast to bfloat16 takes the rotary frequencies along, which the pretrained model holds in float32.
        for name, buffer in self._engine.module.named_buffers():
            buffer.data = buffers[name].to(buffer.device)
        # Its master weights start from that cast: all would lie on bfloat16's grid, and the first updates, smaller
        # than half a grid step, would move no weight of the computation.
        for name, parameter in self._engine.module.named_parameters():
            if name in exact:
                safe_set_full_fp32_param(parameter, exact.pop(name).to(self.device))
        self._backend = build_backend(
            rollout or RolloutConfig(), self.whole_policy, tokenizer=tokenizer, stop=self.stop, longest=longest
        )
        self._gathered = -1  # the weight version of the whole copy

    @property
    def module(self) -> Any:
        return self._engine.module

    @property
    def has_reference(self) -> bool:
        return self.reference is not None or self._adapters_off is not None

    # Training

    def train_mode(self) -> None:
        self._backend.rest()
        self._engine.train()

    def forward(self, layout: Layout, *args: Any) -> tuple[Tensor, ...]:
        """The module's forward with gradient."""
        self.train_mode()
        return self._engine(layout.to(self.device), *args)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the loss; `last` before the step.

        The loss is already divided by the global denominator: shares add up, over micro-batches and ranks alike.
        """
        if not self._begun:
            self._begun = self.losses_finite = True
        if not math.isfinite(float(loss.detach())):
            self.losses_finite = False
            loss = loss * math.nan  # an infinite loss may have a finite gradient: this one, all ranks will see
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * distributed.world(), scale_wrt_gas=False)  # DeepSpeed averages over the ranks

    def step(self, learning_rate: float) -> float:
        """One optimiser step; returns the gradient's global norm before clipping.

        A loss or gradient that is not finite on any rank skips the step on all of them: weights and optimiser stay as
        they are, and the norm that is returned is not finite.

        Raises:
            TrainingDiverged: more than `training.max_skipped_steps` steps in a row were skipped.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._begun = False
        norm, applied = self._step_whole() if self.zero_stage == 0 else self._step_sharded()
        if applied:
            self.weight_version += 1
            self.skipped_in_a_row = 0
            return norm
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self._max_skipped:
            raise TrainingDiverged(
                f"the gradient norm is {norm} at weight version {self.weight_version}, and"
                f" {self.skipped_in_a_row} steps in a row were not finite: lower training.learning_rate, or look at"
                " the batch in diverged.json; the last checkpoint is whole"
            )
        return norm

    def _step_whole(self) -> tuple[float, bool]:
        """The norm, and whether the step was taken: without ZeRO DeepSpeed neither tells the norm nor skips a step."""
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
        if distributed.max_over_ranks(int(not math.isfinite(norm))):
            self._engine.zero_grad()
            return norm if not math.isfinite(norm) else math.inf, False
        self._engine.step()
        return norm, True

    def _step_sharded(self) -> tuple[float, bool]:
        """The same of ZeRO 1 to 3, which decides on the norm over all ranks' shards and then drops the gradients."""
        self._engine.step()
        norm, applied = float(self._engine.get_global_grad_norm() or 0.0), self._engine.was_step_applied()
        if applied and not math.isfinite(norm):
            raise RuntimeError(f"DeepSpeed took a step with a gradient norm of {norm}: the weights are damaged")
        return norm, applied

    @torch.no_grad()
    def evaluate(self, layout: Layout, *args: Any) -> tuple[Tensor, ...]:
        """The module's forward without gradient."""
        self._engine.eval()
        return self._engine(layout.to(self.device), *args)

    @torch.no_grad()
    def reference_logprobs(self, layout: Layout, temperature: float = 1.0) -> Tensor:
        """(C,) log-probabilities under the frozen reference, nats."""
        if self.reference is not None:
            return self.reference(layout.to(self.device), temperature)[0]
        if self._adapters_off is None:
            raise RuntimeError("this engine was made without a reference")
        with self._adapters_off():
            return self.evaluate(layout, temperature)[0]

    # Generation

    def generation_mode(self) -> None:
        """Make the backend see the current weights."""
        self._engine.eval()
        if self._whole is not None and self._gathered != self.weight_version:
            for own, whole in zip(self.module.parameters(), self._whole.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([own]):
                    whole.data.copy_(own.data)
            self._gathered = self.weight_version
        self._backend.follow(self.weight_version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int = 0,
    ) -> Rollout:
        """counts[p] completions of each prompt, sampled from the current weights (`RolloutBackend.generate`)."""
        self.generation_mode()
        return self._backend.generate(prompts, counts, sampling, key, first)

    def begin_generating(
        self, prompts: Sequence[Prompt], counts: Sequence[int], sampling: Sampling, key: tuple[int, int]
    ) -> Callable[[], Rollout]:
        """`generate` with the weights as they are now; what is returned gives the rollout, also after an update.

        Servers sample meanwhile. A backend of this process has no time of its own: it samples before this returns.
        """
        self.generation_mode()
        if isinstance(self._backend, RemoteBackend):
            return self._backend.begin(prompts, counts, sampling, key)
        rollout = self._backend.generate(prompts, counts, sampling, key)
        return lambda: rollout

    @property
    def whole_module(self) -> Any:
        """The module with every weight in place; current after `generation_mode()`."""
        return self.module if self._whole is None else self._whole

    @property
    def whole_policy(self) -> Policy:
        """Its policy."""
        return self.whole_module if isinstance(self.whole_module, Policy) else self.whole_module.policy

    # Checkpoints

    def save_state(self, directory: str, tag: str) -> None:
        """Weights and optimiser, by DeepSpeed; every rank must call it."""
        state = {"agrpo": {name: getattr(self, name) for name in _COUNTS}}  # DeepSpeed has a skipped_steps of its own
        self._engine.save_checkpoint(directory, tag=tag, client_state=state, save_latest=False)

    def load_state(self, directory: str, tag: str) -> None:
        _, client_state = self._engine.load_checkpoint(directory, tag=tag)
        for name in _COUNTS:
            setattr(self, name, client_state["agrpo"][name])


def _optimizer(module: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=training.learning_rate, betas=training.betas, fused=True
    )


def _deepspeed_config(engine: EngineConfig, training: TrainingConfig, dtype: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # the stages cut micro-batches by tokens and own the boundary
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }

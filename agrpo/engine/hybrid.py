"""HybridEngine: the one object that owns the weights. It trains through DeepSpeed and it generates."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from agrpo import job
from agrpo.config import EngineConfig, RolloutConfig, TrainingConfig
from agrpo.engine import distributed, zero
from agrpo.engine.backends.build import build_backend, native_backend
from agrpo.engine.backends.deepspeed import SELF_TEST_TOKENS, DeepspeedBackend, why_not_sound
from agrpo.engine.backends.native import NativeBackend, Sampling
from agrpo.engine.backends.remote import RemoteBackend
from agrpo.engine.fused import fuse_layers
from agrpo.engine.layout import Layout
from agrpo.engine.memory import give_back, keep_freed
from agrpo.engine.modules import Policy, Scorer, cast_weights, causal_lm
from agrpo.engine.out_of_memory import is_out_of_memory
from agrpo.types import Ended, InputError, Prompt, Rollout, RolloutBackend

_ROOM = 0.5  # of the memory that is free at the start: a whole copy at ZeRO-3 may take this share
_COUNTS = ("weight_version", "skipped_steps", "skipped_in_a_row")  # in the checkpoint


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite. The weights are the last good step's."""


class HybridEngine:
    """One DeepSpeed engine around a Policy or a Scorer, shared by training and generation.

    Args:
        module: what learns. Its trainable parameters are those that require grad.
        engine, training, rollout: their sections of the configuration.
        longest: tokens of the longest prompt and completion to generate, where known.
        dtype: of the computation: float32, or bfloat16 or float16 over float32 master weights.
        tokenizer, stop: for generation: the texts, and the token ids that end a completion.
        with_reference: keep the weights as they are now as the frozen reference. With LoRA that is the base model with
            its adapters off, and costs nothing.
        note: where to say what a person should know.
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
        note: Callable[[str], None] = print,
    ) -> None:
        distributed.start()
        zero.require_dtype(dtype)
        zero.require_offload(engine)
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.weight_version = 0
        self.skipped_steps = self.skipped_in_a_row = 0  # optimiser steps whose gradient was not finite
        self.losses_finite = True  # of this rank, in the last or present optimiser step
        self._max_skipped, self._begun = training.max_skipped_steps, False
        self.device = distributed.device()
        self.zero_stage, self._clipping = engine.zero_stage, training.gradient_clipping
        self._resumable = engine.offload != "nvme"
        policy = module if isinstance(module, Policy) else module.policy
        rollout = rollout or RolloutConfig()
        kernels = rollout.backend == "deepspeed"
        against = why_not_sound(policy.lm, engine.zero_stage, zero.kernel_layers()) if kernels else []
        policy.fast = engine.fast and (not kernels or bool(against))  # kernels know the layers as transformers has them
        if policy.fast and policy.fallback_reason is None:
            fuse_layers(policy.lm)
        if engine.activation_checkpointing:
            causal_lm(policy.lm).gradient_checkpointing_enable({"use_reentrant": False})
        has_adapters = hasattr(policy.lm, "disable_adapter")
        kind, self._float16 = getattr(torch, dtype), dtype == "float16"
        self.reference_hash = _digest(policy) if with_reference else None
        self.reference: Policy | None = None
        if with_reference and not has_adapters:
            self.reference = cast_weights(copy.deepcopy(policy), kind).to(self.device).eval().requires_grad_(False)
        self._adapters_off = policy.lm.disable_adapter if with_reference and has_adapters else None
        # ZeRO-3 keeps each weight in shards. Generation reads a whole copy, made anew when the weights have changed;
        # where that does not fit it gathers one layer at a time, and a copy in main memory is made only to be saved.
        self._whole: Policy | Scorer | None = None
        self._layerwise = engine.zero_stage == 3 and _samples_layerwise(engine, rollout, module, kind)
        if engine.zero_stage == 3:
            self._whole = cast_weights(copy.deepcopy(module), kind).eval()
            if self._layerwise:
                for parameter in self._whole.parameters():
                    parameter.data = parameter.data.new_empty(0)
            else:
                self._whole.to(self.device)
            zero.reads_outside_its_module(policy, policy.head)
            if isinstance(module, Scorer):
                zero.reads_outside_its_module(module, policy.head)
        kernel_tokens = None
        if kernels and not against:
            kernel_tokens = max(SELF_TEST_TOKENS, longest or causal_lm(policy.lm).config.max_position_embeddings)
        self._engine = self._initialize(module, engine, training, dtype, kernel_tokens)
        self._files = zero.keep_files_in_memory(self._engine)
        sampled = _policy_of(self.module) if self._layerwise else self.whole_policy
        how = {"tokenizer": tokenizer, "stop": self.stop, "in_step": self._layerwise}
        if kernels:
            self._backend: RolloutBackend = DeepspeedBackend(
                sampled,
                kernels=None if against else zero.KernelRollout(self._engine, tokenizer),
                native=native_backend(rollout, sampled, **how),
                switch=self._switch_kernels,
                reason="; ".join(against),
                note=note,
            )
        else:
            self._backend = build_backend(rollout, sampled, longest=longest, **how)
        self._gathered = -1  # the weight version of the whole copy
        give_back()  # loading and casting the weights has held them several times
        if self.device.type == "cpu":
            keep_freed()

    def _initialize(
        self,
        module: Policy | Scorer,
        engine: EngineConfig,
        training: TrainingConfig,
        dtype: str,
        kernel_tokens: int | None,
    ) -> Any:
        """DeepSpeed's engine around the module, whose buffers and master weights keep their precision."""
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        halved = dtype != "float32"
        exact = {name: p.detach().clone() for name, p in module.named_parameters() if halved and p.requires_grad}
        made = zero.initialize(module, engine, training, dtype, kernel_tokens)
        cut = [name for name, p in module.named_parameters() if kernel_tokens and p.shape != shapes[name]]
        if cut:
            raise RuntimeError(f"DeepSpeed's kernels cut {', '.join(cut)} to another shape: use rollout.backend=native")
        # DeepSpeed's cast to bfloat16 takes the rotary frequencies along, which the pretrained model holds in float32.
        for name, buffer in made.module.named_buffers():
            buffer.data = buffers[name].to(buffer.device)
        # Its master weights start from that cast: all would lie on bfloat16's grid, and the first updates, smaller
        # than half a grid step, would move no weight of the computation.
        for name, parameter in made.module.named_parameters():
            if name in exact:
                zero.set_master_weight(parameter, exact.pop(name).to(self.device))
        return made

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
        job.enter("update")
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
        job.mark()
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
        if self._scale_may_fall:
            return norm
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self._max_skipped:
            raise TrainingDiverged(
                f"the gradient norm is {norm} at weight version {self.weight_version}, and"
                f" {self.skipped_in_a_row} steps in a row were not finite: lower training.learning_rate, or look at"
                " the batch in diverged.json; the last checkpoint is whole"
            )
        return norm

    @property
    def can_begin_again(self) -> bool:
        """Is the gradient that accumulates towards the next step this process's alone?"""
        return self.zero_stage == 0 and distributed.world() == 1

    def begin_again(self) -> None:
        """Forget the gradient that was accumulated towards the next step."""
        for parameter in self.module.parameters():
            parameter.grad = None
        self._begun = False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _scale_may_fall(self) -> bool:
        """float16: a step that overflows lowers DeepSpeed's loss scale; only at the least one is it a divergence."""
        return self._float16 and self._engine.optimizer.loss_scale > 1

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
        if not applied and math.isfinite(norm):
            norm = math.inf  # float16 that overflows leaves the norm of the step before
        if applied and not math.isfinite(norm):
            raise RuntimeError(f"DeepSpeed took a step with a gradient norm of {norm}: the weights are damaged")
        return norm, applied

    @torch.no_grad()
    def evaluate(self, layout: Layout, *args: Any) -> tuple[Tensor, ...]:
        """The module's forward without gradient."""
        self.module.eval()  # the engine's own eval() would put kernels in the layers' place
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

    def _switch_kernels(self, generating: bool) -> None:
        """DeepSpeed's kernels in the place of the layers, or the layers again; either way not in training mode."""
        if generating:
            self._engine.eval()
        else:
            self._engine.train()
            self.module.eval()

    def generation_mode(self) -> None:
        """Make the backend see the current weights."""
        self.module.eval()
        if not self._layerwise:
            self.gather()
        self._backend.follow(self.weight_version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int = 0,
        ended: Ended | None = None,
    ) -> Rollout:
        """counts[p] completions of each prompt, sampled from the current weights (`RolloutBackend.generate`).

        `ended` is told of completions as they end, by the native sampler alone; of all again where memory ran out.
        """
        job.enter("generate")
        self.generation_mode()
        told = {"ended": ended} if ended is not None and isinstance(self._backend, NativeBackend) else {}
        while True:
            try:
                return self._backend.generate(prompts, counts, sampling, key, first, **told)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._backend.shrink():
                    raise
            warnings.warn("out of memory in generation: half as many sequences at a time from here on", stacklevel=2)

    def begin_generating(
        self, prompts: Sequence[Prompt], counts: Sequence[int], sampling: Sampling, key: tuple[int, int]
    ) -> Callable[[], Rollout]:
        """`generate` with the weights as they are now; what is returned gives the rollout, also after an update.

        Servers sample meanwhile. A backend of this process has no time of its own: it samples before this returns.
        """
        job.enter("generate")
        self.generation_mode()
        if isinstance(self._backend, RemoteBackend):
            return self._backend.begin(prompts, counts, sampling, key)
        rollout = self._backend.generate(prompts, counts, sampling, key)
        return lambda: rollout

    @torch.no_grad()
    def gather(self) -> None:
        """Make `whole_module` current. Every rank must call it; layer by layer only rank 0 keeps what it sees."""
        if self._whole is None or self._gathered == self.weight_version:
            return
        keeps = not self._layerwise or distributed.rank() == 0
        for own, whole in zip(self.module.parameters(), self._whole.parameters(), strict=True):
            with zero.gathered([own]):
                if keeps and self._layerwise:
                    whole.data = own.data.to("cpu", copy=True)
                elif keeps:
                    whole.data.copy_(own.data)
        self._gathered = self.weight_version

    @property
    def whole_module(self) -> Any:
        """The module with every weight in place; current after `gather()`, which generation does unless layer by layer.

        Layer by layer it is in main memory, on rank 0 alone.
        """
        return self.module if self._whole is None else self._whole

    @property
    def whole_policy(self) -> Policy:
        """Its policy."""
        return _policy_of(self.whole_module)

    # Checkpoints

    def state_files(self, directory: str, tag: str) -> dict[str, bytes]:
        """This rank's files of weights and optimiser as they are now, by name; every rank must call it.

        They belong into `directory`/`tag`, where DeepSpeed itself puts what it offloads to NVMe.
        """
        state = {"agrpo": {name: getattr(self, name) for name in _COUNTS}}  # DeepSpeed has a skipped_steps of its own
        self._engine.save_checkpoint(directory, tag=tag, client_state=state, save_latest=False)
        return self._files.take()

    def load_state(self, directory: str, tag: str) -> None:
        """
        Raises:
            InputError: a file holds more than tensors and plain values, or the state was on a drive: DeepSpeed
                copies that back and skips all that it keeps in memory, small weights among it.
        """
        if not self._resumable:
            raise InputError(
                f"{directory}: a run with engine.offload: nvme cannot resume: start over with checkpoint.resume=false,"
                " or use engine.offload=cpu"
            )
        _, client_state = self._engine.load_checkpoint(directory, tag=tag)
        for name in _COUNTS:
            setattr(self, name, client_state["agrpo"][name])
        self._gathered = -1  # a version may come back with other weights


def _digest(policy: nn.Module) -> str:
    """SHA-256 over the weights, by name: which reference a run is measured against."""
    found = hashlib.sha256()
    for name, weight in policy.named_parameters():
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).flatten().numpy())
    return found.hexdigest()


def _policy_of(module: Any) -> Policy:
    return module if isinstance(module, Policy) else module.policy


def _samples_layerwise(
    engine: EngineConfig, rollout: RolloutConfig, module: Policy | Scorer, kind: torch.dtype
) -> bool:
    """Is there no room for a whole copy beside the shards, on any rank? Other programs read the copy."""
    if rollout.backend in ("vllm", "server"):
        return False
    if engine.sample_from != "auto":
        return engine.sample_from == "layers"
    needed = sum(p.numel() for p in module.parameters()) * kind.itemsize
    return bool(distributed.max_over_ranks(int(needed > _ROOM * distributed.free_memory())))

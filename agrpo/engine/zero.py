"""DeepSpeed, imported in this file alone: what the engine and the DeepSpeed backend need of it, under plain names."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root
from transformers import PreTrainedTokenizerBase

from agrpo.config import EngineConfig, TrainingConfig
from agrpo.engine.state_files import StateFiles
from agrpo.types import InputError

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.module_inject.replace_policy import replace_policies
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.rollout import HybridEngineRollout, RolloutRequest, SamplingConfig
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_set_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # raised by DeepSpeed's own calls
# On a CPU DeepSpeed would compile a shared-memory collective at start-up: that takes a compiler, and gloo will do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_GROUPS, _GROUP = 32, 1 << 22  # that the optimiser steps one after the other, and the numbers of the least
_NORM_PART = 1 << 20  # numbers of a gradient that stand in float64 at once
_CPU_BUCKET = 1 << 20  # numbers: the matrices of most models then go alone, uncopied
BUCKET = 50_000_000  # numbers of one reduction at most: its buffer, allocated whole, would else be ten times that


def initialize(
    module: nn.Module, engine: EngineConfig, training: TrainingConfig, dtype: str, kernel_tokens: int | None = None
) -> Any:
    """A DeepSpeed engine around the module; `kernel_tokens` has it generate by its own kernels, so many at most."""
    config = _config(module, engine, training, dtype)
    if kernel_tokens is not None:
        config["hybrid_engine"] = {"enabled": True, "max_out_tokens": kernel_tokens}
    optimizer = _optimizer(module, training, engine.zero_stage)
    made, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if isinstance(made.optimizer, DeepSpeedZeroOptimizer):
        _norm_by_parts(made.optimizer)
    return made


def _norm_by_parts(optimizer: DeepSpeedZeroOptimizer) -> None:
    """DeepSpeed copies each gradient to float64 for its norm, four times an embedding's bytes: have it take parts."""
    norm = optimizer.get_grad_norm_direct

    def by_parts(gradients: Iterable[Tensor], params: Iterable[nn.Parameter], norm_type: float = 2) -> Tensor:
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        pairs = [(part, p) for g, p in zip(real, params, strict=False) for part in g.flatten().split(_NORM_PART)]
        return norm([part for part, _ in pairs], [p for _, p in pairs], norm_type)

    optimizer.get_grad_norm_direct = by_parts


def keep_files_in_memory(made: Any) -> StateFiles:
    """What an engine saves and loads goes through the layer that is returned."""
    files = StateFiles([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    made.checkpoint_engine = files
    made._copy_recovery_script = lambda folder: None  # a program has no place among the weights
    return files


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Inside, these parameters of a ZeRO-3 module are whole. Every rank must enter it."""
    return deepspeed.zero.GatheredParameters(list(parameters))


def reads_outside_its_module(module: nn.Module, parameter: nn.Parameter) -> None:
    """Tell ZeRO-3 that this module's forward reads a parameter of another one."""
    deepspeed.zero.register_external_parameter(module, parameter)


def set_master_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """The float32 master weight of a parameter, whole, wherever ZeRO keeps it."""
    safe_set_full_fp32_param(parameter, value)


def kernel_layers() -> frozenset[type]:
    """The classes of transformers' layers that DeepSpeed's Hybrid Engine replaces by its own kernels to generate."""
    found: set[type] = set()
    for policy in replace_policies:
        policy(None)  # looks its layer class up
        known = policy._orig_layer_class
        found.update(known if isinstance(known, list) else [known] if known is not None else [])
    return frozenset(found)


class KernelRollout:
    """DeepSpeed's rollout interface on an engine: token ids in, token ids out."""

    def __init__(self, engine: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._rollout = HybridEngineRollout(engine, tokenizer)

    def __call__(self, ids: Tensor, mask: Tensor, length: int, **sampling: Any) -> Tensor:
        """(B, width) prompts padded on the left and their mask → (B, length) tokens; behind an end they mean nothing.

        sampling: temperature (0 is greedy), top_k, top_p.
        """
        request = RolloutRequest(prompt_ids=ids, prompt_attention_mask=mask)
        batch = self._rollout.generate(request, SamplingConfig(max_new_tokens=length, **sampling))
        return batch.input_ids[:, ids.shape[1] :]


def _optimizer(module: nn.Module, training: TrainingConfig, zero_stage: int) -> torch.optim.Optimizer:
    trainable = [p for p in module.parameters() if p.requires_grad]
    decays = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    # ZeRO 1 and 2 copy the gradient of one group at a time to float32: small groups keep that copy small.
    share = max(_GROUP, sum(p.numel() for p in trainable) // _GROUPS) if zero_stage in (1, 2) else 0
    groups = [{**group, "params": part} for group in decays for part in _parts(group["params"], share)]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def _parts(parameters: list[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Runs of parameters with `size` numbers and more, in order; all in one for 0."""
    parts: list[list[nn.Parameter]] = []
    count = 0
    for parameter in parameters:
        if not parts or (size and count >= size):
            parts.append([])
            count = 0
        parts[-1].append(parameter)
        count += parameter.numel()
    return parts


def _config(module: nn.Module, engine: EngineConfig, training: TrainingConfig, dtype: str) -> dict[str, Any]:
    # A bucket is a buffer of its full size on a GPU: more than the gradients there are would be wasted.
    bucket = min(BUCKET, sum(p.numel() for p in module.parameters() if p.requires_grad))
    bucket += bucket % 2  # DeepSpeed's alignment
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if engine.zero_stage == 1 and deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        # Gradients stay where they are made: copied side by side they would cost two passes over fresh pages.
        zero |= {"contiguous_gradients": False, "reduce_bucket_size": min(bucket, _CPU_BUCKET)}
    if engine.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = engine.param_persistence_threshold
    if engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload == "nvme":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(engine.offload_path)}
    return {
        "train_micro_batch_size_per_gpu": 1,  # the stages cut micro-batches by tokens and own the boundary
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
        "fp16": {"enabled": dtype == "float16", "initial_scale_power": 16, "hysteresis": 1, "min_loss_scale": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def require_offload(engine: EngineConfig) -> None:
    """Refuse an offload for which something is missing here, before anything is made."""
    if engine.offload == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
        raise InputError(
            "engine.offload: nvme needs libaio and a C++ compiler, which DeepSpeed does not find: on Debian"
            " apt-get install libaio-dev g++ ninja-build, or use engine.offload=cpu"
        )


def about_offload(engine: EngineConfig) -> list[str]:
    """Notes before an offload whose I/O DeepSpeed compiles without a word, or waits for."""
    if engine.offload != "nvme":
        return []
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    lock = next((lock for name in ("async_io", "pin_memory") for lock in root.rglob(f"{name}/lock")), None)
    if lock is not None:
        return [
            f"engine.offload: nvme: DeepSpeed will wait for another process, which compiles its I/O as {lock} says:"
            " if none is left, remove that file"
        ]
    here = str(Path(deepspeed.__file__).parent)  # what another installation has compiled is compiled again
    if any(
        here in rules.read_text() and (rules.parent / "async_io.so").exists() for rules in root.rglob("build.ninja")
    ):
        return []
    return ["engine.offload: nvme: DeepSpeed compiles its asynchronous I/O first, once, which takes minutes"]


def require_dtype(dtype: str) -> None:
    """Refuse a precision that DeepSpeed does not compute with on this device, before anything is made."""
    accelerator = deepspeed.accelerator.get_accelerator()
    if dtype == "float16" and not accelerator.is_fp16_supported():
        raise InputError(
            f"model.dtype: float16: DeepSpeed does not compute with it on this {accelerator.device_name()};"
            " use bfloat16, or float32"
        )

"""Does a configuration fit this machine? Memory of one rank and a step's time at full speed, nothing loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from agrpo.config import PolicyConfig, PreferencesConfig, RewardConfig, world_size
from agrpo.doctor import memory, timing
from agrpo.doctor.machine import capacity
from agrpo.doctor.memory import Batch, Shape
from agrpo.doctor.timing import Speeds
from agrpo.engine import zero
from agrpo.engine.attention import head_size, why_not_flat
from agrpo.engine.backends.build import require_backend
from agrpo.known_models import ARCHITECTURES
from agrpo.models import ModelError, gguf_file, make_trainable
from agrpo.types import InputError

_CHARACTERS = 128  # a character tokenizer's vocabulary before it has seen the data


@dataclass(frozen=True)
class Setting:
    """What of a configuration memory depends on; a stage that only samples has no training."""

    shape: Shape
    batch: Batch
    rows: int  # completions that decode together
    prompt: int
    completion: int  # 0: nothing is sampled
    bytes: int
    zero: int
    offload: bool
    checkpointing: bool
    reference: bool
    trains: bool
    world: int
    flat: bool
    cuda: bool
    quantized: bool = False  # the frozen weights, to 4 bits
    layerwise: bool = False  # ZeRO-3 samples from its shards


def architecture(config: Any) -> PreTrainedConfig:
    """The model's configuration, without its weights; the Hub is not asked about models that are known."""
    model = config.model
    if model.name_or_path in ARCHITECTURES and not Path(model.name_or_path).exists():
        known = dict(ARCHITECTURES[model.name_or_path])
        return AutoConfig.for_model(known.pop("model_type"), **known)
    if model.config is not None:
        values = dict(model.config)
        found = AutoConfig.for_model(values.pop("model_type"), **values)
        spoken = model.tokenizer
        found.vocab_size = spoken.vocab_size if spoken.kind == "bpe" else _CHARACTERS
        return found
    try:
        if model.gguf is not None:
            path = gguf_file(model.gguf)
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"model: {model.name_or_path or model.gguf} cannot be read: {reason}") from None


def shape_of(config: Any, found: PreTrainedConfig) -> Shape:
    """Counted on a model without storage, adapters and frozen layers as in the run."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(found)
    lm = make_trainable(lm, config.model)
    heads = found.num_attention_heads
    size = head_size(found)
    return Shape(
        parameters=sum(p.numel() for p in lm.parameters()),
        trainable=sum(p.numel() for p in lm.parameters() if p.requires_grad),
        hidden=found.hidden_size,
        query=size * heads,
        key=size * (getattr(found, "num_key_value_heads", None) or heads),
        intermediate=getattr(found, "intermediate_size", None) or 4 * found.hidden_size,
        layers=found.num_hidden_layers,
        vocabulary=found.vocab_size,
        tied=bool(found.tie_word_embeddings),
    )


def setting(config: Any, found: PreTrainedConfig) -> Setting:
    """Of any stage's configuration; every text at its longest."""
    world, shape = world_size(), shape_of(config, found)
    flat = why_not_flat(found) is None
    quantized = config.model.quantization != "none"
    common = {"quantized": quantized, "shape": shape, "world": world, "flat": flat, "cuda": torch.cuda.is_available()}
    if isinstance(config, PreferencesConfig):
        s = config.sampling
        nothing = Batch(0, s.num_generations, s.max_prompt_length, s.max_completion_length)
        plain = {"zero": 0, "offload": False, "checkpointing": False, "reference": False, "trains": False}
        lengths = {"prompt": s.max_prompt_length, "completion": s.max_completion_length}
        width = 2 if config.model.dtype != "float32" else 4
        return Setting(batch=nothing, rows=config.rollout.max_sequences, bytes=width, **lengths, **plain, **common)
    reference = False
    if isinstance(config, PolicyConfig):
        s = config.sampling
        samples, prompt, completion = s.num_generations, s.max_prompt_length, s.max_completion_length
        prompts = math.ceil(config.prompts_per_rollout / world)
        rows, reference = min(config.rollout.max_sequences, prompts * samples), config.needs_reference
        sampled = completion
    else:
        samples = 2 if isinstance(config, RewardConfig) else 1
        prompt = config.max_length // 2
        completion, prompts = config.max_length - prompt, math.ceil(config.training.batch_size / world)
        rows = sampled = 0
        if isinstance(config, RewardConfig):
            reference = config.kind == "implicit"
        elif config.evaluation.data is not None or config.evaluation.test is not None:
            rows, sampled = 256, config.evaluation.max_completion_length
    groups = max(1, config.training.micro_batch_tokens // (prompt + samples * completion))
    return Setting(
        batch=Batch(min(groups, prompts), samples, prompt, completion),
        rows=rows,
        prompt=prompt,
        completion=sampled,
        bytes=2 if config.model.dtype != "float32" else 4,
        zero=config.engine.zero_stage,
        offload=config.engine.offload != "none",
        checkpointing=config.engine.activation_checkpointing,
        reference=reference and config.model.lora is None,
        trains=True,
        layerwise=config.engine.sample_from == "layers",
        **common,
    )


def parts(s: Setting) -> dict[str, int]:
    """Bytes of one rank by what they are for."""
    p, t, b = s.shape.parameters, s.shape.trainable, s.bytes
    own = memory.quantized_weights(s.shape, b) if s.quantized else memory.weights(p, b, s.zero, s.world)
    found = {"weights": own}
    if s.trains:
        found |= {
            "float32 master weights": memory.master(t, s.zero, s.world),
            "Adam's moments": memory.adam(t, s.zero, s.world),
            "gradients": memory.gradients(t, b, s.zero, s.world),
            "reduction buffer": memory.bucket(t, b, s.zero, s.cuda),
            "reference": b * p if s.reference else 0,
            "whole copy of ZeRO-3": b * p if s.zero == 3 and not s.layerwise else 0,
            "activations": memory.activations(s.shape, s.batch, b, s.checkpointing),
            "logits": memory.logits(s.shape, s.batch, b, s.cuda),
        }
    found["key-value cache"] = memory.kv_cache(s.shape, s.rows, s.prompt, s.completion, b) if s.completion else 0
    return found


_OF_UPDATE = ("gradients", "reduction buffer", "activations", "logits")
_OFFLOADED = ("float32 master weights", "Adam's moments")


def totals(s: Setting) -> tuple[int, int]:
    """(device, host) bytes of one rank at the worst moment: an update or the sampling, never both at once.

    On a CPU the device is the host, and everything is in the first.
    """
    found = parts(s)
    update = sum(found.get(name, 0) for name in _OF_UPDATE)
    rest = sum(size for name, size in found.items() if name not in (*_OF_UPDATE, "key-value cache"))
    host = sum(found.get(name, 0) for name in _OFFLOADED) if s.offload and s.cuda else 0
    return rest - host + max(update, found["key-value cache"]), host


_KNOBS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "model.lora={rank: 16}": lambda s: {"shape": _with_adapters(s.shape), "reference": False},
    "model.dtype=bfloat16 with engine.zero_stage 1 or more": lambda s: {"bytes": 2, "zero": max(1, s.zero)},
    "engine.activation_checkpointing=true": lambda s: {"checkpointing": True},
    "training.micro_batch_tokens of one group": lambda s: {"batch": Batch(**{**asdict(s.batch), "groups": 1})},
    "rollout.max_sequences halved": lambda s: {"rows": s.rows // 2},
    "engine.zero_stage=2": lambda s: {"zero": 2} if s.zero < 2 else {},
    "engine.zero_stage=3": lambda s: {"zero": 3},
    "engine.sample_from=layers": lambda s: {"layerwise": s.zero == 3},
    "engine.offload=cpu": lambda s: {"offload": True, "zero": max(1, s.zero)},
}


def _with_adapters(shape: Shape) -> Shape:
    wide = 7 * 16 * 2 * shape.hidden + 3 * 16 * shape.intermediate  # about: seven linear maps a layer, rank 16
    added = min(shape.trainable, shape.layers * wide)
    return Shape(**{**asdict(shape), "trainable": added})


def savings(s: Setting) -> Iterator[tuple[str, int]]:
    """Each setting that would make the device's total smaller, and by how many bytes; largest first."""
    now, _ = totals(s)
    saved = [(name, now - totals(Setting(**{**vars(s), **change(s)}))[0]) for name, change in _KNOBS.items()]
    yield from sorted((one for one in saved if one[1] > 0.01 * now), key=lambda one: -one[1])


def seconds_of_a_step(s: Setting, config: Any, speeds: Speeds) -> dict[str, float]:
    """What a step's sampling and its update take by the formulas, for texts at their longest."""
    found = {}
    policy = isinstance(config, PolicyConfig)
    if s.completion and policy:
        own = math.ceil(config.prompts_per_rollout / s.world) * s.batch.samples
        rows = min(own, max(1, s.rows))
        found["sampling"] = (own / rows) * timing.sampling_seconds(
            s.shape, rows, rows / s.batch.samples, s.prompt, config.sampling.max_completion_length, s.bytes, speeds
        )
    if not s.trains:
        return found
    prompts = math.ceil((config.prompts_per_rollout if policy else config.training.batch_size) / s.world)
    batches = math.ceil(prompts / s.batch.groups)
    batch = Batch(**{**asdict(s.batch), "groups": prompts / batches})
    kept = memory.activations(s.shape, batch, s.bytes, False)
    one = timing.update_seconds(s.shape, batch, kept, s.checkpointing, speeds)
    learned = s.shape.trainable / (s.world if s.zero else 1)
    updates = config.objective.updates_per_rollout if policy else 1
    found["update"] = updates * (batches * one + timing.optimiser_seconds(learned, speeds))
    if policy and config.needs_reference:
        found["update"] += batches * timing.forward_seconds(s.shape, batch, kept, speeds)
    return found


def times(s: Setting, config: Any, speeds: Callable[[torch.dtype, int, int], Speeds]) -> dict[str, Any]:
    """`seconds` of a step, by what they are for, and of the whole `run`: the least and the most of each."""
    own = speeds(torch.bfloat16 if s.bytes == 2 else torch.float32, s.shape.hidden, s.shape.intermediate)
    told = seconds_of_a_step(s, config, own)
    found = {name: [slack * told[name] for slack in timing.SLACK[name]] for name in told}
    run = [sum(ends) * config.training.max_steps for ends in zip(*found.values(), strict=True)] if s.trains else None
    return {"seconds": found, "run_seconds": run}


def _free(machine: dict[str, Any]) -> tuple[int, float]:
    """(of the device, of main memory beside it) free bytes for each process; on a CPU the second is no limit."""
    own = machine["memory"]["free"] // int(os.environ.get("NPROC") or 1)
    gpus = machine["devices"]
    return (min(device["free"] for device in gpus), own) if gpus else (own, math.inf)


def require_possible(config: Any, found: PreTrainedConfig) -> None:
    """Refuse what this machine's libraries cannot do with this model, before a weight is loaded.

    Raises:
        InputError: what is missing, and what to do.
    """
    if hasattr(config, "engine"):
        zero.require_dtype(config.model.dtype)
        zero.require_offload(config.engine)
    if hasattr(config, "rollout"):
        require_backend(config.rollout, found)


def before_loading(config: Any) -> list[str]:
    """What a stage asks first: it refuses what cannot run here, and returns notes: what may not fit, what would help.

    Raises:
        InputError: as `require_possible`.
    """
    try:
        found = architecture(config)
    except ModelError:
        return []  # the stage itself is about to say so
    require_possible(config, found)
    notes = zero.about_offload(config.engine) if hasattr(config, "engine") else []
    return [*notes, *_warnings(setting(config, found))]


def _warnings(s: Setting) -> list[str]:
    (device, host), (free, host_free) = totals(s), _free(capacity())
    if device <= free and host <= host_free:
        return []
    lacks, of = (device, free) if device > free else (host, int(host_free))
    helps = [name for name, saved in savings(s) if device - saved <= free] or [name for name, _ in savings(s)]
    mend = f"; what would help: {', '.join(helps[:3])}" if helps else ""
    return [
        f"WARNING: this may not fit: about {lacks / 2**30:.1f} GiB for each process at the longest texts,"
        f" and {of / 2**30:.1f} GiB are free{mend} (agrpo doctor --config)"
    ]


def estimate(config: Any, machine: dict[str, Any], speeds: Callable[[torch.dtype, int, int], Speeds]) -> dict:
    """JSON values: parts, totals, what is free, whether it fits, what helps, and time.

    Args:
        speeds: measures this machine for a dtype, hidden and intermediate size.
    """
    found = architecture(config)
    s = setting(config, found)
    device, host = totals(s)
    free, host_free = _free(machine)
    notes = ["memory and time are for texts at their longest; time is without rewards, evaluation and start-up"]
    try:
        require_possible(config, found)
    except InputError as error:
        notes.append(f"WARNING: this cannot run here: {error}")
    if not s.flat:
        notes.append(f"plain rows ({why_not_flat(found)}): activations and logits are larger than told here")
    if host > host_free:
        notes.append(f"the offloaded state needs {host} bytes of main memory for each process, more than is free")
    helps = [{"setting": name, "saves": size, "enough": device - size <= free} for name, size in savings(s)]
    return {
        "model": {"family": found.model_type, **asdict(s.shape)},
        "processes": s.world,
        "parts": parts(s),
        "total": device,
        "host": host,
        "free": free,
        "fits": device <= free and host <= host_free,
        "helps": helps,
        **times(s, config, speeds),
        "notes": notes,
    }

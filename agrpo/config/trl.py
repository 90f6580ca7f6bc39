"""TRL's flat keys in a file become agrpo's sections; `trl_names` has the tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from agrpo.config.environment import world_size
from agrpo.config.stages import STAGES
from agrpo.config.trl_names import (
    ANYWAY,
    COMPOSED,
    INSTEAD,
    LORA,
    LOSSES,
    MODES,
    NAMES,
    OTHERS,
    PREFERENCE_LOSSES,
    REWARDS,
    SCALES,
    SCHEDULES,
)
from agrpo.yaml_input import ConfigError


def translate(
    values: dict[str, Any], stage: str, where: str, under: dict[str, Any], note: Callable[[str], None]
) -> dict[str, Any]:
    """A file's values with TRL's flat keys in agrpo's sections.

    Args:
        where: the file, for errors.
        under: what it extends, for what a flat key depends on.
        note: is told of each key, and what stands for it.

    Raises:
        ConfigError: a key has no counterpart, or its counterpart is in the file too.
    """
    flat = {key: value for key, value in values.items() if is_flat(key, stage)}
    sections = {key: value for key, value in values.items() if key not in flat}
    left = _Flat({key: value for key, value in flat.items() if value is not None}, stage, where, under, sections)
    mapped = _mapped(left)
    for path, (value, sources) in mapped.items():
        names = " and ".join(sources)
        if left.nested(path) is not None:
            raise ConfigError(f"{where}: {names}: {path} is set in the same file; keep one of them")
        section = sections
        for part in path.split(".")[:-1]:
            inside = section.get(part) or {}
            if not isinstance(inside, dict):
                raise ConfigError(f"{where}: {part}: holds {_short(inside)} where {path} belongs; make it a section")
            section[part] = section = dict(inside)
        section[path.split(".")[-1]] = value
        said = ", ".join(f"{name}: {_short(flat[name])}" for name in sources)
        note(f"{where}: {said} → {path}: {_short(value)}")
    for key in left.flat:
        accepted, why = ANYWAY.get(key, ((), ""))
        if accepted is not None and flat[key] not in accepted:
            instead = INSTEAD.get(key, f"agrpo has only this: {why}" if why else "leave it out")
            raise ConfigError(f"{where}: {key}: {_short(flat[key])}: TRL's, without a counterpart here: {instead}")
        note(f"{where}: {key}: {_short(flat[key])} changes nothing: {why}")
    for key in flat.keys() - left.flat.keys() - {name for _, sources in mapped.values() for name in sources}:
        note(f"{where}: {key}: {_short(flat[key])} changes nothing: so it is without it")
    return sections


def is_flat(key: str, stage: str) -> bool:
    """Is this a name of TRL's, accepted or refused, and none that the stage has itself?"""
    ours = {field.alias or name for name, field in STAGES[stage].model_fields.items()}
    return key not in ours and any(key in names for names in (NAMES.get(stage, ()), ANYWAY, INSTEAD, OTHERS, COMPOSED))


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


class _Flat:
    """The flat keys that are left, taken away one by one, and what they can be looked up beside."""

    def __init__(
        self, flat: dict[str, Any], stage: str, where: str, under: dict[str, Any], sections: dict[str, Any]
    ) -> None:
        self.flat, self.stage, self.where = flat, stage, where
        self._under, self._sections = under, sections

    def __contains__(self, key: str) -> bool:
        return key in self.flat

    def take(self, key: str, default: Any = None) -> Any:
        return self.flat.pop(key, default)

    def nested(self, path: str, under: bool = False) -> Any:
        """What the file's own sections say, or with `under` else those that it extends; None where nothing does."""
        for section in (self._sections, self._under) if under else (self._sections,):
            here: Any = section
            for part in path.split("."):
                here = here.get(part) if isinstance(here, dict) else None
            if here is not None:
                return here
        return None

    def choose(self, key: str, choices: dict[Any, Any]) -> Any:
        value = self.take(key)
        if not any(value == one for one in choices):
            known = ", ".join(map(_short, choices))
            raise ConfigError(f"{self.where}: {key}: {_short(value)} has no counterpart here; there are {known}")
        return choices[value]

    def number(self, key: str, default: Any = None) -> Any:
        value = self.take(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise self.refuse(key, f"{_short(value)} is not a number of 0 or more")
        return value

    def refuse(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key}: {why}")


Mapped = dict[str, tuple[Any, tuple[str, ...]]]  # our path → (value, TRL's names)


def _mapped(left: _Flat) -> Mapped:
    """Everything that has a counterpart, taken out of `left`."""
    found: Mapped = {}
    for part in (_run, _model, _schedule, _batch, *_OF_STAGE.get(left.stage, ())):
        found |= part(left)
    for key, path in NAMES.get(left.stage, {}).items():
        if key in left and (value := left.take(key)) is not None:
            if path in found:
                raise left.refuse(key, f"{' and '.join(found[path][1])} says {path} too; keep one of them")
            found[path] = (value, (key,))
    return found


def _run(left: _Flat) -> Mapped:
    if "output_dir" not in left:
        return {}
    folder = PurePath(str(left.take("output_dir")))
    if "run_name" in left:
        return {"run.dir": (str(folder), ("output_dir",))}
    return {"run.dir": (str(folder.parent), ("output_dir",)), "run.name": (folder.name, ("output_dir",))}


def _model(left: _Flat) -> Mapped:
    found: Mapped = {}
    for key in ("dtype", "torch_dtype"):
        if key in left:
            found["model.dtype"] = (left.choose(key, {n: n for n in ("float32", "bfloat16")}), (key,))
    if "bf16" in left and left.take("bf16"):
        found["model.dtype"] = ("bfloat16", ("bf16",))
    if found.get("model.dtype", ("",))[0] == "bfloat16" and left.nested("engine.zero_stage", under=True) is None:
        found["engine.zero_stage"] = (1, found["model.dtype"][1])  # where the float32 master weights are
    if left.flat.get("load_in_4bit") is False:
        left.take("load_in_4bit")
    adapters = {key: left.take(key) for key in LORA if key in left}
    if left.take("use_peft"):
        rank = adapters.pop("lora_r", None)
        found["model.lora.rank"] = (16, ("use_peft",)) if rank is None else (rank, ("use_peft", "lora_r"))
        found |= {LORA[key]: (value, (key,)) for key, value in adapters.items()}
        if left.take("load_in_4bit"):
            found["model.quantization"] = ("nf4", ("load_in_4bit",))
    elif adapters:
        raise left.refuse(min(adapters), "has no effect without use_peft: true; add that, or leave it out")
    return found


def _schedule(left: _Flat) -> Mapped:
    found: Mapped = {}
    if "lr_scheduler_type" in left:
        found["training.lr_scheduler_type"] = (left.choose("lr_scheduler_type", SCHEDULES), ("lr_scheduler_type",))
        if left.nested("training.min_lr_ratio", under=True) is None:
            found["training.min_lr_ratio"] = (0.0, ("lr_scheduler_type",))  # TRL's schedules end at 0
    if "warmup_steps" in left:
        steps, total = (
            left.number("warmup_steps"),
            left.flat.get("max_steps") or left.nested("training.max_steps", True),
        )
        if steps >= 1 and not total:
            raise left.refuse("warmup_steps", "counts steps, and max_steps is not given; set warmup_ratio")
        found["training.warmup_ratio"] = (steps if steps < 1 else steps / total, ("warmup_steps",))
    betas = tuple(key for key in ("adam_beta1", "adam_beta2") if key in left)
    if betas:
        found["training.betas"] = ([left.take("adam_beta1", 0.9), left.take("adam_beta2", 0.999)], betas)
    for what, section in (("save", "checkpoint"), ("eval", "evaluation")):
        if left.flat.get(f"{what}_strategy") == "no":
            for key in ("strategy", "steps"):
                left.take(f"{what}_{key}")
            found[f"{section}.every"] = (0, (f"{what}_strategy",))
        elif f"{what}_steps" in left:
            found[f"{section}.every"] = (left.take(f"{what}_steps"), (f"{what}_steps",))
    return found


def _batch(left: _Flat) -> Mapped:
    """TRL counts a device's rows (in GRPO completions), agrpo a step's over all processes (in stage 3 prompts)."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size")
    given = tuple(key for key in (*names, "steps_per_generation") if key in left)
    if not given:
        return {}
    accumulated, whole = left.number(names[1], 1), left.number(names[2])
    device, rounds = left.number(names[0]), left.number("steps_per_generation", accumulated)
    if device is None and whole is None:
        raise left.refuse(given[0], "needs per_device_train_batch_size beside it")
    if left.stage != "agrpo":
        return {"training.batch_size": (device * accumulated * world_size(), given)}
    if rounds != accumulated and whole is None:
        raise left.refuse("steps_per_generation", "a step here samples once; leave it out")
    if whole is not None and device is not None and whole != device * accumulated * world_size():
        raise left.refuse("generation_batch_size", "a step here samples once; leave it out")
    completions = whole or device * accumulated * world_size()
    size = left.flat.get("num_generations") or left.nested("sampling.num_generations", under=True) or 8
    if completions % size:
        raise left.refuse(
            given[0], f"{completions} completions a step on {world_size()} processes are no whole groups of {size}"
        )
    return {"sampling.prompts_per_step": (completions // size, given)}


def _objective(left: _Flat) -> Mapped:
    found: Mapped = {}
    if "epsilon" in left or "epsilon_high" in left:
        low, high = left.take("epsilon"), left.take("epsilon_high")
        if low is not None:
            found["objective.epsilon_low"] = (low, ("epsilon",))
        if high is not None or low is not None:
            own = "epsilon" if high is None else "epsilon_high"  # TRL's upper end is the lower one's unless it is given
            found["objective.epsilon_high"] = (low if high is None else high, (own,))
    if "loss_type" in left:
        found["objective.aggregation"] = (left.choose("loss_type", LOSSES), ("loss_type",))
    if "scale_rewards" in left:
        found["advantage.kind"] = (left.choose("scale_rewards", SCALES), ("scale_rewards",))
    if "multi_objective_aggregation" in left:
        kind = left.choose("multi_objective_aggregation", {"sum_then_normalize": None, "normalize_then_sum": "gdpo"})
        if kind:
            found["advantage.kind"] = (kind, ("multi_objective_aggregation",))
    correction, mode = left.take("vllm_importance_sampling_correction", True), "vllm_importance_sampling_mode"
    if not correction:
        left.take(mode)
        found["objective.sampler_correction"] = ("none", ("vllm_importance_sampling_correction",))
    elif mode in left:
        found["objective.sampler_correction"] = (left.choose(mode, MODES), (mode,))
    if left.take("use_adaptive_entropy"):
        found["controllers.entropy.kind"] = ("adaptive", ("use_adaptive_entropy",))
    ends = tuple(key for key in ("entropy_coef_min", "entropy_coef_max") if key in left)
    if ends:
        low, high = left.take("entropy_coef_min", 1e-5), left.take("entropy_coef_max", 0.1)
        found["controllers.entropy.bounds"] = ([low, high], ends)
    return found


def _sampling(left: _Flat) -> Mapped:
    found: Mapped = {}
    if "top_k" in left:
        found["sampling.top_k"] = (max(0, left.take("top_k") or 0), ("top_k",))
    if "min_p" in left:
        found["sampling.min_p"] = (left.take("min_p") or 0.0, ("min_p",))
    if "use_vllm" in left:
        found["rollout.backend"] = ("vllm" if left.take("use_vllm") else "native", ("use_vllm",))
    return found


def _rewards(left: _Flat) -> Mapped:
    names = tuple(key for key in ("reward_model_name_or_path", "reward_funcs", "reward_weights") if key in left)
    if not names:
        return {}
    model = left.take("reward_model_name_or_path")
    rewards = [{"target": "reward_models.learned", "model": model}] if model else []
    for name in left.take("reward_funcs") or []:
        if name not in REWARDS and "." not in name:
            raise left.refuse("reward_funcs", f"{name}: there are {', '.join(REWARDS)}, and import paths")
        rewards.append({"target": REWARDS.get(name, name)})
    weights = left.take("reward_weights") or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise left.refuse("reward_weights", f"{len(weights)} weights for {len(rewards)} rewards of this file")
    return {"rewards": ([{**one, "weight": weight} for one, weight in zip(rewards, weights, strict=True)], names)}


def _preference(left: _Flat) -> Mapped:
    if "loss_type" not in left:
        return {}
    value = left.flat["loss_type"]
    if isinstance(value, list) and len(value) == 1:
        left.flat["loss_type"] = value[0]
    return {"objective.loss": (left.choose("loss_type", PREFERENCE_LOSSES), ("loss_type",))}


def _imitation(left: _Flat) -> Mapped:
    if "loss_type" in left:
        left.choose("loss_type", {"nll": None})
    return {}


_OF_STAGE: dict[str, tuple[Callable[[_Flat], Mapped], ...]] = {
    "agrpo": (_objective, _sampling, _rewards),
    "reward": (_preference,),
    "sft": (_imitation,),
}

"""What a smoke run starts: the stages, each with the overrides that make it small and local."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agrpo.config import ModelConfig, TokenizerConfig
from agrpo.config.files import read_config
from agrpo.known_models import ARCHITECTURES, scaled_down
from agrpo.smoke.rows import MAKERS, rows_of
from agrpo.types import InputError
from agrpo.yaml_input import set_path

TOKENS = 12  # of a completion
STEPS = 2
_HEAD, _HEAD_OF_4_BITS = 8, 32  # an even number of the latter is a multiple of 64, bitsandbytes' block
_REWARD = {"target": "agrpo.smoke.reward.letters", "name": "smoke"}  # tells untrained completions apart
_ROWS = {"data": 16, "evaluation.data": 6, "evaluation.test": 6, "objective.group_loss.ranked.data": 16}
Run = tuple[str, list[str]]  # a stage and its arguments


def plan(path: Path, stage: str, overrides: Sequence[str], out: Path, steps: int = STEPS) -> list[Run]:
    """The runs in their order: the stages of the same folder whose models it takes, then the configuration's own.

    Models and rows are written below `out`, and the runs' directories lie there.

    Raises:
        InputError: a model or a data set of the Hub is none that `configs/` names.
    """
    values = read_config(path, stage)
    for override in overrides:
        set_path(values, override)
    runs: list[Run] = []
    for before in _stages_before(values, stage):
        own = [one for one in overrides if one.startswith("run.")]
        runs += [run for run in plan(path.parent / f"{before}.yaml", before, own, out, steps) if run not in runs]
    small = [*_data(values, out), *_model(values, out), *_sizes(values, stage, steps)]
    return [*runs, (stage, ["--config", str(path), *overrides, f"run.dir={out}", *small])]


def _at(values: dict[str, Any], path: str) -> Any:
    here: Any = values
    for part in path.split("."):
        here = here.get(part) if isinstance(here, dict) else None
    return here


def _stages_before(values: dict[str, Any], stage: str) -> Iterator[str]:
    model = values.get("model") or {}
    if stage != "sft" and not any(model.get(key) for key in ("name_or_path", "gguf", "config")):
        yield "sft"
    if "/preferences/" in str(_at(values, "data.path")):
        yield "preferences"
    rewards = values.get("rewards") or []
    if any(one["target"] == "reward_models.learned" and "model" not in one for one in rewards):
        yield "reward"


def _data(values: dict[str, Any], out: Path) -> Iterator[str]:
    for key, count in _ROWS.items():
        source = _at(values, f"{key}.source")
        if not isinstance(source, str) or source.startswith(("python:", "reasoning_gym:")):
            continue
        if source not in MAKERS:
            raise InputError(f"{key}.source: {source}: a smoke run knows the columns of {', '.join(MAKERS)}")
        file = out / "data" / f"{source.replace('/', '--')}-{count}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(source, count)), encoding="utf-8")
        yield from (f"{key}.source=null", f"{key}.path={file}", f"{key}.parameters={{}}", f"{key}.revision=null")


def _model(values: dict[str, Any], out: Path) -> Iterator[str]:
    name = _at(values, "model.name_or_path")
    if name is None or Path(name).is_dir():
        return
    if name not in ARCHITECTURES:
        raise InputError(f"model.name_or_path: {name}: a smoke run knows the sizes of {', '.join(ARCHITECTURES)}")
    head = _HEAD_OF_4_BITS if _at(values, "model.quantization") not in (None, "none") else _HEAD
    folder = out / "models" / f"{name.replace('/', '--')}{f'-{head}' if head != _HEAD else ''}"
    if not folder.exists():
        make_model(ARCHITECTURES[name], folder, head)
    yield f"model.name_or_path={folder}"
    yield "model.revision=null"


def make_model(architecture: dict[str, Any], folder: Path, head: int = _HEAD) -> None:
    """A scaled-down model of random weights, and a tokenizer of the made-up rows."""
    from agrpo.models import load_language_model, load_tokenizer, save_language_model

    corpus = [json.dumps(row, ensure_ascii=False) for source in MAKERS for row in rows_of(source, 24)]
    config = ModelConfig(config=scaled_down(architecture, head), tokenizer=TokenizerConfig(vocab_size=1024))
    tokenizer, _ = load_tokenizer(config, corpus)
    save_language_model(load_language_model(config, tokenizer, 0), tokenizer, folder)


def _sizes(values: dict[str, Any], stage: str, steps: int) -> Iterator[str]:
    if stage in ("agrpo", "preferences"):
        yield from ("sampling.num_generations=4", f"sampling.max_completion_length={TOKENS}")
        yield from ("sampling.max_prompt_length=512", "rollout.backend=native", "rollout.max_sequences=16")
        yield f"rewards={json.dumps([*values['rewards'], _REWARD])}"
    if stage == "preferences":
        return
    yield from (f"training.max_steps={steps}", "training.learning_rate=1e-3", "checkpoint.every=0")
    if _at(values, "engine.offload"):
        yield "engine.offload=none"
    if stage == "agrpo":
        yield "sampling.prompts_per_step=4"
    else:
        yield from ("training.batch_size=4", "max_length=512")
    if _at(values, "evaluation.rewards"):
        yield from ("evaluation.samples=2", f"evaluation.max_completion_length={TOKENS}")

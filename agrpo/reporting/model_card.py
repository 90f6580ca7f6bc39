"""The card of a trained model, README.md of its folder: what made it, from what data, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import agrpo
from agrpo.config import DataConfig, PolicyConfig, RewardConfig, StageConfig
from agrpo.yaml_input import to_yaml

_METHODS = {
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "a model of preferences, from ranked completions",
    "agrpo": "policy optimisation on rewards",
}


def model_card(config: StageConfig, stage: str, results: Mapping[str, Any]) -> str:
    """Markdown with the Hub's front matter. The licence is the base model's, as far as its own card tells it."""
    origin = _origin(config)
    licence = licence_of(config.model.name_or_path)
    classifies = isinstance(config, RewardConfig) and config.kind == "head"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if classifies else "text-generation",
        "tags": f"[{', '.join(dict.fromkeys(['agrpo', stage]))}]",
    }
    if licence is not None:
        front["license"] = licence
    if config.model.name_or_path is not None and not Path(config.model.name_or_path).exists():
        front["base_model"] = config.model.name_or_path
    hub_data = _hub_id(config.data)
    if hub_data is not None:
        front["datasets"] = f"[{hub_data}]"
    sections = {
        "": f"Trained with agrpo {agrpo.__version__} from `{origin}` for {config.training.max_steps} steps, seed"
        f" {config.seed}.",
        "Method": "\n".join(f"- {line}" for line in _method(config, stage)),
        "Data": "\n".join(f"- {line}" for line in _data(config)),
        "Measured": "\n".join(f"- {name}: {short(value)}" for name, value in results.items()) or "Nothing.",
        "Licence": _licence_words(licence, origin),
        "Configuration": f"```yaml\n{to_yaml(config).rstrip()}\n```",
    }
    head = "\n".join(f"{key}: {value}" for key, value in front.items())
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items())
    return f"---\n{head}\n---\n# {config.run.name}, stage {stage}\n\n{body}\n"


def licence_of(model: str | None) -> str | None:
    """The licence that a model's folder tells in its own card, None where it tells none."""
    card = Path(model) / "README.md" if model is not None else None
    if card is None or not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        if line.startswith("license:"):
            return line.partition(":")[2].strip() or None
    return None


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _origin(config: StageConfig) -> str:
    model = config.model
    return model.name_or_path or model.gguf or f"{model.config['model_type']}, initialised at random"


def _method(config: StageConfig, stage: str) -> list[str]:
    training = config.training
    lines = [_METHODS[stage]]
    if isinstance(config, PolicyConfig | RewardConfig):
        lines[0] += f", method `{config.method}`"
    if isinstance(config, PolicyConfig):
        named = ", ".join(f"`{spec.target}` (weight {spec.weight:g})" for spec in config.rewards)
        sampling = config.sampling
        lines += [
            f"rewards: {named}",
            f"{sampling.prompts_per_step} prompts a step, {sampling.num_generations} completions each, at most"
            f" {sampling.max_completion_length} tokens, temperature {sampling.temperature:g}",
        ]
    lines.append(f"AdamW, learning rate {training.learning_rate:g} ({training.lr_scheduler_type})")
    if config.model.lora is not None:
        lines.append(f"LoRA of rank {config.model.lora.rank}, merged into these weights")
    return lines


def _data(config: StageConfig) -> list[str]:
    used = [("training", config.data), ("validation", config.evaluation.data), ("test", config.evaluation.test)]
    return [f"{name}: {_described(data)}" for name, data in used if data is not None]


def _described(data: DataConfig) -> str:
    if data.path is not None:
        return f"the local file `{data.path.name}`"
    told = ", ".join(f"{key} {value}" for key, value in data.parameters.items())
    return f"`{data.source}`, split {data.split}" + (f" ({told})" if told else "")


def _hub_id(data: DataConfig) -> str | None:
    return data.source if data.source is not None and ":" not in data.source else None


def _licence_words(licence: str | None, origin: str) -> str:
    if licence is not None:
        return f"`{licence}`, as the base model's card says; the data may ask for more."
    return (
        f"Not known: the card of `{origin}` is not at hand or names none. Say one in this file's front matter"
        " (`license:`) before you publish the model, and mind the licences of the base model and the data."
    )

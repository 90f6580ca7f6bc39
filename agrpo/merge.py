"""`agrpo merge`: one whole model in a folder, from LoRA's adapters or from a run, finished or not."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from agrpo.config import PolicyConfig, SFTConfig, load_config
from agrpo.evaluation.runs import find_model
from agrpo.types import InputError

_STAGES = ("agrpo", "sft")  # the later one first


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agrpo merge", description=__doc__)
    parser.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run, a stage's directory, or a PEFT adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    parser.add_argument("--base", metavar="MODEL", help="of an adapter: its model (default: the one it names)")
    options = parser.parse_args(arguments)
    try:
        print(merge(Path(options.source), options.out, options.base))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def merge(source: Path, out: Path, base: str | None = None) -> str:
    """Write the model to `out`, whole or not at all; returns what was done, in words.

    Raises:
        InputError: nothing to make a model of, or `out` is taken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists; name a folder that is not there yet")
    if (source / "adapter_config.json").is_file():
        told = _adapter(source, out, base)
    elif base is not None:
        raise InputError(f"--base: {source} is no adapter (it has no adapter_config.json)")
    elif (stage := _unfinished(source)) is not None:
        told = _checkpoint(stage, out)
    else:
        told = _finished(Path(find_model(str(source))), out)
    return f"{out}: {told}"


def _adapter(folder: Path, out: Path, base: str | None) -> str:
    from agrpo.models import merge_adapter, save_language_model

    lm, tokenizer = merge_adapter(folder, base)
    _write(out, lambda partial: save_language_model(lm, tokenizer, partial))
    return f"the adapter {folder} added into its base"


def _finished(model: Path, out: Path) -> str:
    if not model.is_dir():
        raise InputError(f"{model}: no such folder")
    _write(out, lambda partial: shutil.copytree(model, partial))
    return f"a copy of {model}, which was merged when it was saved"


def _unfinished(source: Path) -> Path | None:
    """The stage directory whose model is still in its checkpoints."""
    for stage in (source, *(source / name for name in _STAGES)):
        if (stage / "checkpoints").is_dir():
            return None if (stage / "model" / "config.json").is_file() else stage
    return None


def _checkpoint(directory: Path, out: Path) -> str:
    """The model of a stage's newest whole checkpoint: built as the stage builds it, then loaded."""
    stage = directory.name
    if stage not in _STAGES:
        raise InputError(f"{directory}: a model is taken from checkpoints of {' and '.join(_STAGES)} alone")
    config: PolicyConfig | SFTConfig = load_config(stage, directory / "config.yaml")
    from agrpo.data.load import read_demonstrations, texts_of
    from agrpo.engine import checkpoint
    from agrpo.engine.hybrid import HybridEngine
    from agrpo.engine.modules import ActorCritic, Policy
    from agrpo.models import load_language_model, load_tokenizer, make_trainable, save_language_model, stop_ids
    from agrpo.reporting.model_card import model_card

    found = checkpoint.newest(directory / "checkpoints")
    if found is None:
        raise InputError(f"{directory}: has neither a model/ nor a whole checkpoint")
    fresh = config.model.config is not None
    corpus = texts_of(read_demonstrations(config.data, lambda text: None)) if fresh else ()
    tokenizer, _ = load_tokenizer(config.model, corpus)
    lm = load_language_model(config.model, tokenizer, config.seed)
    stop = stop_ids(tokenizer, lm)
    critic = isinstance(config, PolicyConfig) and config.needs_critic
    engine = HybridEngine(
        (ActorCritic if critic else Policy)(make_trainable(lm, config.model, config.seed)),
        engine=config.engine,
        training=config.training,
        tokenizer=tokenizer,
        stop=stop,
        dtype=config.model.dtype,
    )
    checkpoint.load(*found, engine, {})
    engine.generation_mode()

    def save(partial: Path) -> None:
        save_language_model(engine.whole_policy.lm, tokenizer, partial)
        card = model_card(config, stage, {"step": found[1]["step"]})
        (partial / "README.md").write_text(card, encoding="utf-8")

    _write(out, save)
    return f"the model of {found[0]}"


def _write(out: Path, save: Callable[[Path], object]) -> None:
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    save(partial)
    if out.exists():
        out.rmdir()  # it is empty
    partial.rename(out)

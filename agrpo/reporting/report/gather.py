"""What a report shows of a run, as plain data: read from the files that the stages left, bounded in size."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from agrpo.reporting.diagnostics import PROBLEM, Record, diagnose
from agrpo.reporting.dynamics import family
from agrpo.reporting.files import Series, read_json, read_jsonl, read_series
from agrpo.reporting.summary import FILE, STAGES

ORDER = ("agrpo", "reward", "sft")  # what a reader wants first
MOST_POINTS = 320  # of a curve, shared out among the runs of a comparison
FEWEST_POINTS = 100
LONGEST_TEXT = 6_000  # characters of a sample's text


def runs_at(paths: Sequence[Path]) -> list[Path]:
    """The run directories; a stage's directory stands for its run.

    Raises:
        FileNotFoundError: a path is no run; the message names it.
    """
    found = []
    for path in paths:
        run = path.parent if path.name in STAGES and (path / "metrics.jsonl").exists() else path
        if not any((run / stage / "metrics.jsonl").exists() for stage in STAGES):
            folders = ", ".join(f"{stage}/" for stage in STAGES)
            raise FileNotFoundError(f"{path}: no run; a run has {folders} or some of them, with metrics.jsonl")
        if run not in found:
            found.append(run)
    return found


def gather(runs: Sequence[Path], sample_bytes: int) -> dict[str, Any]:
    """Everything that the page needs.

    Args:
        runs: run directories.
        sample_bytes: how much text of samples is kept, over all runs.
    """
    points = max(FEWEST_POINTS, MOST_POINTS // len(runs))
    return {"runs": [_run(run, points, sample_bytes // len(runs)) for run in runs]}


def _run(run: Path, points: int, sample_bytes: int) -> dict[str, Any]:
    stages = {stage: _stage(run / stage, stage, points) for stage in ORDER if (run / stage / "metrics.jsonl").exists()}
    summary = read_json(run / FILE)
    name = run.resolve().name
    samples = list(_samples(run / "agrpo" / "samples.jsonl", sample_bytes))
    return {
        "name": name,
        "family": family(name),
        "verdict": verdict(stages, summary),
        "measured": measured(summary),
        "stages": stages,
        "samples": samples,
        "reliability": read_json(run / "reward" / "result.json").get("results", {}).get("reliability", []),
    }


def _stage(directory: Path, stage: str, points: int) -> dict[str, Any]:
    series = read_series(directory / "metrics.jsonl")
    rows = list(read_jsonl(directory / "metrics.jsonl"))
    text = _text(directory / "config.yaml")
    config = yaml.safe_load(text) if text else {}
    total = config.get("training", {}).get("max_steps", 0)
    finished = (directory / "result.json").exists()
    record = Record(series, config, total)
    return {
        "title": STAGES[stage],
        "state": "finished" if finished else "diverged" if (directory / "diverged.json").exists() else "unfinished",
        "step": record.steps,
        "total": total,
        "seconds": rows[-1]["time_s"] if rows else 0.0,
        "findings": [vars(finding) for finding in diagnose(stage, record)],
        "series": {name: thinned(found, points) for name, found in sorted(series.items())},
        "config": text,
        "reproduce": _reproduce(stage, directory, config),
        "bounds": {
            name: config.get("controllers", {}).get(name, {}).get("bounds")
            for name in ("beta", "epsilon", "lambda")
            if config.get("controllers", {}).get(name, {}).get("kind") == "adaptive"
        },
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _reproduce(stage: str, directory: Path, config: Mapping[str, Any]) -> str:
    script = {"sft": "stage1_sft", "reward": "stage2_reward", "agrpo": "stage3_agrpo"}[stage]
    name = directory.resolve().parent.name
    file = Path(config.get("run", {}).get("dir", "runs")) / name / stage / "config.yaml"
    return f"bash stages/{script}/run.sh --config {shlex.quote(str(file))} {shlex.quote(f'run.name={name}-again')}"


def thinned(series: Series, points: int) -> list[list[float]]:
    """[steps, values] with at most `points` of them: the last step and the mean of each of so many equal stretches."""
    steps, values = series
    if len(values) <= points:
        return [list(steps), [_short(value) for value in values]]
    edges = [round(i * len(values) / points) for i in range(points + 1)]
    stretches = [slice(a, b) for a, b in pairwise(edges)]
    return [
        [steps[s.stop - 1] for s in stretches],
        [_short(statistics.fmean(values[s])) for s in stretches],
    ]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def measured(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the stages measured at their end, each with its interval where there is one and the stage's before it."""
    rows = []
    for stage in STAGES:
        values = summary.get(stage, {})
        for key, value in values.items():
            if re.fullmatch(r"test_pass\d+|test_greedy|pairwise_accuracy", key) and value is not None:
                what = re.sub(r"test_pass(\d+)", r"test pass@\1", key).replace("_", " ")
                rows.append({"stage": stage, "what": what, "value": value, "interval": values.get(f"{key}_interval")})
    return rows


def verdict(stages: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The run in two or three sentences."""
    stage = next(iter(stages))
    shown = stages[stage]
    sentences = []
    state = {
        "finished": f"{shown['title']} finished its {shown['total']} steps in {_duration(shown['seconds'])}.",
        "diverged": f"{shown['title']} diverged at step {shown['step']} of {shown['total']}.",
        "unfinished": f"{shown['title']} is at step {shown['step']} of {shown['total']}.",
    }
    sentences.append(state[shown["state"]])
    before, after = (summary.get(name, {}).get("test_pass1") for name in ("sft", "agrpo"))
    if after is not None and before is not None:
        moved = "rose" if after > before else "fell"
        sentences.append(f"Test pass@1 {moved} from {before:.1%} to {after:.1%}.")
    elif stage == "agrpo" and (values := shown["series"].get("reward")):
        window = max(1, len(values[1]) // 10)
        first, last = statistics.fmean(values[1][:window]), statistics.fmean(values[1][-window:])
        sentences.append(f"The reward went from {first:.3g} to {last:.3g}.".replace("-", "−"))
    elif stage == "reward" and summary.get("reward", {}).get("pairwise_accuracy") is not None:
        sentences.append(f"Held-out pairwise accuracy is {summary['reward']['pairwise_accuracy']:.1%}.")
    elif stage == "sft" and after is None and before is not None:
        sentences.append(f"Test pass@1 is {before:.1%}.")
    counts = {kind: sum(f["severity"] == kind for s in stages.values() for f in s["findings"]) for kind in _KINDS}
    told = [f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items() if n]
    sentences.append(f"{' and '.join(told).capitalize()} below." if told else "No problem and no warning.")
    return " ".join(sentences)


_KINDS = (PROBLEM, "warning")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _samples(path: Path, budget: int) -> Iterator[dict[str, Any]]:
    """Samples evenly over the steps, as many as fit the budget; long texts are cut, and say so."""
    rows = list(read_jsonl(path))
    sizes = [_size(row) for row in rows]
    total = sum(sizes)
    keep = min(1.0, budget / total) if total else 1.0
    due = 0.0
    for row, size in zip(rows, sizes, strict=True):
        due += keep * size
        if keep == 1.0 or due >= size:
            due -= 0.0 if keep == 1.0 else size
            yield _sample(row)


def _size(row: Mapping[str, Any]) -> int:
    """About how many bytes a sample takes in the page."""
    texts = min(LONGEST_TEXT, len(_as_text(row.get("prompt")))) + min(LONGEST_TEXT, len(str(row.get("completion"))))
    return 200 + texts + 22 * len(row.get("pieces", ()))


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row.get(key) for key in ("step", "reward", "advantage", "tokens")}
    kept["step"] = row["step"] + 1
    for key in ("reward", "advantage"):
        kept[key] = None if kept[key] is None else _short(kept[key])
    for key in ("prompt", "completion"):
        text = _as_text(row.get(key))
        kept[key] = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"
    kept["rewards"] = {name: None if v is None else _short(v) for name, v in (row.get("rewards") or {}).items()}
    for key in ("pieces", "logp", "log_ratio", "advantages"):
        if key in row:
            kept[key] = row[key]
    return kept


def _as_text(value: Any) -> str:
    """A prompt as text: the turns of a conversation one after the other."""
    if isinstance(value, list):
        return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value)
    return "" if value is None else str(value)

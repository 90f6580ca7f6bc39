"""An evaluation's rows as numbers, each a mean over prompts with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agrpo.evaluation.intervals import bootstrap_interval, share_interval
from agrpo.evaluation.outcomes import majority, pass_at_k


def summarise(rows: Sequence[Mapping[str, Any]], ks: Sequence[int] | None = None) -> dict[str, Any]:
    """The numbers of an evaluation, each a mean over prompts with its 95% interval.

    Shares whose every value is 0 or 1 have Wilson's interval, all others a bootstrap over prompts.

    Args:
        rows: of `measure`, graded.
        ks: of pass@k; by default 1, 2, 4, … and the number of samples.

    Returns:
        pass1, pass_k (of all samples), greedy, maj_k, mean_reward, mean_length (tokens), clipped, pass_at (k → pass@k),
        n, k, `interval` of pass1 and `intervals` of the rest; None for what was not measured.
    """
    n, k = len(rows), len(rows[0].get("samples", ()))
    if k:
        ks = sorted({*(ks or _powers(k)), 1, k})
    values: dict[str, list[float]] = {}
    if k and "passes" in rows[0]["samples"][0]:
        passes = [sum(one["passes"] for one in row["samples"]) for row in rows]
        values |= {f"pass@{j}": [pass_at_k(k, c, j) for c in passes] for j in ks}
        if "vote" in rows[0]["samples"][0]:
            values["maj_k"] = [
                majority([one["vote"] for one in row["samples"]], [one["passes"] for one in row["samples"]])
                for row in rows
            ]
    if "passes" in rows[0].get("greedy", {}):
        values["greedy"] = [float(row["greedy"]["passes"]) for row in rows]
    of_prompt = [row.get("samples") or [row["greedy"]] for row in rows]
    rewards = [[one["reward"] for one in some if one.get("reward") is not None] for some in of_prompt]
    scored = [sum(some) / len(some) for some in rewards if some]
    lengths = [sum(one["tokens"] for one in some) / len(some) for some in of_prompt]
    means = {name: sum(of) / len(of) for name, of in values.items()}
    intervals = {name: list(share_interval(of)) for name, of in values.items()}
    for name, of in (("mean_reward", scored), ("mean_length", lengths)):
        means[name] = sum(of) / len(of) if of else None
        intervals[name] = list(bootstrap_interval(of)) if of else None
    completions = [one for some in of_prompt for one in some]
    return {
        "pass1": means.get("pass@1"),
        "pass_k": means.get(f"pass@{k}"),
        "greedy": means.get("greedy"),
        "maj_k": means.get("maj_k"),
        "mean_reward": means["mean_reward"],
        "mean_length": means["mean_length"],
        "clipped": sum(not one["finished"] for one in completions) / len(completions),
        "unscored": sum(one.get("reward", 0.0) is None for one in completions),
        "pass_at": {str(j): means[f"pass@{j}"] for j in ks or () if f"pass@{j}" in means},
        "n": n,
        "k": k,
        "interval": intervals.get("pass@1"),
        "intervals": intervals,
    }


def _powers(k: int) -> list[int]:
    return [2**i for i in range(k.bit_length()) if 2**i <= k]


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal, a line a number."""
    intervals = summary["intervals"]

    def line(name: str, value: float | None, interval: list[float] | None, percent: bool = True) -> str:
        if value is None:
            return ""
        shown = f"{100 * value:8.1f}%" if percent else f"{value:9.3f}"
        scale = 100 if percent else 1
        bounds = f"  [{scale * interval[0]:.1f}, {scale * interval[1]:.1f}]" if interval and percent else ""
        bounds = f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval and not percent else bounds
        return f"{name:<14}{shown}{bounds}\n"

    of_k = [line(f"pass@{k}", value, intervals[f"pass@{k}"]) for k, value in summary["pass_at"].items()]
    rest = [
        line("greedy", summary["greedy"], intervals.get("greedy")),
        line(f"maj@{summary['k']}", summary["maj_k"], intervals.get("maj_k")),
        line("mean reward", summary["mean_reward"], intervals["mean_reward"], percent=False),
        line("mean length", summary["mean_length"], intervals["mean_length"], percent=False),
        line("clipped", summary["clipped"], None),
    ]
    unscored = f"{summary['unscored']} completions that no reward could score do not pass\n"
    told = unscored if summary["unscored"] else ""
    return f"{summary['n']} prompts, {summary['k']} samples each\n" + "".join([*of_k, *rest]) + told

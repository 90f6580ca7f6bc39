"""Grids for tests: one of the quickstart's tasks cut down to seconds, and cells with numbers that are made up."""

import json
import random

import yaml

from agrpo.ablation.grid import plan, read_grid

SETTINGS = {
    "sft": {
        "model": {"config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}},
        "data": {"parameters": {"count": 256}},
        "training": {"max_steps": 3, "batch_size": 16},
        "checkpoint": {"every": 0},
        "evaluation": {"every": 0, "samples": 2, "max_completion_length": 16, "test": {"parameters": {"count": 24}}},
    },
    "policy": {
        "data": {"parameters": {"count": 64}},
        "training": {"max_steps": 3},
        "sampling": {"num_generations": 4, "prompts_per_step": 4, "max_completion_length": 16},
        "objective": {"updates_per_rollout": 2, "watch_kl": True},
        "rewards": [{"target": "reward_models.rules.length", "scale": 16, "tokens": 4}],
        "checkpoint": {"every": 0},
        "evaluation": {"every": 0, "samples": 2, "max_completion_length": 16, "test": {"parameters": {"count": 24}}},
    },
}


def grid_file(folder, **changes):
    """A grid of two rows, both methods and one seed, as a file; its path."""
    values = {
        "name": "try",
        "dir": str(folder / "runs"),
        "seeds": [0],
        "sft": {"config": "configs/quickstart/sft.yaml", "settings": SETTINGS["sft"]},
        "policy": {"config": "configs/quickstart/agrpo.yaml", "settings": SETTINGS["policy"]},
        "baseline": "grpo",
        "methods": {
            "grpo": {"label": "GRPO", "settings": {"method": "grpo"}},
            "agrpo": {"label": "A-GRPO", "settings": {"method": "agrpo"}},
        },
        "rows": {
            "full": {"label": "full"},
            "no-kl": {"label": "no KL", "settings": {"objective": {"kl": "none", "beta": 0.0}}},
        },
        "window": 2,
        **changes,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def planned(path, *overrides):
    return plan(read_grid(path, overrides), path)


def finish(job, passes=(1, 0), steps=(), samples=2):
    """Leave in a run's directory what a finished run does, with these numbers."""
    from agrpo.yaml_input import to_yaml

    job.directory.mkdir(parents=True)
    (job.directory / "config.yaml").write_text(f"# agrpo, made up\n{to_yaml(job.config)}", encoding="utf-8")
    rows = [{"slot": slot, "passes": count} for slot, count in enumerate(passes)]
    # Ranks write in any order.
    (job.directory / "evaluation-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    lines = [{"step": i, **step} for i, step in enumerate(steps)]
    (job.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rate = sum(passes) / len(passes) / samples
    results = {"test_pass1": rate, "mean_length": 20.0 + rate}
    (job.directory / "result.json").write_text(json.dumps({"results": results, "seconds": 1.5}))


def step(reward=0.5, kl=0.01, entropy=0.3, variance=1.0):
    return {
        "reward": reward,
        "agrpo/kl_symmetric": kl,
        "entropy": entropy,
        "agrpo/advantage_variance": variance,
    }


def fill(plan, seed=0):
    """Finish every run of a plan with random numbers, the method's a little better than the baseline's."""
    draw = random.Random(seed)
    for job in plan.sft:
        finish(job, [draw.choice((0, 1)) for _ in range(40)])
    for job in plan.jobs:
        ours = f"-{plan.grid.method}-" in job.name
        passes = [min(2, draw.choice((0, 1, 1, 2)) + (ours and draw.random() < 0.7)) for _ in range(40)]
        scale = draw.uniform(0.6, 1.3) * (0.6 if ours else 1.0)
        steps = [step(0.5 + 0.01 * i, 0.002 * i * scale, 0.3 - 0.008 * i * scale, scale) for i in range(20)]
        finish(job, passes, steps)

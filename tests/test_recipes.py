"""Every shipped configuration, resolved and run for a few steps: a scaled-down model, rows of its data's columns."""

import importlib.util
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import ROOT, environment, rows

from agrpo.config import load_config, stage_of
from agrpo.known_models import ARCHITECTURES
from agrpo.smoke.plan import STEPS, plan
from agrpo.types import InputError

OLD = (
    "quickstart",
    "smollm2-135m",
    "smollm2-135m-data",
    "calculator",
)  # run by tests of their own, or with a real model
BASES = ("shared", "machines")
RECIPES = sorted(f for f in (ROOT / "configs").glob("*/*.yaml") if f.parent.name not in (*OLD, *BASES, "ablations"))


def needs_bitsandbytes(path):
    return "qlora" in path.stem and importlib.util.find_spec("bitsandbytes") is None


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(stage and arguments of each recipe's own run, the process that did all runs)."""
    out, runs, own = tmp_path_factory.mktemp("recipes"), [], {}
    for path in RECIPES:
        if needs_bitsandbytes(path):
            continue
        steps = plan(path, stage_of(path), [], out)
        runs += [run for run in steps if run not in runs]
        own[path] = steps[-1]
    command = [sys.executable, str(ROOT / "tests" / "several_runs.py"), json.dumps(runs)]
    job = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    return own, job


@pytest.mark.parametrize("path", RECIPES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_recipe_resolves_and_trains(path, done):
    if needs_bitsandbytes(path):
        pytest.skip("bitsandbytes is not installed")
    own, job = done
    stage, arguments = own[path]
    config = load_config(stage, path, arguments[2:])
    directory = config.run_root / stage
    if stage == "preferences":
        assert len(rows(directory / "train.jsonl")) > 4, job.stderr[-4000:]
        return
    assert (directory / "result.json").exists(), job.stderr[-4000:]
    metrics = rows(directory / "metrics.jsonl")
    assert len(metrics) == STEPS
    assert all(math.isfinite(value) for row in metrics for value in row.values() if isinstance(value, float | int))
    before = config.run_root / "sft" / "model" if config.model.name_or_path is None else config.model.name_or_path
    start, left = (load_file(f"{folder}/model.safetensors") for folder in (before, directory / "model"))
    moved = [name for name in left if name in start and not torch.equal(start[name].float(), left[name].float())]
    assert moved, "nothing was learnt"
    saved = json.loads((directory / "model" / "config.json").read_text())
    assert any(alike(saved, architecture, left) for architecture in ARCHITECTURES.values())


def alike(saved, architecture, weights):
    """The things that make code behave differently: those of the architecture, though the sizes are a toy's."""
    group = architecture["num_attention_heads"] // architecture["num_key_value_heads"]
    return (
        saved["model_type"] == architecture["model_type"]
        and saved["num_attention_heads"] == group * saved["num_key_value_heads"]
        and saved["tie_word_embeddings"] == architecture["tie_word_embeddings"]
        and any(name.endswith("q_proj.bias") for name in weights) == (architecture["model_type"] == "qwen2")
    )


SCRIPTS = sorted(p for p in (ROOT / "scripts").glob("*.sh") if "recipe.sh" in p.read_text() and p.stem != "recipe")


def test_every_script_names_a_configuration_that_is_there():
    assert len(SCRIPTS) == 10
    for script in SCRIPTS:
        what, path = re.search(r"recipe\.sh\" (train|eval) (\S+)", script.read_text()).groups()
        assert (ROOT / path) in RECIPES, script
        assert script.stem.startswith("Eval_") == (what == "eval")
        method = script.stem.split("_")[0].lower()
        assert what == "eval" or load_config("agrpo", ROOT / path, ["rollout.backend=native"]).method == method


# One of each kind: training, evaluating what was trained, and evaluating the untrained model.
@pytest.mark.parametrize("name", ["CPPO_gsm", "Eval_math", "Eval_qwen2.5-1.5b"])
def test_a_script_rehearses_offline(name, tmp_path):
    script = ROOT / "scripts" / f"{name}.sh"
    done = subprocess.run(
        ["bash", str(script), "--smoke"],
        env={**environment(), "SMOKE_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    steps = [len(rows(file)) for file in tmp_path.glob("*/agrpo/metrics.jsonl")]
    assert steps == ([] if " base " in script.read_text() else [STEPS])
    results = [json.loads(file.read_text()) for file in (tmp_path / "evaluations").glob("*.json")]
    assert len(results) == name.startswith("Eval_")
    assert all(found["n"] == 6 and 0 <= found["pass1"] <= 1 for found in results)


def test_a_rehearsal_of_what_it_does_not_know_is_refused(tmp_path):
    path = ROOT / "configs" / "llama-3.2-1b-gsm8k" / "agrpo.yaml"
    for override, says in (
        ("model.name_or_path=a/b", "a smoke run knows the sizes of"),
        ("data.source=a/b", "a smoke run knows the columns of openai/gsm8k"),
    ):
        with pytest.raises(InputError, match=says):
            plan(path, "agrpo", [override], tmp_path)

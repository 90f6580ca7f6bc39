"""Whole runs with an environment: any number of ranks, an interruption, the calculator's recipe, and evaluation."""

import json

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import ROOT, launch, rows, run_several, tiny_policy

from agrpo.config import load_config
from agrpo.types import InputError

TALKATIVE = 'environment={target: "talkative:Talkative", max_turns: 3}'
REWARDS = "{target: reward_models.rules.environment}, {target: reward_models.rules.length, scale: 16, tokens: 4}"
OWN = ["evaluation.data=null", "evaluation.test=null", "training.learning_rate=1e-3", "logging.samples_per_step=99"]
OWN += [TALKATIVE, "training.max_steps=3", "sampling.max_completion_length=24", "sampling.temperature=2"]
SHARDS = ["engine.zero_stage=3", "engine.param_persistence_threshold=0", "engine.sample_from=layers"]
CLOSE = ("loss", "grad_norm", "entropy", "kl", "agrpo/kl_symmetric", "agrpo/value_loss")
EXACT = ("reward", "environment/reward", "environment/turns", "environment/heard_tokens", "environment/errors")
EXACT += ("completions/mean_length", "completions/clipped_ratio", "num_tokens")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by one rank, and by two whose weights are shards: one job each."""
    folder = tmp_path_factory.mktemp("runs")
    model = f"model.name_or_path={tiny_policy(folder / 'start')}"
    plain = ["method=ppo", f"rewards=[{REWARDS}]", "training.micro_batch_tokens=200"]
    grouped = ["pruning.rate=0.5", "grouping.kind=adaptive", "grouping.most=8", f"rewards=[{REWARDS}]", *SHARDS]
    stop = {"target": "interrupting_reward.length_until", "flag": str(folder / "flag"), "call": 2, "number": "SIGTERM"}
    stopped = [f"rewards=[{json.dumps(stop)}]", "objective.updates_per_rollout=2"]
    (folder / "flag").touch()
    straight = [one.replace(str(folder / "flag"), str(folder / "none")) for one in stopped]
    alone = [("ppo", plain), ("grouped", grouped), ("stopped", stopped), ("stopped", stopped), ("straight", straight)]
    jobs = {
        1: alone,
        2: [("ppo", [*plain, "engine.zero_stage=2", "training.micro_batch_tokens=40"]), ("grouped", grouped)],
    }
    said = {}
    for nproc, listed in jobs.items():
        own = [("agrpo", folder / f"{name}-{nproc}", [*OWN, model, *how]) for name, how in listed]
        said[nproc] = run_several(own, nproc)
        assert all((run / "agrpo" / "result.json").exists() for _, run, _ in own), said[nproc].stderr[-4000:]
    return folder, said


@pytest.mark.parametrize("name", ["ppo", "grouped"])
def test_two_ranks_have_the_conversations_and_the_curve_of_one(runs, name):
    one, two = (runs[0] / f"{name}-{nproc}" / "agrpo" for nproc in (1, 2))
    for mine, alone in zip(rows(two / "metrics.jsonl"), rows(one / "metrics.jsonl"), strict=True):
        assert mine.keys() == alone.keys()
        for key in EXACT:
            assert mine[key] == pytest.approx(alone[key], rel=1e-6), key
        for key in CLOSE:
            assert mine.get(key, 0) == pytest.approx(alone.get(key, 0), rel=1e-3, abs=1e-6), key
    talks = [
        {json.dumps([row["step"], row["prompt"], row["turns"]]) for row in rows(d / "samples.jsonl")}
        for d in (one, two)
    ]
    assert talks[1] < talks[0]  # the first rank's
    assert any(len(row["turns"]) > 3 for row in rows(one / "samples.jsonl"))


def test_log_and_samples_show_what_was_said_and_heard(runs):
    directory = runs[0] / "ppo-1" / "agrpo"
    for step, metrics in enumerate(rows(directory / "metrics.jsonl")):
        shown = [row for row in rows(directory / "samples.jsonl") if row["step"] == step]
        spoken = [[t["content"] for t in row["turns"] if t["role"] == "assistant"] for row in shown]
        assert metrics["environment/turns"] == pytest.approx(sum(map(len, spoken)) / len(shown))
        assert metrics["environment/errors"] == 0
        assert metrics["completions/mean_length"] == pytest.approx(sum(r["tokens"] for r in shown) / len(shown))
        for row, own in zip(shown, spoken, strict=True):
            assert row["completion"] == "".join(turn["content"] for turn in row["turns"])
            pieces = "".join(piece for piece in row["pieces"] if piece not in ("<|end|>", "<|pad|>"))
            assert pieces == "".join(own) and len(row["logp"]) == row["tokens"]


def test_a_run_that_was_stopped_between_two_updates_goes_on_as_if_it_were_not(runs):
    folder, said = runs
    assert "SystemExit: 75" in said[1].stderr and f"resumed from {folder / 'stopped-1'}" in said[1].stdout
    curves = [rows(folder / f"{name}-1" / "agrpo" / "metrics.jsonl") for name in ("straight", "stopped")]
    timed = ("time", "throughput", "memory")
    curves = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in curve] for curve in curves]
    assert curves[0] == curves[1]
    samples = [rows(folder / f"{name}-1" / "agrpo" / "samples.jsonl") for name in ("straight", "stopped")]
    assert samples[0] == samples[1]
    one, other = (
        load_file(folder / f"{n}-1" / "agrpo" / "model" / "model.safetensors") for n in ("straight", "stopped")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_environment_and_a_rollout_ahead_exclude_each_other():
    quickstart = ROOT / "configs" / "quickstart" / "agrpo.yaml"
    with pytest.raises(InputError, match=r"rollout.ahead: an environment answers while the policy samples"):
        load_config("agrpo", quickstart, ["environment={target: talkative.Talkative}", "rollout.ahead=1"])
    with pytest.raises(InputError, match="no module 'nowhere' can be found"):
        load_config("agrpo", quickstart, ["environment={target: nowhere.Talkative}"])
    own = ["environment={target: talkative.Talkative, longest: 2}", f"model.name_or_path={ROOT}"]
    config = load_config("agrpo", quickstart, own)
    assert config.environment.parameters == {"longest": 2}


@pytest.fixture(scope="module")
def calculator(tmp_path_factory):
    """The calculator's recipe with a smaller model and fewer steps."""
    run = tmp_path_factory.mktemp("runs") / "calculator"
    few = ["checkpoint.every=0", "evaluation.data=null", "evaluation.test.parameters.count=16", "evaluation.samples=2"]
    sizes = [f"model.config.{key}={value}" for key, value in (("hidden_size", 32), ("intermediate_size", 64))]
    own = {
        "sft": [*sizes, "data.parameters.count=400", "training.max_steps=40", "data.parameters.direct=0.3"],
        "agrpo": ["training.max_steps=2", "sampling.prompts_per_step=4"],
    }
    for stage, how in own.items():
        where = ["--config", ROOT / "configs" / "calculator" / f"{stage}.yaml", f"run.dir={run.parent}"]
        done = launch(stage, *where, *few, *how)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run


def test_the_calculators_recipe_calls_and_is_answered(calculator):
    results = json.loads((calculator / "summary.json").read_text())
    assert {"test_pass1", "before_test_pass1"} <= results["agrpo"].keys() and "test_pass1" in results["sft"]
    shown = rows(calculator / "agrpo" / "samples.jsonl")
    assert shown and all(row["turns"][0]["role"] == "assistant" for row in shown)
    metrics = rows(calculator / "agrpo" / "metrics.jsonl")
    assert metrics[-1]["environment/turns"] > 1 and metrics[-1]["environment/heard_tokens"] > 0
    assert metrics[-1]["environment/errors"] == 0


def test_an_evaluation_talks_with_the_environment_and_resumes(calculator, tmp_path):
    from stages.evaluation.evaluate import main

    model, numbers = str(calculator / "agrpo" / "model"), tmp_path / "numbers.json"
    arguments = ["--model", model, "--data", "python:agrpo.data.tasks.products:problems", "--parameters", "{count: 12}"]
    arguments += ["--samples", "2", "--max-tokens", "48", "--reward", "reward_models.rules.environment"]
    arguments += ["--vote", "none", "--out", str(tmp_path / "out"), "--json", str(numbers)]
    spoken = ["--environment", "agrpo.environments.calculator:Calculator"]
    main([*arguments, *spoken])
    first = json.loads(numbers.read_text())
    assert first["n"] == 12
    found = [row for row in rows(tmp_path / "out" / "results.jsonl") if "samples" in row]
    roles = {tuple(turn["role"] for turn in one["turns"]) for row in found for one in row["samples"]}
    assert ("assistant",) in roles or ("assistant", "tool", "assistant") in roles
    for row in found:
        for one in row["samples"]:
            assert one["passes"] == (one["scores"]["environment"] == 1)
    main([*arguments, *spoken])
    assert json.loads(numbers.read_text()) == first
    with pytest.raises(InputError, match=r"holds another evaluation \(environment differ"):
        main([*arguments, "--environment", "{target: agrpo.environments.calculator.Calculator, max_turns: 2}"])
    with pytest.raises(InputError, match=r"--environment: .*no module 'nowhere'"):
        main([*arguments, "--environment", "nowhere.Calculator"])

"""Training meets a loss that is not finite on one rank: all ranks leave the step out together and go on."""

import json
import subprocess
import sys

import pytest
from stage_runs import LENGTH_REWARD, ROOT, environment, launch, rows, tiny, tiny_policy

NO_EVALUATION = ["evaluation.data=null", "evaluation.test=null"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("start") / "model")


def run_with_nan(stage, run, rank, first, last, *overrides, nproc):
    """The finished job of a stage whose loss is NaN on one rank in optimiser steps first … last."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    arguments = [stage, *map(str, (rank, first, last)), *tiny(stage, run, *NO_EVALUATION, *overrides)]
    return subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tests" / "faulty_runs.py"), *arguments],
        cwd=ROOT,
        env=environment(nproc),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_nan_on_one_rank_of_two_is_skipped_by_both(zero_stage, tmp_path):
    done = run_with_nan("sft", tmp_path / "run", 1, 1, 2, f"engine.zero_stage={zero_stage}", nproc=2)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = rows(tmp_path / "run" / "sft" / "metrics.jsonl")
    assert [row["agrpo/skipped_steps"] for row in metrics] == [0, 1, 2, 2, 2]
    assert [row["loss"] is None for row in metrics] == [False] * 5  # the loss itself was good; what was learnt was not
    assert [row["grad_norm"] is None for row in metrics] == [False, True, True, False, False]
    log = (tmp_path / "run" / "sft" / "log.txt").read_text(encoding="utf-8")
    assert "step 2: loss or gradient not finite" in log and "2 in a row" in log
    assert not (tmp_path / "run" / "sft" / "diverged.json").exists()


def test_after_too_many_in_a_row_the_batch_of_all_ranks_is_kept(policy, tmp_path):
    overrides = [f"model.name_or_path={policy}", LENGTH_REWARD, "engine.zero_stage=2", "training.max_skipped_steps=2"]
    done = run_with_nan("agrpo", tmp_path / "run", 1, 3, 99, *overrides, nproc=2)
    directory = tmp_path / "run" / "agrpo"
    assert done.returncode not in (0, 2, 75)
    assert "3 steps in a row were not finite: lower training.learning_rate" in done.stderr
    told = json.loads((directory / "diverged.json").read_text(encoding="utf-8"))
    assert told["step"] == 2 and told["weight_version"] == 3  # two updates a rollout
    assert len(told["batch"]) == 16 and {row["rank"] for row in told["batch"]} == {0, 1}
    assert all(row["loss_finite"] == (row["rank"] == 0) for row in told["batch"])
    assert all(row["prompt"] and isinstance(row["completion"], str) for row in told["batch"])
    assert [row["step"] for row in rows(directory / "metrics.jsonl")] == [0, 1]
    assert "diverged.json" in (directory / "log.txt").read_text(encoding="utf-8")


def test_a_learning_rate_that_ruins_the_model_ends_stage_1_with_its_batch(tmp_path):
    ruin = ["training.learning_rate=1e30", "training.gradient_clipping=0", "training.max_steps=9"]
    done = launch("sft", *tiny("sft", tmp_path / "run", *NO_EVALUATION, *ruin))
    assert "4 steps in a row were not finite" in done.stderr, done.stderr[-3000:]
    told = json.loads((tmp_path / "run" / "sft" / "diverged.json").read_text(encoding="utf-8"))
    assert len(told["batch"]) == 16 and told["batch"][0].keys() == {"rank", "loss_finite", "prompt", "completion"}

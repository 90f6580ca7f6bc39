"""A run that was stopped goes on as if nothing had happened; a checkpoint is whole or it is none."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import launch, rows, tiny, tiny_policy
from tiny import FAMILIES, engine_of, ragged

from agrpo.engine import checkpoint
from agrpo.engine.backends.native import Sampling
from agrpo.engine.layout import build_layout
from agrpo.types import Prompt

CLOCKS = re.compile(r"^(time|throughput|memory)/|^time_s$")
NO_TESTS = ["evaluation.data=null", "evaluation.test=null", "logging.samples_per_step=16"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("policy") / "model")


def arguments(run, policy, number):
    reward = {"target": "interrupting_reward.length_until", "flag": str(run / "stop"), "call": 5, "number": number}
    own = [f"model.name_or_path={policy}", f"rewards=[{json.dumps(reward)}]", "training.max_steps=6"]
    return tiny("agrpo", run, *own, *NO_TESTS, "training.learning_rate=1e-3", "checkpoint.every=2", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, policy):
    """Six steps in one go."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = launch("agrpo", *arguments(run, policy, "SIGTERM"))
    assert done.returncode == 0, done.stderr
    return run / "agrpo"


def stopped(run, policy, number):
    """The same run, stopped in its fifth step; its exit code and directory."""
    run.mkdir()
    (run / "stop").touch()
    return launch("agrpo", *arguments(run, policy, number)).returncode, run / "agrpo"


def timeless(path):
    return [{key: value for key, value in row.items() if not CLOCKS.match(key)} for row in rows(path)]


def assert_equal_runs(directory, straight):
    assert timeless(directory / "metrics.jsonl") == timeless(straight / "metrics.jsonl")
    assert rows(directory / "samples.jsonl") == rows(straight / "samples.jsonl")
    mine, expected = (load_file(path / "model" / "model.safetensors") for path in (directory, straight))
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


def saved(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_a_signal_saves_and_running_again_completes_the_same_run(straight, policy, tmp_path):
    code, directory = stopped(tmp_path / "run", policy, "SIGTERM")
    assert code == 75
    assert saved(directory) == ["step-000002", "step-000004", "step-000005"]
    assert len(rows(directory / "metrics.jsonl")) == 5 and not (directory / "model").exists()

    changed = ["training.learning_rate=2e-3", "objective.group_loss.alpha=2"]
    refused = launch("agrpo", *arguments(tmp_path / "run", policy, "SIGTERM"), *changed)
    assert refused.returncode == 2
    for words in ("training.learning_rate", "objective.group_loss.alpha", "run.name", "checkpoint.resume=false"):
        assert words in refused.stderr
    assert "sampling" not in refused.stderr

    done = launch("agrpo", *arguments(tmp_path / "run", policy, "SIGTERM"))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "step-000005" in done.stdout
    assert_equal_runs(directory, straight)


def test_after_a_kill_and_a_damaged_checkpoint_the_one_before_serves(straight, policy, tmp_path):
    code, directory = stopped(tmp_path / "run", policy, "SIGKILL")
    assert code == -9
    assert saved(directory) == ["step-000002", "step-000004"]
    (states,) = (directory / "checkpoints" / "step-000004" / "engine").glob("*.pt")
    states.write_bytes(states.read_bytes()[:-1])
    done = launch("agrpo", *arguments(tmp_path / "run", policy, "SIGKILL"))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "step-000002" in done.stdout
    assert_equal_runs(directory, straight)


@pytest.fixture
def folder(straight, tmp_path):
    return shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")


def test_the_newest_whole_checkpoint_is_found(folder):
    path, state = checkpoint.newest(folder)
    assert path.name == "step-000006" and state["step"] == 6
    assert checkpoint.why_damaged(path) is None
    assert checkpoint.newest(folder / "nothing") is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_passed_over(folder, damage):
    newest = folder / "step-000006"
    (states,) = (newest / "engine").glob("*.pt")
    if damage == "cut":
        states.write_bytes(states.read_bytes()[:-1])
    elif damage == "flipped":
        content = bytearray(states.read_bytes())
        content[len(content) // 2] ^= 1
        states.write_bytes(content)
    elif damage == "missing":
        states.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:40])
    assert str(newest) in checkpoint.why_damaged(newest)
    assert checkpoint.newest(folder)[0].name == "step-000004"


def test_a_checkpoint_that_was_being_written_is_none(folder):
    (folder / "step-000006").rename(folder / ".step-000007.partial")
    assert checkpoint.newest(folder)[0].name == "step-000004"


def engine(zero_stage=0, dtype="float32"):
    torch.manual_seed(0)
    return engine_of(FAMILIES["qwen2-tied"](), zero_stage, dtype)


def train(one, steps):
    losses = []
    for _ in range(steps):
        loss = -one.forward(build_layout(*ragged(1)))[0].mean()
        one.backward(loss, True)
        one.step(1e-2)
        losses.append(loss.item())
    return losses


class Counter:
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return self.value

    def load_state_dict(self, state):
        self.value = state


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")])
def test_weights_optimiser_and_generation_come_back(zero_stage, dtype, tmp_path):
    prompts = [Prompt(text="", ids=(3, 4, 5), slot=0, columns={})]
    first, counter = engine(zero_stage, dtype), Counter()
    train(first, 2)
    first.skipped_steps, first.skipped_in_a_row = 4, 1
    counter.value = 5
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, first, {"counter": counter.state_dict()}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]

    second, restored = engine(zero_stage, dtype), Counter()
    untrained = second.generate(prompts, [4], Sampling(16), (0, 0))
    path, state = checkpoint.newest(tmp_path)
    checkpoint.load(path, state, second, {"counter": restored})
    assert restored.value == 5 and second.weight_version == first.weight_version == 2
    assert (second.skipped_steps, second.skipped_in_a_row) == (4, 1)
    expected = first.generate(prompts, [4], Sampling(16), (0, 0))
    again = second.generate(prompts, [4], Sampling(16), (0, 0))
    assert again.tokens.tolist() == expected.tokens.tolist() != untrained.tokens.tolist()
    assert torch.equal(again.logp, expected.logp)
    assert train(second, 2) == train(first, 2)


def test_another_number_of_processes_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, engine(), {}, keep=1)
    with pytest.raises(checkpoint.CheckpointError, match=r"written by 2 processes and this job has 1.*NPROC=2"):
        checkpoint.load(path, {"world_size": 2}, engine(), {})

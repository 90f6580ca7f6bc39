"""A run that was stopped goes on as if nothing had happened; a checkpoint is whole or it is none."""

import json
import os
import random
import re
import resource
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import launch, rows, tiny, tiny_policy
from tiny import FAMILIES, engine_of, ragged

from agrpo.engine import checkpoint
from agrpo.engine.backends.native import Sampling
from agrpo.engine.layout import build_layout
from agrpo.types import InputError, Prompt

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
    assert saved(directory) == ["step-000002", "step-000004", "step-000004.1"]  # in the middle of its rollout
    assert len(rows(directory / "metrics.jsonl")) == 4 and not (directory / "model").exists()

    changed = ["training.learning_rate=2e-3", "objective.group_loss.alpha=2"]
    refused = launch("agrpo", *arguments(tmp_path / "run", policy, "SIGTERM"), *changed)
    assert refused.returncode == 2
    for words in ("training.learning_rate", "objective.group_loss.alpha", "run.name", "checkpoint.resume=false"):
        assert words in refused.stderr
    assert "sampling" not in refused.stderr

    done = launch("agrpo", *arguments(tmp_path / "run", policy, "SIGTERM"))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "step-000004.1" in done.stdout
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
    assert "passed over" in done.stdout and "is not what the manifest says" in done.stdout
    assert_equal_runs(directory, straight)


@pytest.fixture
def folder(straight, tmp_path):
    return shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")


def test_the_newest_whole_checkpoint_is_found(folder):
    found, damaged = checkpoint.newest(folder)
    assert found.path.name == "step-000006" and found.state["step"] == 6 and damaged == []
    assert checkpoint.why_damaged(found.path) is None
    assert checkpoint.newest(folder / "nothing") == (None, [])


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
    found, (said,) = checkpoint.newest(folder)
    assert found.path.name == "step-000004" and str(newest) in said


def test_a_checkpoint_that_was_being_written_is_none(folder):
    (folder / "step-000006").rename(folder / ".step-000007.partial")
    assert checkpoint.newest(folder)[0].path.name == "step-000004"
    assert checkpoint.remove_leftovers(folder) == [".step-000007.partial"]
    assert not (folder / ".step-000007.partial").exists()


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


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "asynchronous"),
    [(0, "float32", False), (2, "float32", True), (3, "float32", False), (2, "bfloat16", False)],
)
def test_weights_optimiser_and_generation_come_back(zero_stage, dtype, asynchronous, tmp_path):
    prompts = [Prompt(text="", ids=(3, 4, 5), slot=0, columns={})]
    first, counter = engine(zero_stage, dtype), Counter()
    train(first, 2)
    first.skipped_steps, first.skipped_in_a_row = 4, 1
    counter.value = {"count": 5, "seen": (torch.tensor([True, False]), None)}
    writer = checkpoint.Writer(tmp_path, checkpoint.Keep(2), asynchronous)
    for step in (1, 2, 3):
        assert writer.save(step, first, {"counter": counter.state_dict()}, {}) is None
    assert writer.pending == asynchronous and writer.settle() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]

    second, restored = engine(zero_stage, dtype), Counter()
    untrained = second.generate(prompts, [4], Sampling(16), (0, 0))
    found, _ = checkpoint.newest(tmp_path)
    checkpoint.load(found.path, found.state, second, {"counter": restored})
    assert restored.value["count"] == 5 and torch.equal(restored.value["seen"][0], torch.tensor([True, False]))
    assert second.weight_version == first.weight_version == 2
    assert (second.skipped_steps, second.skipped_in_a_row) == (4, 1)
    expected = first.generate(prompts, [4], Sampling(16), (0, 0))
    again = second.generate(prompts, [4], Sampling(16), (0, 0))
    assert again.tokens.tolist() == expected.tokens.tolist() != untrained.tokens.tolist()
    assert torch.equal(again.logp, expected.logp)
    assert train(second, 2) == train(first, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A trained engine, and the folder with its checkpoint after step 1."""
    one, folder = engine(2), tmp_path_factory.mktemp("small")
    train(one, 1)
    assert checkpoint.Writer(folder, checkpoint.Keep(1)).save(1, one, {"counter": 5}, {}) is None
    return one, folder


def test_another_number_of_processes_is_refused(small):
    with pytest.raises(checkpoint.CheckpointError, match=r"written by 2 processes and this job has 1.*NPROC=2"):
        checkpoint.load(small[1] / "step-000001", {"world_size": 2}, engine(2), {})


def test_what_is_written_later_is_what_was_there_when_it_was_saved(small, tmp_path, monkeypatch):
    """The thread starts to write only after another optimiser step has changed every weight."""
    one, _ = small
    may_write, write = threading.Event(), checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *how: may_write.wait() and write(*how))
    writer = checkpoint.Writer(tmp_path, checkpoint.Keep(1), asynchronous=True)
    seen = torch.zeros(2)
    before = {name: weight.clone() for name, weight in one.module.state_dict().items()}
    assert writer.save(1, one, {"counter": {"seen": seen}}, {}) is None
    assert writer.busy and checkpoint.newest(tmp_path) == (None, [])
    seen += 1
    train(one, 1)
    assert not any(torch.equal(before[name], weight) for name, weight in one.module.named_parameters())
    may_write.set()
    assert writer.settle() is None
    found, _ = checkpoint.newest(tmp_path)
    second, restored = engine(2), Counter()
    checkpoint.load(found.path, found.state, second, {"counter": restored})
    assert restored.value["seen"].tolist() == [0, 0]
    assert all(torch.equal(before[name], weight) for name, weight in second.module.state_dict().items())


def test_the_best_stays_beside_the_newest(small, tmp_path):
    one, _ = small
    writer = checkpoint.Writer(tmp_path, checkpoint.Keep(1, best=max))
    for step, score in ((1, 0.2), (2, 0.9), (3, None), (4, 0.5)):
        writer.save(step, one, {}, {}, score=score)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004"]


def test_a_step_in_its_middle_comes_after_the_step_before(small, tmp_path):
    one, _ = small
    writer = checkpoint.Writer(tmp_path, checkpoint.Keep(9))
    for step, update in ((10, 0), (9, 2), (9, 10), (9, 0)):
        writer.save(step, one, {}, {}, update=update)
    assert [path.name for path in checkpoint._saved(tmp_path)] == [
        *("step-000009", "step-000009.2", "step-000009.10", "step-000010")
    ]
    assert checkpoint.newest(tmp_path)[0].state["step"] == 10


def test_a_full_disk_is_told_and_leaves_the_earlier_ones(small, tmp_path):
    """No file may grow beyond 64 KiB: what a full disk does to a checkpoint, without a disk."""
    one, _ = small
    writer = checkpoint.Writer(tmp_path, checkpoint.Keep(1))
    assert writer.save(1, one, {}, {}) is None
    allowed, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, most))
    try:
        error = writer.save(2, one, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, most))
        signal.signal(signal.SIGXFSZ, handler)
    assert "step-000002" in error and "File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.newest(tmp_path)[0].state["step"] == 1
    assert writer.save(2, one, {}, {}) is None


def test_every_flipped_bit_is_found(small, tmp_path):
    rng = random.Random(0)
    whole = shutil.copytree(small[1], tmp_path / "checkpoints") / "step-000001"
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    for path in files * 4:
        content = bytearray(path.read_bytes())
        place = rng.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        assert checkpoint.why_damaged(whole), (path, place)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
    assert checkpoint.why_damaged(whole) is None


class Stranger:
    """Its pickle runs a program."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.system, (f"touch {self.ran}",)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_pickled_stranger_is_refused_though_its_manifest_is_right(small, name, tmp_path):
    path = shutil.copytree(small[1], tmp_path / "checkpoints") / "step-000001"
    (target,) = path.glob(f"engine/*{name.removeprefix('zero_')}")
    torch.save(Stranger(tmp_path / "ran"), target)
    facts = {str(file.relative_to(path)): checkpoint._facts(file) for file in checkpoint._files(path)}
    del facts["manifest.json"]
    (path / "manifest.json").write_text(checkpoint._manifest(facts))
    assert checkpoint.why_damaged(path) is None
    with pytest.raises(InputError, match=r"refused: it holds more than tensors and plain values"):
        checkpoint.load(path, {"world_size": 1}, engine(2), {})
    assert not (tmp_path / "ran").exists()
    torch.load(target, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_a_file_that_the_manifest_does_not_know_is_refused(small, tmp_path):
    path = shutil.copytree(small[1], tmp_path / "checkpoints") / "step-000001"
    (path / "engine" / "more.pt").write_bytes(b"")
    assert "is not in the manifest" in checkpoint.why_damaged(path)

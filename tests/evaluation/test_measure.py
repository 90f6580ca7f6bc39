"""Evaluations of a tiny policy: the same numbers whole, interrupted at any place, and by any number of processes."""

import importlib.util
import json
import subprocess
import sys

import pytest
from stage_runs import ROOT, environment, tiny_policy

from agrpo.config import RewardSpec, RolloutConfig
from agrpo.evaluation.benchmarks import Benchmark, read_benchmark
from agrpo.evaluation.ledger import Ledger, read_results
from agrpo.evaluation.measure import How, measure
from agrpo.evaluation.summary import summarise, table
from agrpo.types import InputError
from reward_models.grading import grading

REWARD = {"target": "reward_models.rules.length", "scale": 16, "tokens": 4}
HOW = How(samples=3, max_completion_length=12, pass_at=-0.3)
ROLLOUT = RolloutConfig(max_sequences=6)  # two prompts a batch


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(tiny_policy(tmp_path_factory.mktemp("policy") / "model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps({"q": f"{n}+{n}=", "a": str(2 * n), "n": n}) + "\n" for n in range(7)))
    return path


def run(policy, data, out, how=HOW, again=False, notes=None):
    rows = read_benchmark(Benchmark("sums", columns={"prompt": "q", "solution": "a"}, chat=False), path=data)
    graded = grading([RewardSpec(**REWARD)], "reward_models.rules.answers.vote")
    note = (lambda text: None) if notes is None else notes.append
    return measure(policy, rows, graded, how, ROLLOUT, out, note, again=again)


@pytest.fixture(scope="module")
def whole(policy, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return run(policy, data, out), (out / "results.jsonl").read_text().splitlines(keepends=True)


def test_every_prompt_has_its_completions_and_grades(whole):
    rows, lines = whole
    assert [row["slot"] for row in rows] == list(range(7)) and len(lines) == 8
    assert [row["columns"] for row in rows] == [{"n": n, "solution": str(2 * n)} for n in range(7)]
    for row in rows:
        assert len(row["samples"]) == 3 and len({one["text"] for one in row["samples"]}) > 1
        for one in [*row["samples"], row["greedy"]]:
            assert one["reward"] == one["scores"]["length"] and one["passes"] == (one["reward"] >= -0.3)
            assert 1 <= one["tokens"] <= 12
    told = summarise(rows)
    assert {"pass1", "pass_k", "greedy", "n", "interval", "maj_k", "mean_reward", "mean_length"} <= told.keys()
    assert told["pass1"] == pytest.approx(sum(o["passes"] for row in rows for o in row["samples"]) / 21)
    assert told["mean_length"] == pytest.approx(sum(o["tokens"] for row in rows for o in row["samples"]) / 21)
    assert 0 < told["pass1"] < 1
    assert "7 prompts, 3 samples each" in table(told) and "maj@3" in table(told)


CUTS = {
    "after the header": lambda lines: lines[:1],
    "between batches": lambda lines: lines[:5],
    "inside a batch": lambda lines: lines[:4],
    "inside a line": lambda lines: [*lines[:5], lines[5][:40]],
    "a line changed": lambda lines: [*lines[:3], lines[3].replace('"slot": 2', '"slot": 3'), *lines[4:]],
    "a line of noise": lambda lines: [*lines[:3], "\x00garbage\n", *lines[4:]],
    "nothing left": lambda lines: [],
}


@pytest.mark.parametrize("cut", CUTS)
def test_an_interrupted_evaluation_ends_in_the_same_results(policy, data, whole, tmp_path, cut):
    rows, lines = whole
    left = CUTS[cut](lines)
    assert left != lines
    (tmp_path / "results.jsonl").write_text("".join(left))
    notes = []
    assert run(policy, data, tmp_path, notes=notes) == rows
    assert read_results_of(tmp_path) == rows
    assert any("cut off or changed" in note for note in notes) == (
        cut in ("inside a line", "a line changed", "a line of noise")
    )


def read_results_of(folder):
    """The file's rows, without what an interruption left of a line."""
    path = folder / "results.jsonl"
    found = Ledger(path, json.loads(path.read_text().splitlines()[0])["identity"]).rows
    return [found[slot] for slot in sorted(found)]


def test_a_finished_evaluation_is_only_read(policy, data, whole, tmp_path, monkeypatch):
    rows, lines = whole
    (tmp_path / "results.jsonl").write_text("".join(lines))
    monkeypatch.setattr("agrpo.evaluation.measure.load_backend", None)  # a model that is not loaded cannot answer
    assert run(policy, data, tmp_path) == rows
    assert read_results(tmp_path / "results.jsonl") == rows


def test_other_settings_are_another_evaluation(policy, data, whole, tmp_path):
    _, lines = whole
    (tmp_path / "results.jsonl").write_text("".join(lines))
    other = How(**{**vars(HOW), "seed": 1})
    with pytest.raises(InputError, match=r"another evaluation \(how differ\).*--again"):
        run(policy, data, tmp_path, how=other)
    assert run(policy, data, tmp_path, how=other, again=True) != whole[0]
    named = tmp_path / "by-{identity}"
    run(policy, data, named)
    run(policy, data, named, how=other)
    assert len(list(tmp_path.glob("by-*/results.jsonl"))) == 2


def test_a_damaged_file_is_not_taken_for_results(tmp_path, whole):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(CUTS["a line changed"](whole[1])))
    with pytest.raises(InputError, match=r"results.jsonl:4: is cut off or was changed"):
        read_results(path)
    path.write_text('{"some": "file"}\n')
    with pytest.raises(InputError):
        read_results(path)


def test_a_reward_that_fails_ends_the_evaluation(policy, data, tmp_path):
    rows = read_benchmark(Benchmark("sums", columns={"prompt": "q"}, chat=False), path=data)
    graded = grading([RewardSpec(target="reward_models.rules.accuracy")], None)
    with pytest.raises(InputError, match=r"a reward failed.*solution"):
        measure(policy, rows, graded, HOW, ROLLOUT, tmp_path, lambda text: None)


def agrpo_eval(policy, data, out, *arguments, nproc=1):
    command = [sys.executable, "-m", "agrpo.cli", "eval", "--model", policy, "--data", str(data)]
    command += ["--prompt-column", "q", "--answer-column", "a", "--pass-at=-0.3", "--samples", "3"]
    command += ["--max-tokens", "12", "--max-sequences", "6", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(nproc), capture_output=True, text=True, timeout=300)


def test_the_command_stopped_by_a_signal_goes_on_in_two_processes_to_the_same_numbers(policy, data, whole, tmp_path):
    flag, out, numbers = tmp_path / "flag", tmp_path / "out", tmp_path / "numbers.json"
    flag.touch()
    stopping = {"target": "interrupting_reward.length_until", "name": "length"}  # the same lengths, and a signal
    stopping |= {"flag": str(flag), "call": 5, "number": "SIGTERM"}  # in the third batch
    first = agrpo_eval(policy, data, out, "--reward", json.dumps(stopping))
    assert first.returncode == 75 and "run the same command again" in first.stderr, first.stderr
    assert len((out / "results.jsonl").read_text().splitlines()) == 1 + 4
    second = agrpo_eval(policy, data, out, "--reward", json.dumps(stopping), "--json", str(numbers), nproc=2)
    assert second.returncode == 0, second.stderr[-2000:]
    assert read_results(out / "results.jsonl") == whole[0]
    told = json.loads(numbers.read_text())
    assert summarise(whole[0]).items() <= told.items()
    assert told["left_out"] == 0 and "pass@1" in second.stdout


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_measures_the_same_greedy_completions(data, tmp_path):
    model = tiny_policy(tmp_path / "model", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    rows = {}
    for backend in ("native", "vllm"):
        done = agrpo_eval(str(model), data, tmp_path / backend, "--backend", backend)
        assert done.returncode == 0, done.stderr[-2000:]
        rows[backend] = read_results(tmp_path / backend / "results.jsonl")
    greedy = {name: [row["greedy"] for row in of] for name, of in rows.items()}
    assert greedy["vllm"] == greedy["native"]
    assert all(len(row["samples"]) == 3 for row in rows["vllm"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--prompt-column", "question"], "sums.jsonl:1: has no column 'question', it has q, a, n"),
        (["--k", "1,9"], "--k: 9 is not between 1 and --samples 3"),
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--reward", "reward_models.rules.nothing"], "has no 'nothing'"),
        (["--lm-eval", "mine", "--lm-eval-args", "--limit 1"], "pip install 'agrpo[eval]'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(policy, data, tmp_path, arguments, message, capsys, monkeypatch):
    import runpy

    if "--lm-eval" in arguments and importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is installed")
    options = {"--model": policy, "--data": str(data), "--prompt-column": "q", "--answer-column": "a"}
    options |= {"--samples": "3", "--out": str(tmp_path / "out")}
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    script = runpy.run_path(str(ROOT / "stages/evaluation/evaluate.py"))
    words = [f"{key}={value}" for key, value in options.items()]
    assert script["exit_code"](script["main"], words) == 2
    assert message in capsys.readouterr().err

"""The three stages in sequence, as a user runs them, and what they leave behind."""

import hashlib
import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_runs import rows, run_tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from agrpo.config import load_config
from reward_models.learned import LearnedReward

STAGES = ("sft", "reward", "agrpo")
EVERY_STEP = {"step", "time_s", "loss", "grad_norm", "learning_rate", "time/step_s"}
EVERY_STEP |= {"throughput/completion_tokens_per_s"}
POLICY_STEP = EVERY_STEP | {
    *("reward", "reward_std", "rewards/accuracy/mean", "kl", "entropy", "completions/mean_length"),
    *("completions/clipped_ratio", "clip_ratio/region_mean", "frac_reward_zero_std", "agrpo/beta", "agrpo/epsilon"),
    *("agrpo/lambda", "agrpo/kl_symmetric", "agrpo/advantage_variance", "time/generate_s", "time/reward_s"),
    *("time/update_s", "memory/peak_gib"),
}
# An untrained model is never right: the second reward is what it can learn from.
REWARDS = "[{target: reward_models.rules.accuracy}, {target: reward_models.rules.length, scale: 16, tokens: 4}]"
PROMPTS = ["3+4=", "9-1-2+3=", "1+1="]
COMPLETIONS = ["<think>3+4=7</think><answer>7</answer>", "<answer>9</answer>", "2"]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The run directory of all three stages."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for stage in STAGES:
        more = [] if stage == "reward" else ["evaluation.samples=8"]
        more += [f"rewards={REWARDS}"] if stage == "agrpo" else []
        run_tiny(stage, run, "checkpoint.every=2", "evaluation.every=3", *more)
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_directory_holds_what_is_promised(run, stage):
    directory = run / stage
    written = yaml.safe_load((directory / "config.yaml").read_text())
    assert written["training"]["max_steps"] == 5 and written["run"]["name"] == "tiny"
    assert load_config(stage, directory / "config.yaml").seed == 0
    assert (directory / "config.yaml").read_text().startswith("# agrpo")

    metrics = rows(directory / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert all((POLICY_STEP if stage == "agrpo" else EVERY_STEP) <= row.keys() for row in metrics)
    assert all(math.isfinite(row["loss"]) for row in metrics)
    assert [row["time_s"] for row in metrics] == sorted(row["time_s"] for row in metrics)
    watched = "evaluation/pairwise_accuracy" if stage == "reward" else "evaluation/pass1"
    assert [watched in row for row in metrics] == [False, False, True, False, False]

    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set().union(*metrics) - {"step", "time_s"}
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("loss")] == [
        (r["step"], r["loss"]) for r in metrics
    ]

    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    checkpoint = directory / "checkpoints" / "step-000004"
    manifest = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} == {
        *manifest,
        "manifest.json",
    }
    for name, facts in manifest.items():
        content = (checkpoint / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    model = {path.name for path in (directory / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= model
    assert stage == "reward" or "generation_config.json" in model


def test_samples_say_prompt_completion_rewards_and_advantage(run):
    samples = rows(run / "agrpo" / "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for row in samples:
        assert {"prompt", "completion", "rewards", "advantage"} <= row.keys()
        assert row["prompt"].endswith("=") and set(row["rewards"]) == {"accuracy", "length"}
        assert len(row["pieces"]) == len(row["logp"]) == len(row["log_ratio"]) == row["tokens"]
        spoken = [piece for piece in row["pieces"] if piece not in ("<|pad|>", "<|end|>")]
        assert "".join(spoken) == row["completion"] and max(row["logp"]) <= 0
    ratios = {step: [v for row in samples if row["step"] == step for v in row["log_ratio"]] for step in (0, 4)}
    assert max(map(abs, ratios[0])) < 2e-3, "the policy begins as the reference"
    assert max(map(abs, ratios[4])) > 2e-3, "and has moved away by the last step"
    assert "finished its 5 steps" in (run / "report.html").read_text()
    assert (run / "agrpo" / "report.html").read_text() == (run / "report.html").read_text()


def test_the_summary_has_the_promised_shape(run):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {*STAGES, "seconds", "seed"} and set(summary["seconds"]) == set(STAGES)
    shares = {"test_pass1", "test_pass8", "test_greedy"}
    assert shares <= summary["sft"].keys() and shares | {"mean_length"} <= summary["agrpo"].keys()
    assert {"pairwise_accuracy", "best_heuristic", "pairs"} <= summary["reward"].keys()
    assert all(0 <= summary[stage][key] <= 1 for stage in ("sft", "agrpo") for key in shares)
    results = rows(run / "agrpo" / "evaluation-test.jsonl")
    assert len(results) == 24
    assert sum(r["passes"] for r in results) / (24 * 8) == pytest.approx(summary["agrpo"]["test_pass1"])


@pytest.mark.parametrize("stage", ["sft", "agrpo"])
def test_a_policy_loads_in_plain_transformers_and_answers(run, stage):
    model = AutoModelForCausalLM.from_pretrained(run / stage / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / stage / "model")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    weights = load_file(run / stage / "model" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(value, weights[name])
    inputs = tokenizer("3+4=", return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    greedy = {row["text"]: row["greedy"] for row in rows(run / stage / "evaluation-test.jsonl")}
    assert 0 < len(answer) <= 12
    for prompt, said in list(greedy.items())[:4]:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == said


def test_each_stage_starts_from_the_one_before_and_moves_on(run):
    sft, policy = (load_file(run / stage / "model" / "model.safetensors") for stage in ("sft", "agrpo"))
    assert sft.keys() == policy.keys()
    largest = max(float((sft[name] - policy[name]).abs().max()) for name in sft)
    rate = load_config("agrpo", run / "agrpo" / "config.yaml").training.learning_rate
    assert 0 < largest < 10 * 5 * 2 * rate  # Adam moves a weight by about the learning rate a step


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_reward_model_scores_alike_in_plain_transformers(run, side):
    folder = run / "reward" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    texts = [p + c + tokenizer.eos_token for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert (inputs["input_ids"] == tokenizer.pad_token_id).any()
    with torch.no_grad():
        plain = model(**inputs).logits[:, 0]
    ours = torch.tensor(LearnedReward(str(folder))(PROMPTS, COMPLETIONS, None))
    assert (plain - ours).abs().max() < 1e-5
    assert plain.std() > 1e-3


def test_stage_3_runs_with_the_learned_reward_alone(run, tmp_path):
    mine = shutil.copytree(run, tmp_path / "tiny")
    directory = run_tiny("agrpo", mine, "rewards=[{target: reward_models.learned}]", "training.max_steps=2")
    metrics = rows(directory / "metrics.jsonl")
    assert len(metrics) == 2 and all(row["reward_std"] > 0 and row["grad_norm"] > 0 for row in metrics)
    score = LearnedReward(str(mine / "reward" / "model"))
    for sample in rows(directory / "samples.jsonl"):
        assert sample["rewards"] == {
            "learned": pytest.approx(score([sample["prompt"]], [sample["completion"]])[0], abs=1e-5)
        }

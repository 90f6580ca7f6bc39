"""Ensembles and implicit rewards, against plain transformers on one text at a time."""

import contextlib
import copy
import json
import math
import re
import statistics
import subprocess
import sys
import time

import pytest
import torch
from stage_runs import ROOT, environment, run_several, tiny_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from agrpo.config import load_config
from agrpo.models import ModelError
from reward_models import ensemble, implicit, learned

PROMPTS = ["3+4=", "3+4=", "9-1=", "2+2-1="]
COMPLETIONS = ["<answer>7</answer>", "<think>3+4=8</think><answer>8</answer>", "8", "<answer>3</answer>"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two reward models and one with three heads, on the same random policy; the policy, and another one."""
    root = tmp_path_factory.mktemp("models")
    tiny_policy(root / "reference")
    tokenizer = AutoTokenizer.from_pretrained(root / "reference")
    for name, seed, heads in (("one", 1, 1), ("two", 2, 1), ("three-heads", 3, 3)):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(root / "reference", num_labels=heads)
        model.score.weight.data.normal_()
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    policy = AutoModelForCausalLM.from_pretrained(root / "reference")
    for parameter in policy.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    policy.save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    return root


def plain_scores(folder):
    """[completion][head] by transformers, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [p + c + tokenizer.eos_token for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]
    with torch.no_grad():
        return [model(**one).logits[0].tolist() for one in ids]


def test_heads_of_one_model_vote_as_they_are(models):
    votes = plain_scores(models / "three-heads")
    reward = ensemble.build([str(models / "three-heads")], kappa=0.5)
    expected = [statistics.fmean(v) - 0.5 * statistics.pstdev(v) for v in votes]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)
    assert reward.metrics["uncertainty"] == pytest.approx(statistics.fmean(map(statistics.pstdev, votes)), abs=1e-4)


def test_a_conversation_is_scored_at_the_assistants_last_turn(models):
    """By transformers, on the text that the chat template makes; what a tool says at the end counts for nothing."""

    def turns(*contents):
        roles = ("assistant", "tool")
        return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]

    prompts = [[{"role": "user", "content": "3+4="}]] * 3 + [[{"role": "user", "content": "9-1="}]]
    completions = [turns("7"), turns("3+4", "7", "7"), turns("4+3", "7", "8", "1", "7", "2"), turns("8", "8")]
    model = AutoModelForSequenceClassification.from_pretrained(models / "one").eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "one")
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = [*prompt, *(completion if len(completion) % 2 else completion[:-1])]
        text = tokenizer.apply_chat_template(whole, tokenize=False).rstrip("\n")
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            expected.append(model(**ids).logits[0, 0].item())
    assert learned.build(str(models / "one"))(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == 4


def test_models_are_brought_to_one_scale_before_they_vote(models):
    columns = [[v[0] for v in plain_scores(models / name)] for name in ("one", "two")]
    standard = [[(x - statistics.fmean(c)) / statistics.pstdev(c) for x in c] for c in columns]
    expected = [statistics.fmean(v) - statistics.pstdev(v) for v in zip(*standard, strict=True)]
    reward = ensemble.build([str(models / "one"), str(models / "two")])
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)


def test_one_voter_is_no_ensemble(models):
    with pytest.raises(ValueError, match="two at least"):
        ensemble.build([str(models / "one")])
    with pytest.raises(ValueError, match="kappa"):
        ensemble.build([str(models / "one"), str(models / "two")], kappa=-1.0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_implicit_reward_is_the_log_ratio_of_plain_transformers(models, reduction):
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt", add_special_tokens=False)
        ids = ids["input_ids"]
        sums = []
        for name in ("policy", "reference"):
            model = AutoModelForCausalLM.from_pretrained(models / name).eval()
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            sums.append(log_p.gather(1, ids[0, 1:, None])[start - 1 :, 0].sum().item())
        length = ids.shape[1] - start if reduction == "mean" else 1
        expected.append(0.3 * (sums[0] - sums[1]) / length)
    folders = [str(models / name) for name in ("policy", "reference")]
    for budget in (1, 10_000):
        reward = implicit.build(*folders, alpha=0.3, reduction=reduction, batch_tokens=budget)
        assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.01


def test_two_tokenizers_make_no_implicit_reward(models, tmp_path):
    other = copy.deepcopy(AutoTokenizer.from_pretrained(models / "policy"))
    other.add_tokens(["<new>"])
    AutoModelForCausalLM.from_pretrained(models / "policy").save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="different tokenizers"):
        implicit.build(str(models / "policy"), str(tmp_path))


@contextlib.contextmanager
def served(folder, entry, monkeypatch):
    """The URL of a real server of one reward; the clients' processes inherit its token."""
    monkeypatch.setenv("AGRPO_REWARD_TOKEN", "a-secret-of-this-test-0123456789")
    (folder / "rewards.yaml").write_text(f"rewards: [{entry}]")
    log = folder / "server.txt"
    arguments = ["serve-reward", "--config", str(folder / "rewards.yaml"), "--port", "0"]
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-m", "agrpo.cli", *arguments], cwd=ROOT, env=environment(), stderr=stderr
        )
    try:
        until = time.monotonic() + 60
        while not (found := re.search(r"serving at (http://[\d.]+:\d+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        server.terminate()
        server.wait(20)


def test_the_same_stage_3_runs_on_any_reward_by_its_rewards_alone(models, tmp_path, monkeypatch):
    """Rule, learned head, heads, implicit, remote, and all of them together with a gate and a running scale."""
    few = ["training.max_steps=2", f"model.name_or_path={models / 'reference'}"]
    of_stage_2 = {"head": [], "heads": ["heads=3"], "implicit": ["method=dpo"]}
    trained = {name: tmp_path / name / "reward" / "model" for name in of_stage_2}
    rule = "{target: reward_models.rules.length, scale: 16, tokens: 4}"
    learned = f"{{target: reward_models.learned, model: {trained['head']}"
    heads = f"{{target: reward_models.ensemble, models: [{trained['heads']}], kappa: 0.5}}"
    implied = f"{{target: reward_models.implicit, model: {trained['implicit']}, reference: {models / 'reference'}"
    gated = f"{learned}, gate: {{reward: length, at_least: -0.9}}}}"
    with served(tmp_path, rule, monkeypatch) as url:
        remote = f"{{target: reward_models.remote, url: '{url}'}}"
        run_and_check(tmp_path, few, of_stage_2, rule, learned, heads, implied, gated, remote)
    curves = {name: _lines(tmp_path / name / "agrpo" / "metrics.jsonl") for name in ("rule", "remote")}
    assert [row["reward"] for row in curves["rule"]] == [row["reward"] for row in curves["remote"]]


def _lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_and_check(tmp_path, few, of_stage_2, rule, learned, heads, implied, gated, remote):
    of_stage_3 = {
        "rule": rule,
        "remote": remote,
        "learned": f"{learned}}}",
        "ensemble": heads,
        "implied": f"{implied}}}",
        "all": ", ".join((rule, remote, heads, f"{implied}, normalise: true}}", gated)),
    }
    runs = [("reward", tmp_path / name, [*few, *more]) for name, more in of_stage_2.items()]
    runs += [
        ("agrpo", tmp_path / name, [*few, f"rewards=[{rewards}]", "evaluation.test="])
        for name, rewards in of_stage_3.items()
    ]
    done = run_several(runs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name, rewards in of_stage_3.items():
        directory = tmp_path / name / "agrpo"
        assert (directory / "result.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
        labels = [spec.label for spec in load_config("agrpo", directory / "config.yaml").rewards]
        last = _lines(directory / "metrics.jsonl")[-1]
        assert all(math.isfinite(last[f"rewards/{label}/mean"]) for label in labels)
        assert last["reward_std"] > 0 and last["grad_norm"] > 0
        assert ("rewards/ensemble/uncertainty" in last) == ("ensemble" in rewards)

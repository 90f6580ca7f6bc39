"""Every method that a configuration can name, run for a few steps: what it logs follows from what it sampled."""

import json
import math
import re
from itertools import combinations, groupby, pairwise
from statistics import fmean, pstdev

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_runs import LENGTH_REWARD, ROOT, rows, run_several, tiny_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from agrpo.config import METHODS, PREFERENCE_METHODS, load_config
from agrpo.data.tasks.chains import preference_groups

PROMPTS, SIZE, LIMIT, STEPS = 4, 4, 16, 10
BUFFER = 3  # tokens, a fifth of the limit
DELTA = 1e-4
COMMON = ["evaluation.data=null", "logging.samples_per_step=99"]
POLICY = [*COMMON, "evaluation.test=null", f"training.max_steps={STEPS}", "training.learning_rate=2e-3"]
TWO_REWARDS = (
    "rewards=[{target: reward_models.rules.length, scale: 16, tokens: 4},"
    " {target: reward_models.rules.length, name: short, scale: 8, weight: 0.5}]"
)
FEW_GROUPS = ["training.max_steps=8", "training.learning_rate=3e-3", "data.parameters.count=8"]
# Stopped at the third call of the reward and run again: what each of them must carry over is in the checkpoint.
RANKED = "{data: {source: 'python:agrpo.data.tasks.chains:preference_groups', parameters: {count: 32}}, ratio: 0.4}"
STOPPED = {
    "a critic": ["method=ppo"],
    "rounds of sampling": ["method=dapo", "sampling.temperature=0.3"],
    "ranked data": [f"objective.group_loss.ranked={RANKED}", "objective.group_loss.ranked.groups_per_step=4"],
    "adaptive groups and entropy": [
        *("grouping.kind=adaptive", "grouping.most=8", "controllers.entropy.kind=adaptive"),
        *("objective.entropy_coef=0.01", "controllers.entropy.target=1.0"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("presets")


@pytest.fixture(scope="module")
def start(folder):
    """The model that all runs start from, untrained."""
    return tiny_policy(folder / "start")


def without_lambda(file):
    """The quickstart's stage 2 without a λ of its own, which would win over the method's."""
    values = yaml.safe_load((ROOT / "configs" / "quickstart" / "reward.yaml").read_text())
    values.pop("lambda", None)
    file.write_text(yaml.safe_dump(values))
    return str(file)


@pytest.fixture(scope="module")
def done(folder, start):
    """The process that did all runs, one after the other."""
    model = f"model.name_or_path={start}"
    runs = [
        ("agrpo", folder / name, [*POLICY, model, TWO_REWARDS if name == "gdpo" else LENGTH_REWARD, f"method={name}"])
        for name in METHODS
    ]
    file = without_lambda(folder / "reward.yaml")
    runs += [
        ("reward", folder / f"preferences-{name}", ["--config", file, *COMMON, *FEW_GROUPS, model, f"method={name}"])
        for name in PREFERENCE_METHODS
    ]
    for name, overrides in STOPPED.items():
        run, again = folder / name.replace(" ", "-"), folder / (name.replace(" ", "-") + "-straight")
        run.mkdir()
        (run / "stop").touch()
        for directory in (run, run, again):
            reward = {"target": "interrupting_reward.length_until", "call": 3, "number": "SIGTERM"}
            reward = json.dumps({**reward, "flag": str(run / "stop")})
            own = [*overrides, model, f"rewards=[{reward}]", "training.max_steps=5", "checkpoint.every=9"]
            runs.append(("agrpo", directory, [*POLICY, *own]))
    return run_several(runs)


def directory_of(done, run, stage="agrpo"):
    assert (run / stage / "result.json").exists(), done.stderr[-4000:]
    return run / stage


@pytest.fixture(params=METHODS)
def policy(request, folder, done):
    """(name, directory) of each preset of stage 3."""
    return request.param, directory_of(done, folder / request.param)


def weights(directory):
    return load_file(directory / "model.safetensors")


def largest_change(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_preset_trains_and_earns_more_reward(policy, start):
    _, directory = policy
    metrics = rows(directory / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS))
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert largest_change(weights(directory / "model"), weights(start)) > 1e-3
    rewards = [row["reward"] for row in metrics]
    assert fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.1


def test_no_two_presets_learn_the_same(folder, done):
    left = {name: weights(directory_of(done, folder / name) / "model") for name in METHODS}
    for one, other in combinations(left, 2):
        assert largest_change(left[one], left[other]) > 1e-5, (one, other)


def first_samples(directory, step=0):
    """The completions of a step, prompt by prompt."""
    samples = [row for row in rows(directory / "samples.jsonl") if row["step"] == step]
    return [list(group) for _, group in groupby(samples, key=lambda row: row["prompt"])]


def group_normalised(rewards):
    return [(r - fmean(rewards)) / (pstdev(rewards) + DELTA) for r in rewards]


def shrunk(rewards, others):
    """A-GRPO's: the group's variance and the batch's, by how many completions stand for each; κ = 4."""
    w = (len(rewards) - 1) / (len(rewards) - 1 + 4)
    batch = fmean([(r - fmean(group)) ** 2 for group in others for r in group])
    return [(r - fmean(rewards)) / math.sqrt(w * pstdev(rewards) ** 2 + (1 - w) * batch + DELTA) for r in rewards]


def filtered(rewards):
    """KRPO's filter: each reward against the state just after it."""
    state, variance, found = 0.0, 1.0, []
    for r in rewards:
        variance += 1e-5
        gain = variance / (variance + 1e-2)
        state, variance = state + gain * (r - state), (1 - gain) * variance
        found.append((r - state) / (math.sqrt(variance) + DELTA))
    return found


def batch_normalised(values):
    return [(v - fmean(values)) / (pstdev(values) + DELTA) for v in values]


def decoupled(groups):
    """GDPO's: each reward in its group, their weighted sum over the batch."""
    columns = [
        [a for group in groups for a in group_normalised([row["rewards"][name] for row in group])]
        for name in ("length", "short")
    ]
    return batch_normalised([a + 0.5 * b for a, b in zip(*columns, strict=True)])


def of_tokens(groups, decay):
    """The reward at the last token, `decay` a token before it, over all tokens of the batch; the completions' means."""
    samples = [row for group in groups for row in group]
    raw = [row["reward"] * decay ** (row["tokens"] - 1 - t) for row in samples for t in range(row["tokens"])]
    normal = iter(batch_normalised(raw))
    return [fmean(next(normal) for _ in range(row["tokens"])) for row in samples]


BY_GROUP = {
    "dr_grpo": lambda rewards: [r - fmean(rewards) for r in rewards],
    "rloo": lambda rewards: [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards],
    "krpo": filtered,
}


def expected_advantages(name, groups):
    """The method's advantages of the first step's completions: no critic knows anything yet, nothing is penalised."""
    if name in ("ppo", "reinforce_pp"):
        return of_tokens(groups, decay=0.95 if name == "ppo" else 1.0)
    if name == "gdpo":
        return decoupled(groups)
    rewards = [[row["reward"] for row in group] for group in groups]
    if name == "agrpo":
        found = [shrunk(own, rewards) for own in rewards]
    else:
        found = [BY_GROUP.get(name, group_normalised)(own) for own in rewards]
    return [
        0.0 if len(set(own)) == 1 else a for own, advantages in zip(rewards, found, strict=True) for a in advantages
    ]


def test_the_advantages_are_the_methods_own(policy):
    name, directory = policy
    groups = first_samples(directory)
    assert [len(group) for group in groups] == [SIZE] * (2 * PROMPTS if name == "cppo" else PROMPTS)
    found = [row["advantage"] for group in groups for row in group]
    assert found == pytest.approx(expected_advantages(name, groups), rel=2e-3, abs=1e-4)
    assert max(found) > 0.05 > -0.05 > min(found)


def aggregated(name, completions):
    """−Σ w·A of whole completions, as the method weighs them."""
    count, tokens = len(completions), sum(row["tokens"] for row in completions)
    if name in ("dr_grpo", "rloo"):
        return -sum(row["advantage"] * row["tokens"] for row in completions) / (count * LIMIT)
    if name in ("agrpo", "dapo", "ppo", "reinforce_pp"):
        return -sum(row["advantage"] * row["tokens"] for row in completions) / tokens
    return -fmean(row["advantage"] for row in completions)


def test_the_first_loss_follows_from_the_advantages(policy):
    """At the first update every ratio is 1 and the policy is its own reference."""
    name, directory = policy
    groups = first_samples(directory)
    if name == "cppo":  # half of each group, those of largest |A|
        groups = [sorted(group, key=lambda row: -abs(row["advantage"]))[: SIZE // 2] for group in groups]
        assert sum(map(len, groups)) == PROMPTS * SIZE
    completions = [row for group in groups for row in group]
    expected = aggregated(name, completions)
    if name == "agrpo":
        expected = 0.95 * expected + 0.05 * math.log(2)  # λ, and no pair told apart
    if name == "ppo":  # the critic says 0 of every token
        returns = [(row["reward"] * 0.95**back) ** 2 for row in completions for back in range(row["tokens"])]
        expected += 0.5 * fmean(returns) / 2
    assert rows(directory / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, abs=2e-5)


def test_only_ppo_has_a_critic_and_it_learns(policy):
    name, directory = policy
    metrics = rows(directory / "metrics.jsonl")
    assert all(("agrpo/value_loss" in row) == (name == "ppo") for row in metrics)
    if name == "ppo":
        assert fmean(row["agrpo/value_loss"] for row in metrics[-3:]) < 0.7 * metrics[0]["agrpo/value_loss"]


def test_dapo_samples_until_enough_groups_differ_and_punishes_the_overlong(folder, done):
    directory = directory_of(done, folder / "rounds-of-sampling")
    metrics = rows(directory / "metrics.jsonl")
    rounds = [row["agrpo/sampling_rounds"] for row in metrics]
    assert max(rounds) > 1
    for row in metrics:
        assert 1 <= row["agrpo/sampling_rounds"] <= 4
        sampled = PROMPTS * row["agrpo/sampling_rounds"]
        assert row["agrpo/groups_discarded"] == sampled - PROMPTS
        silent = max(0, PROMPTS - round(row["agrpo/groups_mixed"] * sampled))
        assert row["frac_reward_zero_std"] == silent / PROMPTS
    for row in rows(directory / "samples.jsonl"):
        assert row["rewards"]["overlong"] == pytest.approx(-max(0, row["tokens"] - (LIMIT - BUFFER)) / BUFFER)
        assert row["reward"] == pytest.approx(sum(row["rewards"].values()))


def test_adaptive_groups_spend_the_budget_and_the_entropy_weight_follows_the_entropy(folder, done):
    directory = directory_of(done, folder / "adaptive-groups-and-entropy")
    metrics = rows(directory / "metrics.jsonl")
    for row in metrics:
        sizes = [len(group) for group in first_samples(directory, row["step"])]
        assert sum(sizes) == PROMPTS * SIZE
        assert (min(sizes), max(sizes)) == (row["agrpo/group_size_min"], row["agrpo/group_size_max"])
    assert any(row["agrpo/group_size_max"] > row["agrpo/group_size_min"] for row in metrics)
    for row, after in pairwise(metrics):
        moved = math.exp(-0.02 * max(-1.0, min(1.0, row["entropy"] - 1.0)))
        assert after["agrpo/entropy_coef"] == pytest.approx(row["agrpo/entropy_coef"] * moved)
    assert metrics[-1]["agrpo/entropy_coef"] != metrics[0]["agrpo/entropy_coef"] == 0.01


def test_ranked_data_is_learned_beside_the_samples(folder, done):
    metrics = rows(directory_of(done, folder / "ranked-data") / "metrics.jsonl")
    assert all(0 <= row["agrpo/ranked_accuracy"] <= 1 for row in metrics)
    assert metrics[0]["agrpo/ranked_loss"] == pytest.approx(math.log(2), abs=0.01)
    assert len({row["agrpo/ranked_loss"] for row in metrics}) == len(metrics)


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(folder, done, name):
    again, straight = (directory_of(done, folder / (name.replace(" ", "-") + end)) for end in ("", "-straight"))
    assert re.search(rf"resumed from {again / 'checkpoints'}/step-00000[0-4]", done.stdout.replace("\n", ""))
    for file in ("metrics.jsonl", "samples.jsonl"):
        timeless = [
            [
                {key: value for key, value in row.items() if not key.startswith(("time", "throughput", "memory"))}
                for row in rows(directory / file)
            ]
            for directory in (again, straight)
        ]
        assert timeless[0] == timeless[1]
    assert largest_change(weights(again / "model"), weights(straight / "model")) == 0


@pytest.fixture(params=PREFERENCE_METHODS)
def preferences(request, folder, done):
    """(name, directory) of each preset of stage 2."""
    return request.param, directory_of(done, folder / f"preferences-{request.param}", "reward")


def test_a_preference_preset_learns_its_groups(preferences):
    name, directory = preferences
    metrics = rows(directory / "metrics.jsonl")
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    loss = [row["agrpo/group_loss"] for row in metrics]
    assert loss[-1] < loss[0]
    if name in ("dpo", "ipo", "cdpo", "robust_dpo"):  # the policy is its own reference: no pair leads
        assert loss[0] == pytest.approx(0.25 / 0.1**2 if name == "ipo" else math.log(2), abs=1e-5)
        assert metrics[0]["loss"] == pytest.approx(loss[0])


def test_no_two_preference_presets_learn_the_same(folder, done):
    last = [
        rows(directory_of(done, folder / f"preferences-{name}", "reward") / "metrics.jsonl")[-1]["loss"]
        for name in PREFERENCE_METHODS
    ]
    assert all(abs(one - other) > 1e-3 for one, other in combinations(last, 2)), last


def held_out(directory):
    """(prompt, completion, group, level) of the run's test data."""
    test = load_config("reward", directory / "config.yaml").evaluation.test
    for group, row in enumerate(preference_groups(test.split, **test.parameters)):
        for completion, level in zip(row["completions"], row["levels"], strict=True):
            yield row["prompt"], completion, group, level


def log_probability(model, tokenizer, prompt, completion, reduction):
    """Of a completion and its end token behind its prompt, by transformers alone."""
    ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    chosen = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return getattr(chosen[len(prompt) - 1 :], reduction)().item()


@torch.no_grad()
def score_by_transformers(name, folder, start, data):
    """What the saved model says of each completion."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name in ("agrpo", "bradley_terry"):
        classifier = AutoModelForSequenceClassification.from_pretrained(folder)
        texts = (prompt + completion + tokenizer.eos_token for prompt, completion, *_ in data)
        return [classifier(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, start))
    how = "mean" if name == "ipo" else "sum"
    return [
        log_probability(model, tokenizer, *texts, how) - log_probability(reference, tokenizer, *texts, how)
        for *texts, _, _ in data
    ]


def test_the_held_out_accuracy_is_the_saved_models_own(preferences, start):
    """An implicit reward leaves a plain language model, a score head a classifier."""
    name, directory = preferences
    data = list(held_out(directory))
    scored = list(zip(score_by_transformers(name, directory / "model", start, data), data, strict=True))
    leads = [
        better - worse
        for better, (*_, group, level) in scored
        for worse, (*_, same, lower) in scored
        if group == same and level > lower
    ]
    measured = json.loads((directory / "result.json").read_text())["results"]
    assert measured["pairs"] == len(leads) > 70
    share = fmean(lead > 0 for lead in leads)
    assert measured["pairwise_accuracy"] == pytest.approx(share)
    assert 0.2 < share < 0.8 and share != 0.5

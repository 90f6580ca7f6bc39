"""Rollouts one step ahead: by the weights of one step before, corrected for it, and kept by a checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import rows, run_several, tiny_policy
from tiny import FAMILIES, engine_of, ragged

from agrpo.config import PolicyConfig
from agrpo.data.streams import Stream
from agrpo.engine.layout import build_layout
from agrpo.training.grouping import Sampler
from agrpo.training.update import Coefficients, update_policy
from agrpo.types import Experience, Prompt, Rollout
from reward_models.compose import RewardSet

SEED, SIZE, STEPS = 3, 2, 5


def config(ahead=1, **objective):
    return PolicyConfig(
        seed=SEED,
        data={"source": "python:agrpo.data.tasks.chains:problems"},
        rewards=[{"target": "reward_models.rules.accuracy"}],
        training={"max_steps": STEPS},
        sampling={"prompts_per_step": 3, "num_generations": SIZE, "max_completion_length": 6, "temperature": 1.2},
        objective={"updates_per_rollout": 1, "kl": "none", "sampler_cap": 1e6, **objective},
        rollout={"ahead": ahead},
    )


def model(seed=0):
    torch.manual_seed(seed)
    lm = FAMILIES["llama-untied"]()
    torch.nn.init.normal_(lm.get_output_embeddings().weight, std=0.2)
    return lm


def nothing(prompts, completions, completion_ids, **columns):
    return [0.0] * len(completions)


PROMPTS = [Prompt(f"p{n}", tuple(ids), n, {"n": n}) for n, ids in enumerate(ragged(2, prompts=range(1, 8))[0])]


def sampler(ahead=1):
    return Sampler(config(ahead), PROMPTS, Stream(len(PROMPTS), 3, SEED), RewardSet([("own", nothing, 1.0)]))


def train(engine):
    engine.backward(-engine.forward(build_layout(*ragged(1)))[0].mean(), True)
    engine.step(0.02)


def said(rollout):
    return [p.text for p in rollout.prompts], rollout.tokens.tolist(), rollout.lengths.tolist(), rollout.logp.tolist()


def test_each_step_has_the_prompts_of_its_turn_by_the_weights_of_one_step_before():
    engine, twin = engine_of(model()), engine_of(model())
    sample, plain = sampler(), sampler(ahead=0)
    for step in range(STEPS):
        rollout, _, metrics = sample(engine, step)
        assert metrics["agrpo/staleness"] == engine.weight_version - rollout.weight_version == min(step, 1)
        if step > 1:
            train(twin)  # it stays one step behind
        expected, _, own = plain(twin, step)
        assert said(rollout) == said(expected) and "agrpo/staleness" not in own
        train(engine)
    assert sample.state_dict() == {"pending": [None]}  # behind the last step none is begun


def test_a_checkpoint_holds_the_rollout_that_waits():
    engine, stream = engine_of(model()), Stream(len(PROMPTS), 3, SEED)
    one = Sampler(config(), PROMPTS, stream, RewardSet([("own", nothing, 1.0)]))
    one(engine, 0)
    kept = json.loads(json.dumps({"sampler": one.state_dict(), "stream": stream.state_dict()}))
    train(engine)
    expected, _, _ = one(engine, 1)
    again = Stream(len(PROMPTS), 3, SEED)
    again.load_state_dict(kept["stream"])
    other = Sampler(config(), PROMPTS, again, RewardSet([("own", nothing, 1.0)]))
    other.load_state_dict(kept["sampler"])
    rollout, _, _ = other(engine, 1)
    assert said(rollout) == said(expected) and rollout.weight_version == 0
    assert rollout.texts == expected.texts and rollout.prompts == expected.prompts
    assert torch.equal(rollout.group, expected.group) and torch.equal(rollout.finished, expected.finished)


def test_a_rollout_of_more_than_one_step_before_is_an_error():
    engine, sample = engine_of(model()), sampler()
    sample(engine, 0)
    train(engine)
    train(engine)
    with pytest.raises(RuntimeError, match=r"step 1: .* weight version 0, the policy is at 2"):
        sample(engine, 1)


def gradient_of_update(engine, experience, settings):
    found, step = {}, engine.step

    def record(rate):
        found.update({name.removeprefix("lm."): p.grad.clone() for name, p in engine.module.named_parameters()})
        return step(rate)

    engine.step = record
    how = Coefficients(beta=0.0, epsilon=0.2, lambda_=0.0, entropy=0.0, reward_scale=0.5)
    metrics = update_policy(engine, experience, how, settings, 1e-3)
    return found, metrics


@pytest.mark.parametrize("correction", ["token", "sequence", "mask"])
def test_the_corrected_gradient_is_that_of_the_policy_whoever_sampled(correction):
    """Every completion of one token, as often as the older policy draws it: the newer one's expected gradient."""
    prompt, settings = (5, 2, 71), config(sampler_correction=correction)
    policy, older = model(), model(seed=1)

    def logprobs(lm):
        return (lm(torch.tensor([prompt])).logits[0, -1] / settings.sampling.temperature).log_softmax(0)

    mu, value = logprobs(older).detach(), torch.linspace(-1, 1, 97).sin()
    expected = torch.autograd.grad(-(logprobs(policy).exp() * value).sum(), list(policy.parameters()))
    rollout = Rollout(
        prompts=(Prompt("p", prompt, 0, {}),),
        group=torch.zeros(97, dtype=torch.long),
        lengths=torch.ones(97, dtype=torch.long),
        tokens=torch.arange(97),
        logp=mu,
        finished=torch.ones(97, dtype=torch.bool),
        texts=("",) * 97,
        weight_version=0,
    )
    often = 97 * mu.exp() * value  # the mean over 97 of what is weighed so is the older policy's expectation
    none = torch.zeros(0)
    experience = Experience(rollout, torch.zeros(97, 1), torch.zeros(97), often, none, none, none)
    names = [name for name, _ in policy.named_parameters()]
    found, metrics = gradient_of_update(engine_of(policy), experience, settings)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    m = (logprobs(model()).detach() - mu).exp()
    assert metrics["agrpo/effective_sample_size"] == pytest.approx(float(m.sum() ** 2 / (97 * m.square().sum())), 1e-4)
    stale, _ = gradient_of_update(engine_of(model()), experience, config(ahead=0))
    head = names.index("lm_head.weight")
    assert (stale["lm_head.weight"] - expected[head]).norm() > 0.1 * expected[head].norm()


def test_where_versions_agree_the_update_is_the_plain_one():
    engine, plain = engine_of(model()), engine_of(model())
    rollout, _, _ = sampler()(engine, 0)
    rewards = torch.arange(len(rollout.lengths)).float()
    none = torch.zeros(0)
    advantages = torch.linspace(-1, 1, len(rollout.tokens))
    experience = Experience(rollout, rewards[:, None], rewards, advantages, none, none, none)
    mine, metrics = gradient_of_update(engine, experience, config())
    theirs, _ = gradient_of_update(plain, experience, config(ahead=0))
    assert metrics["agrpo/effective_sample_size"] > 1 - 1e-6
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_run_that_was_stopped_with_a_rollout_waiting_ends_as_the_one_that_was_not(tmp_path):
    policy = tiny_policy(tmp_path / "model")

    def arguments(run):
        reward = {"target": "interrupting_reward.length_until", "flag": str(run / "stop"), "call": 3}
        own = [f"model.name_or_path={policy}", f"rewards=[{json.dumps({**reward, 'number': 'SIGTERM'})}]"]
        return [*own, "training.max_steps=4", "training.learning_rate=1e-3", "rollout.ahead=1", *NO_TESTS]

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "stop").touch()
    done = run_several([("agrpo", run, arguments(run)) for run in (straight, stopped, stopped)])
    assert "SystemExit: 75" in done.stderr and f"resumed from {stopped}" in done.stdout, done.stderr[-3000:]
    curves = [rows(run / "agrpo" / "metrics.jsonl") for run in (straight, stopped)]
    curves = [[{k: v for k, v in row.items() if not k.startswith(("time", "throughput"))} for row in c] for c in curves]
    assert curves[0] == curves[1]
    assert rows(straight / "agrpo" / "samples.jsonl") == rows(stopped / "agrpo" / "samples.jsonl")
    models = [load_file(run / "agrpo" / "model" / "model.safetensors") for run in (straight, stopped)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


NO_TESTS = ["evaluation.data=null", "evaluation.test=null", "logging.samples_per_step=16"]

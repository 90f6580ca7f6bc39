"""The policy update through a real engine, against the objective written out on plain transformers."""

import math
from itertools import pairwise, permutations
from statistics import NormalDist, fmean, pvariance

import pytest
import torch
from tiny import FAMILIES, engine_of, ragged
from torch.nn.functional import logsigmoid

from agrpo.algorithms.segments import per_token
from agrpo.config import AdvantageConfig, GroupLossConfig, PolicyConfig, PruningConfig, TrainingConfig
from agrpo.training.batches import Sequences
from agrpo.training.controllers import Controllers
from agrpo.training.experience import estimate_advantages, prune
from agrpo.training.preference import RankedBatch
from agrpo.training.schedule import learning_rate
from agrpo.training.scoring import ranked_groups
from agrpo.training.update import Coefficients, update_policy
from agrpo.types import Experience, PreferenceGroup, Prompt, Rollout

RATE = 0.02
TEMPERATURE = 0.8
GRPO = {"kl": "forward", "aggregation": "sequence", "updates_per_rollout": 1}


def model():
    torch.manual_seed(0)
    return FAMILIES["llama-untied"]()


def advantages_of(rewards, rollout, **how):
    """(N,) advantages of one reward function's scores."""
    return estimate_advantages(rewards[:, None], torch.ones(1), rewards, rollout, AdvantageConfig(**how))


def experience(rewards=(1.0, 0.0, 0.25, 1.0, 0.0, 1.0, 0.5, 0.0), slots=(0, 1, 2), order=range(8)):
    """Eight completions of three prompts; `order` rearranges them."""
    ids, group, lengths, tokens = ragged(4)
    order = torch.tensor(list(order))
    parts = tokens.split(lengths.tolist())
    rollout = Rollout(
        prompts=tuple(Prompt(f"p{s}", tuple(i), s, {}) for i, s in zip(ids, slots, strict=True)),
        group=group[order],
        lengths=lengths[order],
        tokens=torch.cat([parts[n] for n in order.tolist()]),
        logp=torch.zeros(len(tokens)),
        finished=torch.ones(8, dtype=torch.bool),
        texts=tuple(f"text {n}" for n in order.tolist()),
        weight_version=0,
    )
    rewards = torch.tensor(rewards)[order]
    advantages = per_token(advantages_of(rewards, rollout, kind="group"), rollout.lengths)
    nothing = torch.zeros(0)
    return Experience(rollout, rewards[:, None], rewards, advantages, nothing, nothing, nothing)


def update(engine, what, lambda_=0.0, micro=10**6, beta=0.3, entropy_coef=0.0, rate=RATE, ranked=None, **objective):
    config = PolicyConfig(
        data={"source": "python:agrpo.data.tasks.chains:problems"},
        rewards=[{"target": "reward_models.rules.accuracy"}, {"target": "reward_models.rules.format"}],
        training={"max_steps": 1, "micro_batch_tokens": micro},
        sampling={"temperature": TEMPERATURE},
        objective={**GRPO, "epsilon_low": 0.2, "epsilon_high": 0.8, **objective},
    )
    how = Coefficients(beta=beta, epsilon=0.1, lambda_=lambda_, entropy=entropy_coef, reward_scale=0.5)
    return update_policy(engine, what, how, config, rate, ranked)


def of_completions(what):
    """(N,) advantages."""
    return what.advantages[what.rollout.lengths.cumsum(0) - 1]


def plain_logprobs(lm, what):
    """Log-probabilities and entropies of each completion, by transformers alone."""
    found = []
    rollout = what.rollout
    for p, completion in zip(rollout.group.tolist(), rollout.tokens.split(rollout.lengths.tolist()), strict=True):
        ids = torch.tensor([*rollout.prompts[p].ids, *completion.tolist()])
        log_p = (lm(input_ids=ids[None]).logits[0, -len(completion) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        found.append((log_p.gather(1, completion[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)))
    return found


def grpo_loss(lm, reference, what, old, beta=0.3, entropy_coef=0.0):
    """GRPO, eq. 3, written out: clipped surrogate and k3, the mean of each completion, then over completions."""
    total = 0.0
    for (logp, entropy), (ref, _), before, advantage in zip(
        plain_logprobs(lm, what), plain_logprobs(reference, what), old, of_completions(what), strict=True
    ):
        ratio = (logp - before).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.4) * advantage)
        k3 = (ref.detach() - logp).exp() - (ref.detach() - logp) - 1
        total = total + (-gain + beta * ratio.detach() * k3 - entropy_coef * entropy).mean()
    return total / len(old)


def moved():
    """An engine whose policy has left its reference, and plain copies of both."""
    engine = engine_of(model(), with_reference=True)
    update(engine, experience((0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0)))
    policy = model()
    policy.load_state_dict({name.removeprefix("lm."): p.detach() for name, p in engine.module.named_parameters()})
    return engine, policy, model()


def test_without_preferences_the_loss_is_grpos():
    engine, policy, reference = moved()
    what = experience()
    old = [logp.detach() for logp, _ in plain_logprobs(policy, what)]
    loss = grpo_loss(policy, reference, what, old, entropy_coef=0.01)
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(policy.parameters())))
    metrics = update(engine, what, entropy_coef=0.01)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    entropies = torch.cat([entropy for _, entropy in plain_logprobs(policy, what)])
    assert metrics["entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)
    assert "agrpo/group_loss" not in metrics or metrics["agrpo/group_loss"] >= 0


@pytest.mark.parametrize("micro", [1, 10**6])
def test_a_samplers_own_log_probabilities_correct_the_policy_loss(monkeypatch, micro):
    monkeypatch.setattr(PolicyConfig, "corrects_sampler", True)  # as with rollout.backend=vllm
    engine, policy, reference = moved()
    what = experience()
    old = [logp.detach() for logp, _ in plain_logprobs(policy, what)]
    noise = 0.6 * torch.randn(len(what.rollout.tokens), generator=torch.Generator().manual_seed(5))
    rollout = Rollout(**{**vars(what.rollout), "logp": torch.cat(old) - noise})
    m = noise.exp().clamp(max=1.5)
    loss = 0.0
    parts = zip(
        plain_logprobs(policy, what), plain_logprobs(reference, what), m.split(rollout.lengths.tolist()), strict=True
    )
    for ((logp, _), (ref, _), own), advantage in zip(parts, of_completions(what), strict=True):
        k3 = (ref.detach() - logp).exp() - (ref.detach() - logp) - 1
        loss = loss + (own * (-(logp - logp.detach()).exp() * advantage + 0.3 * k3)).mean() / 8
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(policy.parameters())))
    what = Experience(**{**vars(what), "rollout": rollout})
    metrics = update(engine, what, micro=micro, sampler_cap=1.5)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["agrpo/effective_sample_size"] == pytest.approx((m.mean() ** 2 / (m**2).mean()).item(), rel=1e-4)
    assert metrics["agrpo/sampler_dropped"] == pytest.approx((noise > math.log(1.5)).float().mean().item())


def test_the_native_sampler_is_not_corrected():
    metrics = update(moved()[0], experience())  # whose rollout claims log-probabilities of 0
    assert metrics.keys().isdisjoint({"agrpo/effective_sample_size", "agrpo/sampler_dropped"})


def test_a_second_update_is_measured_against_the_policy_that_sampled():
    engine, policy, reference = moved()
    what = experience()
    old = [logp.detach() for logp, _ in plain_logprobs(policy, what)]
    # The first of two updates moves the engine to where an engine with one update would be.
    once, _, _ = moved()
    update(once, what)
    policy.load_state_dict({name.removeprefix("lm."): p.detach() for name, p in once.module.named_parameters()})
    metrics = update(engine, what, updates_per_rollout=2)
    expected = grpo_loss(policy, reference, what, old, beta=0.0)
    assert metrics["agrpo/policy_loss"] == pytest.approx(expected.item(), abs=2e-5)
    ratios = [(logp - before).exp() for (logp, _), before in zip(plain_logprobs(policy, what), old, strict=True)]
    held = [
        ((r > 1.4) if a > 0 else (r < 0.9) if a < 0 else torch.zeros_like(r, dtype=torch.bool))
        for r, a in zip(ratios, of_completions(what), strict=True)
    ]
    share = torch.cat(held).float().mean().item()
    assert share > 0.05
    assert metrics["clip_ratio/region_mean"] == pytest.approx(share, abs=0.02)


def test_without_a_clip_the_second_update_is_the_plain_ratio_times_the_advantage():
    engine, policy, _ = moved()
    what = experience()
    old = [logp.detach() for logp, _ in plain_logprobs(policy, what)]
    once, _, _ = moved()
    update(once, what)
    policy.load_state_dict({name.removeprefix("lm."): p.detach() for name, p in once.module.named_parameters()})
    metrics = update(engine, what, updates_per_rollout=2, clip=False)
    ratios = [(logp - before).exp() for (logp, _), before in zip(plain_logprobs(policy, what), old, strict=True)]
    plain = [-(r * a).mean() for r, a in zip(ratios, of_completions(what), strict=True)]
    assert metrics["agrpo/policy_loss"] == pytest.approx(torch.stack(plain).mean().item(), abs=2e-5)
    assert metrics["clip_ratio/region_mean"] == 0
    clipped = moved()[0]
    assert update(clipped, what, updates_per_rollout=2)["agrpo/policy_loss"] != metrics["agrpo/policy_loss"]


def test_epsilon_rests_where_nothing_is_clipped():
    config = PolicyConfig(
        data={"source": "python:agrpo.data.tasks.chains:problems"},
        rewards=[{"target": "reward_models.rules.accuracy"}],
        training={"max_steps": 1},
        objective={"clip": False, "epsilon_low": 0.05},  # outside the bounds of a controller that rests
    )
    held = Controllers(config)
    assert "ε inert: objective.clip is false" in held.notes
    held.observe({"agrpo/kl_symmetric": 0.01, "agrpo/kl_update": 1.0, "entropy": 0.3, "reward_std": 0.5})
    assert held.metrics()["agrpo/epsilon"] == 0.05


def test_a_kl_that_nothing_penalises_is_still_measured():
    engine, _, _ = moved()
    metrics = update(engine, experience(), kl="none", beta=0.0)
    assert metrics["kl"] == 0 and metrics["loss"] == pytest.approx(metrics["agrpo/policy_loss"])
    penalised = update(moved()[0], experience(), beta=0.3)
    assert metrics["agrpo/kl_symmetric"] == pytest.approx(penalised["agrpo/kl_symmetric"]) != 0


def test_with_preferences_alone_the_loss_is_dpos():
    engine, policy, reference = moved()
    what = experience()
    score = torch.stack(
        [
            0.7 * (logp - ref).sum()
            for (logp, _), (ref, _) in zip(plain_logprobs(policy, what), plain_logprobs(reference, what), strict=True)
        ]
    )
    losses = [
        -logsigmoid(score[i] - score[j])
        for i in range(8)
        for j in range(8)
        if what.rollout.group[i] == what.rollout.group[j] and what.rewards[i] > what.rewards[j]
    ]
    group_loss = GroupLossConfig(implicit_reward="sum", alpha=0.7, pair_weighting="uniform")
    metrics = update(engine, what, lambda_=1.0, group_loss=group_loss)
    assert len(losses) == 8
    assert metrics["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


MIXED = {"lambda_": 0.4, "kl": "symmetric", "aggregation": "token", "updates_per_rollout": 2, "entropy_coef": 0.01}


@pytest.mark.parametrize("weighting", ["confidence", "hierarchical", "uniform"])
def test_micro_batches_do_not_matter(weighting):
    how = {**MIXED, "group_loss": GroupLossConfig(pair_weighting=weighting)}
    whole = update(moved()[0], experience(), **how)
    for micro in (1, 60):
        parts = update(moved()[0], experience(), micro=micro, **how)
        assert parts == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_the_order_within_a_group_does_not_matter():
    whole = update(moved()[0], experience(), **MIXED)
    permuted = update(moved()[0], experience(order=(2, 0, 1, 3, 7, 4, 6, 5)), **MIXED)
    assert permuted == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_what_teaches_nothing_moves_nothing():
    engine = engine_of(model(), with_reference=True, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    metrics = update(engine, experience((0.5,) * 8), lambda_=0.5)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())


def leads_of(what, policy, reference, alpha=1.0):
    """s_i − s_j and R_i − R_j of every pair of the sampled groups, s by the mean over tokens, on plain transformers."""
    both = zip(plain_logprobs(policy, what), plain_logprobs(reference, what), strict=True)
    score = [alpha * (logp - ref.detach()).mean() for (logp, _), (ref, _) in both]
    pairs = [
        (i, j)
        for i in range(8)
        for j in range(8)
        if what.rollout.group[i] == what.rollout.group[j] and what.rewards[i] > what.rewards[j]
    ]
    return [score[i] - score[j] for i, j in pairs], pairs


def test_soft_labels_say_how_likely_a_pair_is_the_wrong_way_round():
    engine, policy, reference = moved()
    what = experience()
    leads, pairs = leads_of(what, policy, reference, alpha=3.0)
    surer = [1 / (1 + math.exp(-float(what.rewards[i] - what.rewards[j]) / 0.5)) for i, j in pairs]  # τ_R = 0.5
    losses = [-p * logsigmoid(z) - (1 - p) * logsigmoid(-z) for p, z in zip(surer, leads, strict=True)]
    metrics = update(engine, what, lambda_=1.0, group_loss=GroupLossConfig(labels="soft", alpha=3.0))
    assert metrics["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    entropies = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in surer]
    assert metrics["agrpo/label_entropy"] == pytest.approx(fmean(entropies), rel=1e-5)


def test_rewards_that_vote_weigh_a_pair_by_how_far_they_agree():
    engine, policy, reference = moved()
    what = experience()
    scores = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    what = Experience(**{**vars(what), "scores": scores, "rewards": scores.sum(1)})
    leads, pairs = leads_of(what, policy, reference)
    votes = scores.tolist()

    def confidence(i, j):
        z = (fmean(votes[i]) - fmean(votes[j])) / math.sqrt(pvariance(votes[i]) + pvariance(votes[j]))
        return abs(2 * NormalDist().cdf(z) - 1)

    weights = [confidence(i, j) for i, j in pairs]
    assert max(weights) > 2 * min(weights)
    expected = sum(-w * logsigmoid(z) for w, z in zip(weights, leads, strict=True)) / sum(weights)
    metrics = update(engine, what, lambda_=1.0, group_loss=GroupLossConfig(confidence="ensemble"))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


# Ranked data: two prompts with completions of these levels and confidences.
LEVELS, SURE = ((2, 0, 1), (0, 1)), ((1.0, 0.5, 0.8), (0.9, 0.7))
SHARE = 0.3


def ranked_batch(micro=10**6, **group_loss):
    ids, group, lengths, tokens = ragged(7, prompts=(4, 9), groups=((6, 11, 3), (8, 5)))
    data = {"data": {"source": "python:agrpo.data.tasks.chains:preference_groups"}, "ratio": SHARE}
    config = GroupLossConfig(ranked=data, alpha=0.7, **group_loss)
    groups = [
        PreferenceGroup("", tuple("abc"[: len(levels)]), levels, sure, None, {})
        for levels, sure in zip(LEVELS, SURE, strict=True)
    ]
    return RankedBatch(Sequences(ids, group, lengths, tokens), groups, config, 1.0, micro), config


def ranked_loss(policy, reference):
    """The ranked data's L_group by transformers: every pair of a group, weighted by the less sure of its two."""
    ids, group, lengths, tokens = ragged(7, prompts=(4, 9), groups=((6, 11, 3), (8, 5)))

    def logp(lm, p, completion):
        z = lm(torch.tensor([[*ids[p], *completion.tolist()]])).logits[0, -len(completion) - 1 : -1]
        return z.log_softmax(-1).gather(1, completion[:, None])[:, 0].mean()

    parts = zip(group.tolist(), tokens.split(lengths.tolist()), strict=True)
    score = [0.7 * (logp(policy, p, c) - logp(reference, p, c).detach()) for p, c in parts]
    total = weight = right = 0.0
    for first, levels, sure in ((0, LEVELS[0], SURE[0]), (3, LEVELS[1], SURE[1])):
        for i, j in permutations(range(len(levels)), 2):
            if levels[i] > levels[j]:
                w, lead = min(sure[i], sure[j]), score[first + i] - score[first + j]
                total, weight, right = total - w * logsigmoid(lead), weight + w, right + bool(lead > 0)
    return total / weight, right / 4


def test_ranked_data_has_its_share_of_the_group_loss():
    engine, policy, reference = moved()
    what = experience()
    leads, pairs = leads_of(what, policy, reference, alpha=0.7)
    sure = [math.tanh(float(what.rewards[i] - what.rewards[j])) for i, j in pairs]  # |2σ(ΔR/τ) − 1| at τ = 0.5
    sampled = sum(-w * logsigmoid(z) for w, z in zip(sure, leads, strict=True)) / sum(sure)
    from_data, accuracy = ranked_loss(policy, reference)
    old = [logp.detach() for logp, _ in plain_logprobs(policy, what)]
    loss = 0.6 * grpo_loss(policy, reference, what, old) + 0.4 * ((1 - SHARE) * sampled + SHARE * from_data)
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(policy.parameters())))
    ranked, config = ranked_batch()
    metrics = update(engine, what, lambda_=0.4, ranked=ranked, group_loss=config)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert metrics["agrpo/group_loss"] == pytest.approx(sampled.item(), rel=1e-5)
    assert metrics["agrpo/ranked_loss"] == pytest.approx(from_data.item(), rel=1e-5)
    assert metrics["agrpo/ranked_accuracy"] == accuracy


@pytest.mark.parametrize("weighting", ["confidence", "hierarchical"])
def test_micro_batches_of_ranked_data_do_not_matter(weighting):
    def parts(micro):
        ranked, config = ranked_batch(micro, pair_weighting=weighting)
        assert len(ranked.parts) == (1 if micro > 100 else 2)
        return update(moved()[0], experience(), micro=micro, ranked=ranked, **{**MIXED, "group_loss": config})

    assert parts(1) == pytest.approx(parts(10**6), rel=1e-5, abs=1e-6)


def test_ranked_data_teaches_where_the_samples_are_all_alike():
    engine, policy, reference = moved()
    from_data, _ = ranked_loss(policy, reference)
    ranked, config = ranked_batch()
    metrics = update(engine, experience((0.5,) * 8), lambda_=1.0, ranked=ranked, group_loss=config)
    assert metrics["loss"] == pytest.approx(SHARE * from_data.item(), rel=1e-5)
    assert metrics["grad_norm"] > 0 and "agrpo/group_loss" not in metrics


def test_ranked_data_without_weight_is_measured_all_the_same():
    engine, policy, reference = moved()
    from_data, accuracy = ranked_loss(policy, reference)
    ranked, config = ranked_batch()
    metrics = update(engine, experience(), lambda_=0.0, ranked=ranked, group_loss=config)
    assert metrics["agrpo/ranked_accuracy"] == accuracy
    assert metrics["agrpo/ranked_loss"] == pytest.approx(from_data.item(), rel=1e-5)


def test_advantages_are_of_the_group_whatever_the_slots():
    rewards, slots = (1.0, 0.0, 0.25, 1.0, 0.0, 1.0, 0.5, 0.0), (7, 2, 5)
    what = experience(rewards, slots)
    for sizes in ((0, 3), (4, 8)):
        own = torch.tensor(rewards[slice(*sizes)])
        expected = (own - own.mean()) / (own.std(unbiased=False) + 1e-4)
        torch.testing.assert_close(of_completions(what)[slice(*sizes)], expected)
    assert of_completions(what)[3] == 0  # a group of one
    weighted = [
        advantages_of(torch.tensor(rewards), experience(rewards, s).rollout, kind="weighted")
        for s in (slots, (0, 1, 2))
    ]
    torch.testing.assert_close(*weighted)


def test_pruning_keeps_the_largest_advantages_and_everything_that_is_theirs():
    what = experience((1.0, 0.0, 0.4, 1.0, 0.0, 1.0, 0.5, 0.1))
    assert prune(what, PruningConfig()) is what
    kept = prune(what, PruningConfig(rate=0.5))
    assert kept.rollout.texts == ("text 0", "text 1", "text 3", "text 4", "text 5")
    assert kept.rollout.group.tolist() == [0, 0, 1, 2, 2]
    parts = what.rollout.tokens.split(what.rollout.lengths.tolist())
    for tokens, n in zip(kept.rollout.tokens.split(kept.rollout.lengths.tolist()), (0, 1, 3, 4, 5), strict=True):
        assert torch.equal(tokens, parts[n])
    assert torch.equal(of_completions(kept), of_completions(what)[torch.tensor([0, 1, 3, 4, 5])])
    assert len(kept.rollout.logp) == len(kept.rollout.tokens)
    assert torch.equal(kept.rewards, what.rewards[torch.tensor([0, 1, 3, 4, 5])])


def test_ranked_groups_have_a_level_for_each_distinct_reward():
    what = experience(slots=(4, 9, 6)).rollout
    texts = ("a", "b", "a", "c", "d", "e", "", "f")
    rewards = torch.tensor([0.5, -2.0, 0.5, 1.0, 3.0, math.nan, 7.0, 2.0])
    found = ranked_groups(Rollout(**{**vars(what), "texts": texts}), rewards)
    assert found == [
        {"slot": 4, "prompt": "p4", "completions": ["a", "b"], "levels": [1, 0], "rewards": [0.5, -2.0]},
        {"slot": 6, "prompt": "p6", "completions": ["d", "f"], "levels": [1, 0], "rewards": [3.0, 2.0]},
    ]


def schedule(kind, steps=101, warmup=0.1, floor=0.2):
    config = TrainingConfig(
        max_steps=steps, learning_rate=2.0, lr_scheduler_type=kind, warmup_ratio=warmup, min_lr_ratio=floor
    )
    return [learning_rate(step, config) for step in range(steps)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_decays_to_its_floor(kind):
    rates = schedule(kind)
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    if kind == "constant":
        assert set(rates[10:]) == {2.0}
        return
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.4, abs=0.02)
    halfway = 2.0 * (0.2 + 0.8 * (1 - 45 / 91 if kind == "linear" else (1 + math.cos(math.pi * 45 / 91)) / 2))
    assert rates[55] == pytest.approx(halfway)


def test_the_first_step_of_a_short_run_learns():
    assert schedule("cosine", steps=1, warmup=0.0) == [2.0]
    assert min(schedule("linear", steps=3, warmup=0.0, floor=0.0)) > 0

"""From rewards to advantages of completions and tokens, and the critic, against transformers and plain numbers."""

import copy
import math
from statistics import fmean, pstdev

import pytest
import torch
from tiny import FALLBACKS, FAMILIES, engine_of, ragged

from agrpo.config import AdvantageConfig, PolicyConfig, PruningConfig
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import ActorCritic, Policy
from agrpo.training.experience import estimate_advantages, make_experience, prune
from agrpo.training.update import Coefficients, update_policy
from agrpo.types import Experience, Prompt, Rollout
from reward_models.compose import RewardSet

TEMPERATURE, DELTA, BETA = 0.8, 1e-4, 0.3
REWARDS = (1.0, 0.0, 0.25, 1.0, 0.0, 1.0, 0.5, 0.0)


def model(family="llama-untied"):
    torch.manual_seed(0)
    return {**FAMILIES, **FALLBACKS}[family]()


def disturb(module, scale=0.05):
    """Away from where it started: the policy from its reference, the value head from 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def rollout_of(slots=(0, 1, 2)):
    """Eight completions of three prompts."""
    ids, group, lengths, tokens = ragged(4)
    return Rollout(
        prompts=tuple(Prompt(f"p{s}", tuple(i), s, {}) for i, s in zip(ids, slots, strict=True)),
        group=group,
        lengths=lengths,
        tokens=tokens,
        logp=torch.zeros(len(tokens)),
        finished=torch.ones(8, dtype=torch.bool),
        texts=tuple(f"text {n}" for n in range(8)),
        weight_version=0,
    )


def config_of(kind, micro=10**6, **objective):
    in_reward = {"kl": "reverse", "kl_in": "reward"} if kind in ("gae", "reinforce_pp") else {"kl": "none"}
    return PolicyConfig(
        data={"source": "python:agrpo.data.tasks.chains:problems"},
        rewards=[{"target": "reward_models.rules.accuracy"}],
        training={"max_steps": 1, "micro_batch_tokens": micro},
        sampling={"temperature": TEMPERATURE},
        objective={"updates_per_rollout": 1, **in_reward, **objective},
        advantage={"kind": kind, "gamma": 0.9, "gae_lambda": 0.8},
        controllers={"lambda": {"kind": "fixed", "value": 0.0}, "beta": {"kind": "fixed"}},
    )


def experience_of(engine, kind, micro=10**6):
    """Of REWARDS, through one reward of weight 2."""
    rewards = RewardSet([("own", len, 2.0)])
    scores = torch.tensor(REWARDS)[:, None] / 2
    return make_experience(engine, rollout_of(), scores, rewards, config_of(kind, micro), BETA)


def by_transformers(lm, head=None):
    """Each completion's (log-probabilities, values) by plain transformers, on the rollout's tokens."""
    plain = model()
    plain.load_state_dict(lm.state_dict())
    rollout = rollout_of()
    found = []
    for p, completion in zip(rollout.group.tolist(), rollout.tokens.split(rollout.lengths.tolist()), strict=True):
        ids = torch.tensor([[*rollout.prompts[p].ids, *completion.tolist()]])
        before = slice(-len(completion) - 1, -1)
        output = plain(ids, output_hidden_states=True)
        logp = (output.logits[0, before] / TEMPERATURE).log_softmax(-1).gather(1, completion[:, None])[:, 0]
        found.append((logp, head(output.hidden_states[-1][0, before])[:, 0] if head else None))
    return found


@torch.no_grad()
def expected_credit(engine, kind):
    """(advantages before normalisation, returns) of the tokens of each completion, by backward recursion."""
    critic = kind == "gae"
    policy = by_transformers(engine.module.lm, engine.module.value if critic else None)
    reference = by_transformers(model())
    advantages, returns = [], []
    for (logp, value), (base, _), reward in zip(policy, reference, REWARDS, strict=True):
        due = [-BETA * float(a - b) for a, b in zip(logp, base, strict=True)]
        due[-1] += reward
        values = [*value.tolist(), 0.0] if critic else [0.0] * (len(due) + 1)
        ahead, own = 0.0, []
        for t in reversed(range(len(due))):
            ahead = due[t] + 0.9 * values[t + 1] - values[t] + 0.9 * (0.8 if critic else 1.0) * ahead
            own.append(ahead)
        advantages.append(own[::-1])
        returns.append([a + v for a, v in zip(own[::-1], values[:-1], strict=True)])
    return advantages, returns


@pytest.fixture(scope="module")
def critic():
    """An engine with a critic, whose policy has left its reference."""
    engine = engine_of(model(), with_reference=True, critic=True)
    disturb(engine.module)
    return engine


@pytest.fixture(scope="module")
def actor():
    engine = engine_of(model(), with_reference=True)
    disturb(engine.module)
    return engine


@pytest.mark.parametrize("micro", [10**6, 40])
@pytest.mark.parametrize("kind", ["gae", "reinforce_pp"])
def test_tokens_are_credited_as_plain_numbers_say(request, kind, micro):
    engine = request.getfixturevalue("critic" if kind == "gae" else "actor")
    what = experience_of(engine, kind, micro)
    advantages, returns = expected_credit(engine, kind)
    raw = [a for own in advantages for a in own]
    normal = [(a - fmean(raw)) / (pstdev(raw) + DELTA) for a in raw]
    assert len(raw) == len(what.rollout.tokens)
    assert what.advantages.tolist() == pytest.approx(normal, abs=2e-4)
    assert what.rewards.tolist() == pytest.approx(REWARDS)
    with torch.no_grad():
        reference = torch.cat([logp for logp, _ in by_transformers(model())])
    torch.testing.assert_close(what.reference, reference, atol=1e-5, rtol=0)
    if kind == "gae":
        assert what.returns.tolist() == pytest.approx([r for own in returns for r in own], abs=2e-4)
        with torch.no_grad():
            values = torch.cat([value for _, value in by_transformers(engine.module.lm, engine.module.value)])
        torch.testing.assert_close(what.values, values, atol=1e-5, rtol=0)
        assert values.std() > 0.05
    else:
        assert len(what.values) == len(what.returns) == 0


@pytest.mark.parametrize("family", ["llama-untied", "qwen2-tied", "gpt2", "mistral-window"])
def test_an_actor_critic_is_its_policy_and_a_head_on_the_last_hidden_states(family):
    lm = model(family).eval()
    plain, policy, both = copy.deepcopy(lm), Policy(copy.deepcopy(lm)), ActorCritic(lm)
    assert (both.fallback_reason is None) == (family in FAMILIES)
    prompts, group, lengths, tokens = batch = ragged(4)
    layout = build_layout(*batch)
    assert both(layout, TEMPERATURE)[2].abs().max() == 0  # the head starts at 0
    disturb(both.value, 0.3)
    logp, entropy, values = both(layout, TEMPERATURE)
    torch.testing.assert_close((logp, entropy), policy(layout, TEMPERATURE), atol=1e-6, rtol=0)
    hidden = []
    for p, completion in zip(group.tolist(), tokens.split(lengths.tolist()), strict=True):
        output = plain.base_model(torch.tensor([[*prompts[p], *completion.tolist()]]))
        hidden.append(output.last_hidden_state[0, -len(completion) - 1 : -1])
    expected = torch.cat(hidden) @ both.value.weight[0] + both.value.bias
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    assert values.std() > 0.3


def update(engine, what, kind, rate=0.0, **objective):
    how = Coefficients(beta=BETA, epsilon=0.2, lambda_=0.0, entropy=0.0, reward_scale=1.0)
    return update_policy(engine, what, how, config_of(kind, **objective), rate)


def test_the_critics_loss_is_added_to_the_policys_and_reaches_head_and_backbone(critic):
    what = experience_of(critic, "gae")
    plain, head = model(), copy.deepcopy(critic.module.value)
    plain.load_state_dict(critic.module.lm.state_dict())
    rollout, losses = what.rollout, []
    parts = zip(
        rollout.group.tolist(),
        *(x.split(rollout.lengths.tolist()) for x in (rollout.tokens, what.advantages, what.returns)),
        strict=True,
    )
    for p, completion, advantages, returns in parts:
        output = plain(torch.tensor([[*rollout.prompts[p].ids, *completion.tolist()]]), output_hidden_states=True)
        before = slice(-len(completion) - 1, -1)
        logp = (output.logits[0, before] / TEMPERATURE).log_softmax(-1).gather(1, completion[:, None])[:, 0]
        values = head(output.hidden_states[-1][0, before])[:, 0]
        losses.append(-(logp - logp.detach()).exp() * advantages + 0.7 * 0.5 * (values - returns) ** 2)
    loss = torch.cat(losses).mean()
    gradient = torch.autograd.grad(loss, [*plain.parameters(), *head.parameters()])
    before = copy.deepcopy(critic.module.state_dict())
    metrics = update(critic, what, "gae", value_coef=0.7)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(torch.nn.utils.get_total_norm(gradient).item(), rel=1e-4)
    value_loss = fmean(((what.values - what.returns) ** 2 / 2).tolist())
    assert metrics["agrpo/value_loss"] == pytest.approx(value_loss, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in critic.module.state_dict().items())  # rate 0


def test_the_critic_comes_nearer_to_the_returns_as_far_as_the_clip_lets_it():
    def learned(value_clip):
        engine = engine_of(model(), with_reference=True, critic=True)
        what = experience_of(engine, "gae")
        metrics = update(engine, what, "gae", rate=3e-3, updates_per_rollout=12, value_clip=value_clip)
        with torch.no_grad():
            values = torch.cat([value for _, value in by_transformers(engine.module.lm, engine.module.value)])
        return what, values, metrics

    what, values, metrics = learned(None)
    assert what.values.abs().max() == 0  # at the start
    error = (values - what.returns).square().mean()
    assert error < 0.3 * what.returns.square().mean()
    assert metrics["agrpo/value_loss"] < 0.3 * what.returns.square().mean() / 2
    what, held, _ = learned(0.05)
    assert error < (held - what.returns).square().mean() < what.returns.square().mean()


def test_a_policy_at_its_reference_or_without_one_pays_no_penalty():
    lengths = rollout_of().lengths.tolist()
    raw = [REWARDS[n] * 0.9 ** (length - 1 - t) for n, length in enumerate(lengths) for t in range(length)]
    expected = [(a - fmean(raw)) / (pstdev(raw) + DELTA) for a in raw]
    at_reference, without, moved = (engine_of(model(), with_reference=with_) for with_ in (True, False, True))
    disturb(without.module)
    disturb(moved.module)
    for engine in (at_reference, without):
        assert experience_of(engine, "reinforce_pp").advantages.tolist() == pytest.approx(expected, abs=1e-4)
    assert len(experience_of(without, "reinforce_pp").reference) == 0
    assert experience_of(moved, "reinforce_pp").advantages.tolist() != pytest.approx(expected, abs=0.1)


# Two rewards of eight completions in three groups, and what did not score.
SCORES = ((1.0, 0.1, 0.0, 0.7, 0.5, 0.5, 0.5, 0.5), (0.0, 3.0, 1.0, 2.0, math.nan, 4.0, 4.5, 1.0))
WEIGHTS = (1.0, 0.25)


def test_gdpo_normalises_each_reward_in_its_group_and_the_sum_over_the_batch():
    scores = torch.tensor(SCORES).T
    rollout = rollout_of(slots=(7, 2, 5))
    totals = []
    for members in (range(0, 3), range(3, 4), range(4, 8)):
        columns = []
        for column, weight in zip(SCORES, WEIGHTS, strict=True):
            scored = [column[n] for n in members if not math.isnan(column[n])]
            spread = pstdev(scored) + DELTA
            columns.append(
                [0.0 if math.isnan(column[n]) else weight * (column[n] - fmean(scored)) / spread for n in members]
            )
        totals += [a + b for a, b in zip(*columns, strict=True)]
    silent = [3]  # alone in its group
    silent += [4]  # its group's first reward is the same for all, and the second did not score it
    expected = [0.0 if n in silent else (t - fmean(totals)) / (pstdev(totals) + DELTA) for n, t in enumerate(totals)]
    found = estimate_advantages(scores, torch.tensor(WEIGHTS), scores.sum(1), rollout, AdvantageConfig(kind="gdpo"))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_gdpo_sees_what_a_sum_of_rewards_hides():
    """Each completion has one of two things: the sums are equal, and GDPO's weights still tell them apart."""
    one = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.5, 1.0, 0.0])
    scores = torch.stack([one, 1 - one], 1)
    total = scores.sum(1)
    summed, apart = (
        estimate_advantages(scores, torch.tensor([1.0, 3.0]), total, rollout_of(), AdvantageConfig(kind=kind))
        for kind in ("group", "gdpo")
    )
    assert summed[:3].abs().max() == 0 and apart[0] == apart[2] > apart[1]


def of_completions(advantages):
    """An experience whose completions have these advantages."""
    rollout, nothing = rollout_of(slots=(3, 1, 8)), torch.zeros(0)
    advantages = torch.tensor(advantages)
    scores = torch.stack([advantages * 2, advantages * 3], 1)
    of_tokens = advantages.repeat_interleave(rollout.lengths)
    return Experience(rollout, scores, advantages + 10, of_tokens, nothing, nothing, nothing)


def test_pruning_over_the_batch_may_leave_nothing_of_a_prompt():
    advantages = [0.1, -0.2, 0.1, 0.3, 2.0, -3.0, 0.5, 0.3]
    what = of_completions(advantages)
    for rate, kept in ((0.5, [3, 4, 5, 6]), (0.6, [3, 4, 5, 6]), (0.7, [4, 5, 6]), (0.9, [5])):
        left = prune(what, PruningConfig(rate=rate, scope="batch"))
        assert left.rollout.texts == tuple(f"text {n}" for n in kept)
        assert [left.rollout.prompts[p].slot for p in left.rollout.group] == [(3, 3, 3, 1, 8, 8, 8, 8)[n] for n in kept]
        assert len(left.rollout.prompts) == len(left.rollout.group.unique())
        lengths = what.rollout.lengths.tolist()
        for mine, whole in ((left.rollout.tokens, what.rollout.tokens), (left.advantages, what.advantages)):
            parts = whole.split(lengths)
            assert torch.equal(mine, torch.cat([parts[n] for n in kept]))
        assert torch.equal(left.scores, what.scores[kept]) and torch.equal(left.rewards, what.rewards[kept])
    assert len(prune(what, PruningConfig(rate=0.5)).rollout.prompts) == 3  # of each group: none loses all

"""Learning from conversations: what others said is read, and takes no part in loss, KL, entropy or any denominator."""

import pytest
import torch
from tiny import FAMILIES, engine_of, ragged

from agrpo.algorithms.segments import per_token
from agrpo.config import PolicyConfig
from agrpo.data.tokens import Turns
from agrpo.training.batches import Sequences
from agrpo.training.experience import make_experience
from agrpo.training.imitation import imitate
from agrpo.training.update import Coefficients, update_policy
from agrpo.types import Experience, Prompt, Rollout
from reward_models.compose import RewardSet

TEMPERATURE, BETA, ENTROPY = 0.8, 0.3, 0.01


def model(seed=0):
    torch.manual_seed(seed)
    return FAMILIES["llama-untied"]()


def conversations():
    """Eight conversations of three prompts, with random tokens of others in them."""
    ids, group, lengths, tokens = ragged(4)
    generator = torch.Generator().manual_seed(5)
    gaps = torch.randint(1, 9, (len(tokens),), generator=generator)
    gaps *= torch.rand(len(tokens), generator=generator) < 0.25
    return Rollout(
        prompts=tuple(Prompt(f"p{s}", tuple(i), s, {}) for s, i in enumerate(ids)),
        group=group,
        lengths=lengths,
        tokens=tokens,
        logp=torch.zeros(len(tokens)),
        finished=torch.ones(8, dtype=torch.bool),
        texts=("",) * 8,
        weight_version=0,
        heard=torch.randint(0, 97, (int(gaps.sum()),), generator=generator),
        gaps=gaps,
        turns=((),) * 8,
        outcomes=torch.zeros(8),
    )


def padded(lm, rollout, temperature=TEMPERATURE):
    """(N, width − 1) log-probabilities and entropies by plain transformers, and the mask of what is learnt."""
    rows, learnt = [], []
    said, heard = iter(rollout.tokens.tolist()), iter(rollout.heard.tolist())
    for p, gaps in zip(rollout.group.tolist(), rollout.gaps.split(rollout.lengths.tolist()), strict=True):
        row = list(rollout.prompts[p].ids)
        mask = [0.0] * len(row)
        for gap in gaps.tolist():
            row += [*(next(heard) for _ in range(gap)), next(said)]
            mask += [*[0.0] * gap, 1.0]
        rows.append(row)
        learnt.append(mask)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([row + [0.0] * (width - len(row)) for row in learnt])[:, 1:]
    log_p = (lm(input_ids=ids, attention_mask=real).logits[:, :-1] / temperature).log_softmax(-1)
    return log_p.gather(2, ids[:, 1:, None])[:, :, 0], -(log_p.exp() * log_p).sum(-1), mask


def update(engine, what, micro=10**6, **objective):
    config = PolicyConfig(
        data={"source": "python:agrpo.data.tasks.chains:problems"},
        rewards=[{"target": "reward_models.rules.accuracy"}],
        training={"max_steps": 1, "micro_batch_tokens": micro},
        sampling={"temperature": TEMPERATURE, "max_completion_length": 80},
        objective={"kl": "forward", "updates_per_rollout": 1, **objective},
    )
    how = Coefficients(beta=BETA, epsilon=0.2, lambda_=0.0, entropy=ENTROPY, reward_scale=1.0)
    return update_policy(engine, what, how, config, 0.02)


def mean_of(values, mask, aggregation):
    if aggregation == "token":
        return (values * mask).sum() / mask.sum()
    if aggregation == "sequence":
        return ((values * mask).sum(1) / mask.sum(1)).mean()
    return (values * mask).sum() / (len(mask) * 80)


@pytest.mark.parametrize("micro", [1, 10**6])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_update_is_that_of_padded_rows_under_a_mask(aggregation, micro):
    engine = engine_of(model(), with_reference=True)
    with torch.no_grad():  # leave the reference
        for parameter in engine.module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    policy, reference = model(), model()
    policy.load_state_dict({name.removeprefix("lm."): p.detach() for name, p in engine.module.named_parameters()})
    rollout = conversations()
    advantages = torch.tensor([1.0, -0.5, 0.25, -1.0, 2.0, 0.0, -0.75, 0.5])
    rewards, nothing = advantages.clone(), torch.zeros(0)
    what = Experience(
        rollout, rewards[:, None], rewards, per_token(advantages, rollout.lengths), nothing, nothing, nothing
    )
    metrics = update(engine, what, micro, aggregation=aggregation)

    logp, entropy, mask = padded(policy, rollout)
    ref = padded(reference, rollout)[0].detach()
    k3 = (ref - logp).exp() - (ref - logp) - 1
    surrogate = -(logp - logp.detach()).exp() * advantages[:, None]
    loss = mean_of(surrogate + BETA * k3 - ENTROPY * entropy, mask, aggregation)
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(policy.parameters())))
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(mean_of(entropy, mask, "token").item(), rel=1e-5)
    d = logp - ref
    symmetric = mean_of(d * (1 - (-d).exp()) / 2, mask, "token")
    assert metrics["agrpo/kl_symmetric"] == pytest.approx(symmetric.item(), rel=1e-4)


def test_demonstrations_are_learnt_by_the_tokens_of_the_assistant_alone():
    rollout, policy, engine = conversations(), model(), engine_of(model())
    columns = (rollout.tokens.tolist(), rollout.gaps.tolist())
    said, gaps = (iter(column) for column in columns)
    heard = iter(rollout.heard.tolist())
    completions = [[] for _ in rollout.prompts]
    for p, length in zip(rollout.group.tolist(), rollout.lengths.tolist(), strict=True):
        own = [next(gaps) for _ in range(length)]
        ids = tuple(next(said) for _ in range(length))
        completions[p].append(Turns(ids, tuple(next(heard) for _ in range(sum(own))), tuple(own)))
    batch = Sequences.of([p.ids for p in rollout.prompts], completions)
    assert batch.costs == [
        len(p.ids) + sum(len(c.ids) + len(c.heard) for c in of)
        for p, of in zip(rollout.prompts, completions, strict=True)
    ]
    metrics = imitate(engine, batch, 50, learning_rate=0.01)
    logp, _, mask = padded(policy, rollout, temperature=1.0)
    loss = -(logp * mask).sum() / mask.sum()
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(policy.parameters())))
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["num_tokens"] == int(mask.sum())


def test_single_turns_stand_beside_conversations():
    batch = Sequences.of([[1], [2, 3]], [[Turns((4, 5)), [6]], [Turns((7, 8), (9,), (0, 1))]])
    layout = batch.layout([0, 1])
    assert batch.costs == [4, 5]
    assert layout.ids.tolist() == [1, 4, 5, 6, 2, 3, 7, 9, 8] and layout.targets.tolist() == [4, 5, 6, 7, 8]
    assert layout.positions.tolist() == [0, 1, 2, 1, 0, 1, 2, 3, 4] and layout.source.tolist() == [0, 1, 0, 5, 7]
    assert batch.layout([0]).spans.tolist() == batch.layout([0]).lengths.tolist() == [2, 1]


def test_a_critic_judges_the_tokens_of_the_policy_alone():
    engine, rollout = engine_of(model(), critic=True), conversations()
    config = PolicyConfig(
        data={"source": "python:agrpo.data.tasks.chains:problems"},
        method="ppo",
        rewards=[{"target": "reward_models.rules.accuracy"}],
        training={"max_steps": 1, "micro_batch_tokens": 60},
        advantage={"kind": "gae", "gamma": 0.9},
        objective={"kl": "reverse", "kl_in": "reward"},
    )
    scores = torch.tensor([[1.0], [0.0], [0.5], [1.0], [0.0], [0.25], [1.0], [0.0]])
    made = make_experience(engine, rollout, scores, RewardSet([("own", lambda **_: [], 1.0)]), config, beta=0.0)
    assert len(made.advantages) == len(made.values) == len(rollout.tokens)
    expected = [  # the critic starts at 0: returns are the reward, discounted over tokens of the policy (λ = 0.95)
        reward * (0.9 * 0.95) ** (length - 1 - t)
        for reward, length in zip(scores[:, 0].tolist(), rollout.lengths.tolist(), strict=True)
        for t in range(length)
    ]
    torch.testing.assert_close(made.returns, torch.tensor(expected), atol=1e-5, rtol=1e-4)

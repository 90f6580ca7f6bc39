import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms.gae import discounted_sum, generalised_advantages, token_rewards, value_loss

number = st.floats(-3, 3, width=32)
completions = st.lists(st.lists(st.tuples(number, number), min_size=1, max_size=6), max_size=5)
rate = st.sampled_from([0.0, 0.3, 0.95, 1.0])


def flat(columns):
    return torch.tensor([x for completion in columns for x in completion], dtype=torch.float64)


def lengths_of(columns):
    return torch.tensor([len(completion) for completion in columns], dtype=torch.long)


def column(cases, k):
    return [[row[k] for row in completion] for completion in cases]


@settings(max_examples=80, deadline=None)
@given(cases=completions, discount=rate)
def test_discounted_sum_is_the_double_loop_within_each_completion(cases, discount):
    values = column(cases, 0)
    expected = [[sum(discount**k * v for k, v in enumerate(own[t:])) for t in range(len(own))] for own in values]
    actual = discounted_sum(flat(values), lengths_of(values), discount)
    torch.testing.assert_close(actual, flat(expected))


def test_an_empty_completion_changes_nothing():
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    lengths = torch.tensor([0, 2, 0, 1, 0])
    assert discounted_sum(values, lengths, 0.5).tolist() == [2.0, 2.0, 4.0]
    rewards = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    assert generalised_advantages(rewards, values, lengths, 1.0, 1.0).tolist() == [0.0, -1.0, 1.0]
    assert generalised_advantages(rewards[:0], values[:0], lengths[:1], 1.0, 1.0).tolist() == []


@settings(max_examples=80, deadline=None)
@given(cases=completions, gamma=rate, lam=rate)
def test_generalised_advantages_are_the_weighted_errors_to_come(cases, gamma, lam):
    expected = []
    for completion in cases:
        steps = len(completion)
        value = [v for _, v in completion] + [0.0]
        error = [completion[t][0] + gamma * value[t + 1] - value[t] for t in range(steps)]
        expected.append([sum((gamma * lam) ** (s - t) * error[s] for s in range(t, steps)) for t in range(steps)])
    rewards, values = column(cases, 0), column(cases, 1)
    actual = generalised_advantages(flat(rewards), flat(values), lengths_of(rewards), gamma, lam)
    torch.testing.assert_close(actual, flat(expected))


@settings(max_examples=60, deadline=None)
@given(cases=completions, gamma=rate, lam=rate)
def test_generalised_advantages_are_the_mean_of_the_n_step_ones(cases, gamma, lam):
    """(1 − λ)·Σ λⁿ⁻¹·(n-step return less the value), the last n taking all the weight that is left."""
    expected = []
    for completion in cases:
        steps, own = len(completion), []
        for t in range(steps):
            total = 0.0
            for n in range(1, steps - t + 1):
                n_step = sum(gamma**k * completion[t + k][0] for k in range(n)) - completion[t][1]
                n_step += gamma**n * completion[t + n][1] if t + n < steps else 0.0
                total += (lam ** (n - 1) if n == steps - t else (1 - lam) * lam ** (n - 1)) * n_step
            own.append(total)
        expected.append(own)
    rewards, values = column(cases, 0), column(cases, 1)
    actual = generalised_advantages(flat(rewards), flat(values), lengths_of(rewards), gamma, lam)
    torch.testing.assert_close(actual, flat(expected))


@settings(max_examples=60, deadline=None)
@given(cases=completions)
def test_without_discount_the_advantage_is_what_is_left_to_earn_less_the_value(cases):
    rewards, values = column(cases, 0), column(cases, 1)
    expected = [[math.fsum(r for r, _ in own[t:]) - own[t][1] for t in range(len(own))] for own in cases]
    actual = generalised_advantages(flat(rewards), flat(values), lengths_of(rewards), 1.0, 1.0)
    torch.testing.assert_close(actual, flat(expected))


def test_a_perfect_critic_leaves_no_advantage():
    """V is the discounted return itself, so every error is 0, whatever λ."""
    rewards, lengths = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([3, 1])
    values = torch.tensor([1 + 0.5 * 0 + 0.25 * 2, 1.0, 2.0, 3.0], dtype=torch.float64)
    for lam in (0.0, 0.6, 1.0):
        assert generalised_advantages(rewards, values, lengths, 0.5, lam).tolist() == [0.0] * 4


@settings(max_examples=60, deadline=None)
@given(cases=st.lists(st.tuples(st.one_of(number, st.just(math.nan)), st.lists(number, min_size=1)), max_size=5))
def test_token_rewards_are_the_penalty_and_at_the_end_the_reward(cases):
    expected = []
    for reward, penalty in cases:
        own = [-p for p in penalty]
        own[-1] += 0.0 if math.isnan(reward) else reward
        expected.append(own)
    penalties = [penalty for _, penalty in cases]
    rewards = torch.tensor([reward for reward, _ in cases], dtype=torch.float64)
    torch.testing.assert_close(token_rewards(rewards, flat(penalties), lengths_of(penalties)), flat(expected))


def test_the_return_of_a_penalised_completion_is_its_reward_less_the_whole_penalty():
    lengths, penalty = torch.tensor([2, 3]), torch.tensor([0.1, 0.2, 0.0, -0.3, 0.4])
    due = token_rewards(torch.tensor([1.0, math.nan]), penalty, lengths)
    returns = discounted_sum(due, lengths, 1.0)
    assert returns[[0, 2]].tolist() == pytest.approx([1.0 - 0.3, -0.1])


VALUES = torch.tensor([0.0, 0.3, 0.9, -0.7, 0.15, 2.0], dtype=torch.float64)
OLD = torch.tensor([0.1, 0.0, 0.2, -0.1, 0.1, 0.5], dtype=torch.float64)
RETURNS = torch.tensor([1.0, 1.0, 1.0, -1.0, -2.0, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_and_its_gradient_by_finite_differences(clip):
    def by_hand(values):
        losses = []
        for v, old, target in zip(values, OLD.tolist(), RETURNS.tolist(), strict=True):
            candidates = [(v - target) ** 2]
            if clip is not None:
                candidates.append((min(max(v, old - clip), old + clip) - target) ** 2)
            losses.append(max(candidates) / 2)
        return losses

    values = VALUES.clone().requires_grad_()
    losses = value_loss(values, OLD, RETURNS, clip)
    assert losses.tolist() == pytest.approx(by_hand(VALUES.tolist()), rel=1e-12)
    losses.sum().backward()
    h = 1e-6
    steps = zip(by_hand((VALUES + h).tolist()), by_hand((VALUES - h).tolist()), strict=True)
    expected = [(above - below) / (2 * h) for above, below in steps]
    assert values.grad.tolist() == pytest.approx(expected, abs=1e-8)
    assert (values.grad == 0).sum() == (0 if clip is None else 3)


def test_a_clipped_value_that_gains_nothing_further_has_no_gradient_and_one_that_went_astray_does():
    returns, old = torch.tensor([1.0, -1.0]), torch.zeros(2)
    values = torch.tensor([0.6, 0.6], requires_grad=True)
    value_loss(values, old, returns, 0.2).sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, 1.6])

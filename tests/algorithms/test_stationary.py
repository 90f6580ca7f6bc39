"""Oracles: every group enumerated, a scan for the first solution, and training with the project's own objective."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms.advantages import group_advantages
from agrpo.algorithms.objective import policy_loss
from agrpo.algorithms.stationary import (
    DIVERGENCES,
    expected_advantage,
    limit_pass_rate,
    pair_pass_rate,
    reachable_pass_rate,
    stationary_policy,
    tilted,
)

RATES = st.floats(1e-9, 1 - 1e-9)
BETAS = st.floats(1e-3, 1e3)
SIZES = st.sampled_from([2, 3, 8, 33, 128, math.inf])
KINDS = st.sampled_from(DIVERGENCES)


# --- the expected advantage


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.93])
def test_expected_advantage_is_the_mean_over_every_group(size, p):
    found = {1: 0.0, 0: 0.0}
    for first in (1, 0):
        for others in itertools.product((1, 0), repeat=size - 1):
            group = (first, *others)
            deviation = statistics.pstdev(group)
            advantage = (first - statistics.fmean(group)) / deviation if deviation else 0.0
            found[first] += advantage * math.prod(p if reward else 1 - p for reward in others)
    assert expected_advantage(p, size) == pytest.approx((found[1], found[0]), rel=1e-12)


@settings(deadline=None)
@given(RATES, SIZES)
def test_expected_advantage_averages_to_0_and_mirrors(p, size):
    correct, wrong = expected_advantage(p, size)
    assert correct > 0 > wrong
    assert p * correct + (1 - p) * wrong == pytest.approx(0, abs=1e-12)
    if size < math.inf:
        assert correct - wrong <= math.sqrt(size - 1) * (1 + 1e-9)
    mirrored = expected_advantage(1 - p, size)
    assert mirrored == pytest.approx((-wrong, -correct), rel=1e-6)


def test_expected_advantage_at_the_ends_is_the_limit():
    assert expected_advantage(0.0, 10) == (3.0, 0.0)
    assert expected_advantage(1.0, 10) == (0.0, -3.0)
    assert expected_advantage(0.0, math.inf) == (math.inf, 0.0)
    assert expected_advantage(1e-14, 10) == pytest.approx((3.0, 0.0), abs=1e-12)


def test_expected_advantage_of_large_groups_tends_to_the_limit():
    for p in (0.05, 0.5, 0.8):
        limit = (math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p)))
        assert expected_advantage(p, math.inf) == pytest.approx(limit)
        assert expected_advantage(p, 100_000) == pytest.approx(limit, rel=1e-3)


# --- the stationary pass rate


def test_the_figures_of_the_design():
    found = {kind: reachable_pass_rate(0.3, 1.0, 8, kind) for kind in DIVERGENCES}
    assert found == pytest.approx({"forward": 0.707770, "reverse": 0.770144, "symmetric": 0.727933}, abs=1e-6)


@settings(deadline=None)
@given(RATES, BETAS)
def test_the_closed_forms_of_the_forward_divergence(q, beta):
    assert reachable_pass_rate(q, beta, 2, "forward") == pytest.approx(pair_pass_rate(q, beta), abs=1e-11)
    assert reachable_pass_rate(q, beta, math.inf, "forward") == pytest.approx(limit_pass_rate(q, beta), abs=1e-11)


@settings(deadline=None)
@given(RATES, BETAS)
def test_pairs_under_the_reverse_divergence_shift_the_log_odds_by_one_over_beta(q, beta):
    """Δ = 1 in groups of two, whatever p."""
    shifted = 1 / (1 + (1 - q) / q * math.exp(-min(1 / beta, 700)))
    assert reachable_pass_rate(q, beta, 2, "reverse") == pytest.approx(shifted, abs=1e-11)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(1e-3, 1e9), st.floats(0.01, 1))
def test_a_margin_weakens_the_advantage_as_a_larger_beta_does(q, beta, margin):
    assert pair_pass_rate(q, beta, margin) == pytest.approx(pair_pass_rate(q, beta / margin), abs=1e-12)
    p, ratio = pair_pass_rate(q, beta, margin), beta / margin
    assert p * (1 - (1 - p) / ratio) == pytest.approx(q, abs=1e-9 * max(1, 1 / ratio))


def pull_less_advantage(p, q, beta, size, kind):
    forward = (1 - q) / (1 - p) - q / p
    reverse = math.log(p / (1 - p) * (1 - q) / q)
    pull = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kind]
    correct, wrong = expected_advantage(p, size)
    return pull - (correct - wrong) / beta


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-4, 1 - 1e-4), st.floats(0.2, 10), SIZES, KINDS)
def test_it_is_the_first_solution_above_the_reference(q, beta, size, kind):
    p = reachable_pass_rate(q, beta, size, kind)
    for i in range(60):
        below = q + (p - q) * i / 60
        if q < below < p - 1e-9:
            assert pull_less_advantage(below, q, beta, size, kind) < 0, "training would have stopped here"
    if p < 1 - 1e-6:
        assert abs(pull_less_advantage(p, q, beta, size, kind)) < 1e-3, "and it does stop at p"
        assert pull_less_advantage(p + (1 - p) * 1e-6, q, beta, size, kind) > -1e-6


def test_of_three_solutions_it_is_the_one_that_training_meets_first():
    q, beta, size = 0.5, 1.6, 128
    first = reachable_pass_rate(q, beta, size, "reverse")
    signs = [pull_less_advantage(p, q, beta, size, "reverse") > 0 for p in (first - 1e-3, first + 1e-3, 0.98, 0.9999)]
    assert signs == [False, True, False, True]
    assert first == pytest.approx(0.850657, abs=1e-6)


def test_a_little_less_beta_loses_the_first_solution():
    """Reverse, G → ∞, q = ½: 2·cosh(x/2) = β·x is solved only above β = 1.5088795."""
    assert reachable_pass_rate(0.5, 1.5089, math.inf, "reverse") < 0.92
    assert reachable_pass_rate(0.5, 1.5088, math.inf, "reverse") == 1.0
    assert reachable_pass_rate(0.5, 1.5088, math.inf, "symmetric") < 0.85, "e^x outgrows cosh(x/2)"


@settings(deadline=None)
@given(RATES, RATES, BETAS, BETAS, SIZES, KINDS)
def test_it_rises_with_today_and_falls_with_beta(q, other_q, beta, other_beta, size, kind):
    low, high = sorted((q, other_q))
    loose, tight = sorted((beta, other_beta))
    at = reachable_pass_rate(low, loose, size, kind)
    assert low - 1e-12 <= at <= 1
    assert at <= reachable_pass_rate(high, loose, size, kind) + 1e-9
    assert reachable_pass_rate(low, tight, size, kind) <= at + 1e-9


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("size", [2, 8, math.inf])
def test_degenerate_cases(kind, size):
    assert reachable_pass_rate(0.0, 1.0, size, kind) == 0.0
    assert reachable_pass_rate(1.0, 1.0, size, kind) == 1.0
    assert reachable_pass_rate(0.3, math.inf, size, kind) == 0.3
    assert reachable_pass_rate(0.3, 1e9, size, kind) == pytest.approx(0.3, abs=1e-8)
    assert reachable_pass_rate(0.3, 0.0, size, kind) == 1.0
    assert reachable_pass_rate(0.3, 1e-12, size, kind) == pytest.approx(1.0, abs=1e-8)
    assert 0 <= reachable_pass_rate(1e-199, 1.0, size, kind) <= 1
    assert reachable_pass_rate(1 - 1e-16, 1.0, size, kind) == pytest.approx(1.0)


def test_only_the_forward_divergence_lets_the_rarest_answer_become_common():
    assert reachable_pass_rate(1e-100, 1.0, 8, "forward") > 0.4
    assert reachable_pass_rate(1e-100, 3.0, 8, "forward") < 1e-9, "β above √(G − 1)"
    assert reachable_pass_rate(1e-100, 1.0, 8, "reverse") < 1e-9
    assert reachable_pass_rate(1e-100, 1.0, 8, "symmetric") < 1e-9


def test_arguments_out_of_range_are_refused():
    for arguments, what in (
        ((1.1, 1.0, 8, "forward"), "pass rate"),
        ((math.nan, 1.0, 8, "forward"), "pass rate"),
        ((0.5, -1.0, 8, "forward"), "beta"),
        ((0.5, math.nan, 8, "forward"), "beta"),
        ((0.5, 1.0, 1, "forward"), "group of one"),
        ((0.5, 1.0, 2.5, "forward"), "whole"),
        ((0.5, 1.0, 8, "none"), "forward, reverse, symmetric"),
    ):
        with pytest.raises(ValueError, match=what):
            reachable_pass_rate(*arguments)
    with pytest.raises(ValueError, match="sum to 1"):
        tilted([0.5, 0.4], [0.0, 1.0], 1.0, "forward")
    with pytest.raises(ValueError, match="do not go with"):
        stationary_policy([0.5, 0.5], [True], 1.0, 2, "forward")
    with pytest.raises(ValueError, match="finite"):
        tilted([0.5, 0.5], [0.0, 1.0], 0.0, "forward")
    with pytest.raises(ValueError, match="margin"):
        pair_pass_rate(0.5, 1.0, 0.0)


# --- policies over several answers

REFERENCE = [0.1, 0.2, 0.15, 0.55]
CORRECT = [True, False, True, False]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("size", [2, 8, math.inf])
@pytest.mark.parametrize("beta", [0.6, 2.0])
def test_a_stationary_policy_is_the_reference_tilted_by_its_own_advantage(kind, size, beta):
    policy = stationary_policy(REFERENCE, CORRECT, beta, size, kind)
    rate = policy[0] + policy[2]
    assert sum(policy) == pytest.approx(1)
    if rate == 1:
        assert (kind, size, beta) == ("reverse", math.inf, 0.6), "only there is no solution below 1"
        return
    correct, wrong = expected_advantage(rate, size)
    assert policy == pytest.approx(tilted(REFERENCE, [correct if c else wrong for c in CORRECT], beta, kind), abs=1e-9)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("beta", [1e-6, 0.01, 0.3, 4.0, 1e6])
def test_no_other_policy_does_better_than_the_tilted_one(kind, beta):
    advantage = [2.0, 0.0, -1.0, 0.5]
    reference = torch.tensor(REFERENCE, dtype=torch.float64)

    def value(policy):
        reverse, forward = (policy * (policy / reference).log()).sum(), (reference * (reference / policy).log()).sum()
        penalty = {"reverse": reverse, "forward": forward, "symmetric": (reverse + forward) / 2}[kind]
        return (policy * torch.tensor(advantage, dtype=torch.float64)).sum() / beta - penalty

    best = torch.tensor(tilted(REFERENCE, advantage, beta, kind), dtype=torch.float64)
    assert best.sum().item() == pytest.approx(1) and (best >= 0).all()
    if best.min() < 1e-290:
        return  # its logarithm is no longer a float's
    torch.manual_seed(0)
    for size in (1e-3, 0.1, 1.0):
        for nudge in torch.randn(20, 4, dtype=torch.float64) * size:
            assert value((best.log() + nudge).softmax(0)) <= value(best) + 1e-9 * max(1, 1 / beta)


def test_what_the_reference_never_says_stays_unsaid():
    for kind in DIVERGENCES:
        assert tilted([0.3, 0.7, 0.0], [0.0, 0.0, 9.0], 1.0, kind) == pytest.approx([0.3, 0.7, 0.0])
        assert stationary_policy([0.3, 0.7, 0.0], [False, False, True], 1.0, 8, kind) == [0.3, 0.7, 0.0]
        assert stationary_policy([0.3, 0.7, 0.0], [True, True, True], 1.0, 8, kind) == [0.3, 0.7, 0.0]


# --- training reaches it


def train(kind, beta, reference, tokens, rewards, group, probability, *, steps=400, learning_rate=1.5):
    """Gradient descent on `policy_loss` for a policy of one token, over all groups that can be sampled at once.

    tokens, rewards, group are (N,), the completions of every possible group; probability maps the policy to (N,), how
    likely each one's group is, over G. So a step follows the exact expected gradient.
    """
    logits = reference.log().clone().requires_grad_()
    advantages = group_advantages(rewards, group)
    lengths = torch.ones_like(tokens)
    for _ in range(steps):
        logp = logits.log_softmax(0)
        loss, _ = policy_loss(
            logp[tokens],
            logp[tokens].detach(),
            reference.log()[tokens],
            torch.zeros(len(tokens), dtype=torch.float64),
            advantages,
            lengths,
            weights=probability(logp.detach().exp()),
            epsilon_low=0.2,
            epsilon_high=0.2,
            beta=beta,
            entropy_coef=0.0,
            kl=kind,
            ratio="token",
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= learning_rate * gradient
        if gradient.abs().max() < 1e-7:
            break
    return logits.detach().softmax(0).tolist()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(("size", "beta"), [(2, 1.0), (8, 1.0), (64, 1.0), (64, 2.5)])
def test_training_with_the_projects_objective_reaches_it(kind, size, beta):
    count = torch.arange(size + 1)  # how many of the group are correct; the order does not matter
    tokens = (torch.arange(size) >= count[:, None]).long().flatten()  # answer 0 is the correct one
    log_ways = math.lgamma(size + 1) - torch.lgamma(count + 1.0).double() - torch.lgamma(size - count + 1.0).double()

    def probability(policy):
        log_each = log_ways + count * policy[0].log() + (size - count) * policy[1].log()
        return (log_each.exp() / size).repeat_interleave(size)

    reference = torch.tensor([0.3, 0.7], dtype=torch.float64)
    group = torch.arange(size + 1).repeat_interleave(size)
    reached, _ = train(kind, beta, reference, tokens, 1.0 - tokens.double(), group, probability)
    assert reached == pytest.approx(reachable_pass_rate(0.3, beta, size, kind), abs=1e-3)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_training_on_four_answers_reaches_the_policy(kind):
    groups = torch.tensor(list(itertools.product(range(4), repeat=3)))  # every group of three, in every order
    tokens, group = groups.flatten(), torch.arange(len(groups)).repeat_interleave(3)
    rewards = torch.tensor(CORRECT, dtype=torch.float64)[tokens]

    def probability(policy):
        return (policy[groups].prod(1) / 3).repeat_interleave(3)

    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    reached = train(kind, 1.0, reference, tokens, rewards, group, probability, steps=1000)
    assert reached == pytest.approx(stationary_policy(REFERENCE, CORRECT, 1.0, 3, kind), abs=1e-3)

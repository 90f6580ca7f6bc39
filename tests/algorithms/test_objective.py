import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms.advantages import group_advantages
from agrpo.algorithms.objective import (
    clip_fractions,
    clipped_surrogate,
    importance_ratio,
    policy_loss,
    sampler_weights,
    token_weights,
)
from agrpo.algorithms.preference import group_preference_loss, implicit_reward, ordered_pairs, pair_weights

LENGTHS = torch.tensor([3, 1, 5, 2])
C, N = 11, 4
RANGE = {"epsilon_low": 0.2, "epsilon_high": 0.3}


def batch(seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    logp = -draw(C).abs()
    return {
        "logp": logp,
        "old_logp": logp + spread * draw(C),
        "ref_logp": logp + spread * draw(C),
        "entropy": draw(C).abs(),
        "advantages": draw(C),
    }


def numeric_gradient(f, x, h=1e-6):
    steps = torch.eye(len(x), dtype=x.dtype) * h
    return torch.stack([(f(x + step) - f(x - step)) / (2 * h) for step in steps])


def autograd(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_gradient_of_each_tokens_own_advantage_by_finite_differences(aggregation, dual_clip):
    b = batch()
    weights = token_weights(LENGTHS, aggregation, total_tokens=C, total_sequences=N, max_length=8).double()

    def by_hand(logp):
        total = 0.0
        for t in range(C):
            rho, a = float((logp[t] - b["old_logp"][t]).exp()), float(b["advantages"][t])
            gain = min(rho * a, min(max(rho, 0.8), 1.3) * a)
            if dual_clip and a < 0:
                gain = max(gain, dual_clip * a)
            total -= float(weights[t]) * gain
        return torch.tensor(total, dtype=torch.float64)

    def loss(logp):
        return policy_loss(
            **{**b, "logp": logp},
            lengths=LENGTHS,
            weights=weights,
            beta=0.0,
            entropy_coef=0.0,
            kl="symmetric",
            ratio="token",
            dual_clip=dual_clip,
            **RANGE,
        )[0]

    assert loss(b["logp"]).item() == pytest.approx(by_hand(b["logp"]).item(), abs=1e-12)
    expected = numeric_gradient(by_hand, b["logp"])
    torch.testing.assert_close(autograd(loss, b["logp"]), expected, atol=1e-7, rtol=1e-6)
    assert 0 < (expected == 0).sum() < C  # some tokens clipped, some not


@pytest.mark.parametrize("level", ["sequence", "trajectory"])
def test_completion_level_ratio_and_gradient_are_those_of_its_definition(level):
    b, advantages = batch(), torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)

    def definition(logp):
        """Σ_i A_i·scale_i·ratio_i, scale |y| at sequence level, so that ∂ is ρ·∇log π per token."""
        total, start = 0.0, 0
        for i, n in enumerate(LENGTHS.tolist()):
            difference = (logp - b["old_logp"])[start : start + n]
            exponent = difference.mean() if level == "sequence" else difference.sum()
            total = total + advantages[i] * (n if level == "sequence" else 1) * exponent.exp()
            start += n
        return total

    def subject(logp):
        ratio = importance_ratio(logp, b["old_logp"], LENGTHS, level)
        return (ratio * advantages.repeat_interleave(LENGTHS)).sum()

    torch.testing.assert_close(
        autograd(subject, b["logp"]), numeric_gradient(definition, b["logp"]), atol=1e-7, rtol=1e-6
    )
    ratio = importance_ratio(b["logp"], b["old_logp"], LENGTHS, level)
    sizes = LENGTHS if level == "sequence" else torch.ones(N)
    firsts = ratio[LENGTHS.cumsum(0) - LENGTHS]
    torch.testing.assert_close(ratio, firsts.repeat_interleave(LENGTHS))
    assert (firsts * sizes * advantages).sum().item() == pytest.approx(definition(b["logp"]).item())


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
def test_unchanged_policy_has_ratio_one_and_the_policy_gradient(level):
    logp = batch()["logp"]
    assert torch.equal(importance_ratio(logp, logp, LENGTHS, level), torch.ones(C, dtype=torch.float64))
    gradient = autograd(lambda x: importance_ratio(x, logp, LENGTHS, level).sum(), logp)
    torch.testing.assert_close(gradient, torch.ones(C, dtype=torch.float64))


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_an_exploding_ratio_leaves_a_finite_gradient(level, advantage):
    old = torch.full((C,), -300.0)

    def loss(logp):
        ratio = importance_ratio(logp, old, LENGTHS, level)
        return clipped_surrogate(ratio, torch.full((C,), advantage), 0.2, 0.2).sum()

    gradient = autograd(loss, torch.zeros(C))
    assert gradient.isfinite().all()
    assert (gradient == 0).all() == (advantage > 0)


def test_clip_holds_only_what_would_go_further():
    ratio = torch.tensor([0.5, 0.5, 2.0, 2.0, 1.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss = clipped_surrogate(ratio, advantages, 0.2, 0.3)
    torch.testing.assert_close(loss.detach(), torch.tensor([-0.5, 0.8, -1.3, 2.0, -1.0]))
    loss.sum().backward()
    assert ratio.grad.tolist() == [-1.0, 0.0, 0.0, 1.0, -1.0]
    counts = clip_fractions(ratio, advantages, 0.2, 0.3)
    assert {key: float(count) for key, count in counts.items()} == {"low": 1, "high": 1, "region": 2}


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    ratio, advantages = torch.tensor([5.0, 5.0, 2.0]), torch.tensor([-1.0, 1.0, -1.0])
    assert clipped_surrogate(ratio, advantages, 0.2, 0.2, 3.0).tolist() == pytest.approx([3.0, -1.2, 2.0])
    with pytest.raises(ValueError, match="dual_clip"):
        clipped_surrogate(ratio, advantages, 0.2, 0.2, 1.0)


def test_token_weights_give_the_three_means():
    per_token = torch.rand(C, dtype=torch.float64)
    pieces = per_token.split(LENGTHS.tolist())
    expected = {
        "token": per_token.mean(),
        "sequence": torch.stack([piece.mean() for piece in pieces]).mean(),
        "constant": torch.stack([piece.sum() / 8 for piece in pieces]).mean(),
    }
    for aggregation, mean in expected.items():
        weights = token_weights(LENGTHS, aggregation, total_tokens=C, total_sequences=N, max_length=8)
        torch.testing.assert_close((weights * per_token).sum(), mean, rtol=1e-6, atol=0)


def slice_of(b, first, last, weights):
    ends = [0, *LENGTHS.cumsum(0).tolist()]
    tokens = slice(ends[first], ends[last])
    return {key: values[tokens] for key, values in b.items()} | {
        "lengths": LENGTHS[first:last],
        "weights": weights[tokens],
    }


@settings(max_examples=40, deadline=None)
@given(
    cut=st.integers(0, N),
    aggregation=st.sampled_from(["token", "sequence", "constant"]),
    kl=st.sampled_from(["none", "reverse", "forward", "symmetric"]),
    ratio=st.sampled_from(["token", "sequence", "trajectory"]),
)
def test_shards_sum_to_the_whole(cut, aggregation, kl, ratio):
    b = batch(seed=cut)
    totals = {"total_tokens": C, "total_sequences": N, "max_length": 8}
    weights = token_weights(LENGTHS, aggregation, **totals).double()
    own = [token_weights(part, aggregation, **totals).double() for part in (LENGTHS[:cut], LENGTHS[cut:])]
    torch.testing.assert_close(torch.cat(own), weights)  # a shard knows its weights from the totals alone
    options = RANGE | {"beta": 0.1, "entropy_coef": 0.01, "kl": kl, "ratio": ratio}
    whole, terms = policy_loss(**slice_of(b, 0, N, weights), **options)
    left, left_terms = policy_loss(**slice_of(b, 0, cut, weights), **options)
    right, right_terms = policy_loss(**slice_of(b, cut, N, weights), **options)
    torch.testing.assert_close(left + right, whole)
    for field in dataclasses.fields(terms):
        parts = getattr(left_terms, field.name) + getattr(right_terms, field.name)
        torch.testing.assert_close(parts, getattr(terms, field.name))
        assert not parts.requires_grad and parts.dim() == 0


def test_lambda_zero_is_grpo_written_out_with_padding():
    """The oracle is the usual padded form: reward matrix, mask, k3, mean per sequence (Shao et al., eq. 3)."""
    b, beta, eps = batch(spread=0.3), 0.04, 0.2
    b["old_logp"] = b["logp"].clone()  # one update a rollout
    rewards = torch.tensor([1.0, 0.0, 0.25, 3.0], dtype=torch.float64)
    mask = torch.arange(5) < LENGTHS[:, None]

    def padded(flat):
        grid = torch.zeros(N, 5, dtype=flat.dtype)
        grid[mask] = flat
        return grid

    def grpo(logp):
        rows = rewards.view(2, 2)
        advantages = ((rows - rows.mean(1, True)) / (rows.std(1, correction=0, keepdim=True) + 1e-4)).view(N, 1)
        ratio = torch.exp(padded(logp) - padded(b["old_logp"]))
        clipped = torch.clamp(ratio, 1 - eps, 1 + eps)
        back = padded(b["ref_logp"]) - padded(logp)
        loss = -torch.min(ratio * advantages, clipped * advantages) + beta * (torch.exp(back) - back - 1)
        return ((loss * mask).sum(1) / mask.sum(1)).mean()

    def subject(logp, lam=0.0):
        group = torch.tensor([0, 0, 1, 1])
        policy, _ = policy_loss(
            logp,
            b["old_logp"],
            b["ref_logp"],
            b["entropy"],
            group_advantages(rewards, group).repeat_interleave(LENGTHS),
            LENGTHS,
            weights=token_weights(LENGTHS, "sequence", total_tokens=C, total_sequences=N, max_length=8),
            epsilon_low=eps,
            epsilon_high=eps,
            beta=beta,
            entropy_coef=0.0,
            kl="forward",
            ratio="token",
        )
        pairs = ordered_pairs(rewards, group)
        scores = implicit_reward(logp, b["ref_logp"], LENGTHS, alpha=0.1, reduction="sum")
        weights = pair_weights(pairs, torch.ones(2, dtype=torch.float64), "confidence")
        return lam * group_preference_loss(scores, pairs, weights) / weights.sum() + (1 - lam) * policy

    torch.testing.assert_close(subject(b["logp"]), grpo(b["logp"]), rtol=1e-6, atol=1e-7)  # weights are float32
    torch.testing.assert_close(autograd(subject, b["logp"]), autograd(grpo, b["logp"]), rtol=1e-6, atol=1e-7)
    assert (subject(b["logp"], lam=0.5) - grpo(b["logp"])).abs() > 0.1


@pytest.mark.parametrize("kl", ["reverse", "forward", "symmetric"])
def test_off_policy_penalty_and_bonus_have_the_enumerated_gradient(kl):
    """Every token of a small vocabulary is one completion, weighted by how often the old policy samples it."""
    logits, ref, old = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def subject(logits):
        logp = logits.log_softmax(0)
        entropy = -(logp.exp() * logp).sum().expand(6)
        return policy_loss(
            logp,
            old.log_softmax(0),
            ref.log_softmax(0),
            entropy,
            torch.zeros(6, dtype=torch.float64),
            torch.ones(6, dtype=torch.long),
            weights=old.softmax(0),
            beta=0.7,
            entropy_coef=0.3,
            kl=kl,
            ratio="sequence",
            **RANGE,
        )

    def exact(logits):
        p, r = logits.softmax(0), ref.softmax(0)
        reverse, forward = (p * (p / r).log()).sum(), (r * (r / p).log()).sum()
        divergence = {"reverse": reverse, "forward": forward, "symmetric": (reverse + forward) / 2}[kl]
        return 0.7 * divergence + 0.3 * (p * p.log()).sum()

    actual = autograd(lambda x: subject(x)[0], logits)
    torch.testing.assert_close(actual, numeric_gradient(exact, logits), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio", ["token", "sequence", "trajectory"])
def test_the_divergence_is_weighted_by_each_tokens_own_ratio_whatever_the_clips(ratio):
    b = batch() | {"advantages": torch.zeros(C, dtype=torch.float64)}
    weights = torch.linspace(0.1, 1.0, C, dtype=torch.float64)
    how = dict(lengths=LENGTHS, weights=weights, beta=0.7, entropy_coef=0.0, kl="forward", ratio=ratio, **RANGE)
    rows = zip(weights.tolist(), *(b[k].tolist() for k in ("logp", "old_logp", "ref_logp")), strict=True)
    expected = [0.7 * w * math.exp(logp - old) * (1 - math.exp(ref - logp)) for w, logp, old, ref in rows]
    actual = autograd(lambda logp: policy_loss(**(b | {"logp": logp}), **how)[0], b["logp"])
    assert actual.tolist() == pytest.approx(expected, rel=1e-9)


def test_update_divergence_is_the_old_policys():
    old, new = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).log_softmax(1)
    repeats = 10_000  # tokens in proportion to the old policy, so that the sum over tokens is its expectation
    tokens = torch.arange(6).repeat_interleave((old.exp() * repeats).round().long())
    terms = policy_loss(
        new[tokens],
        old[tokens],
        new[tokens],
        torch.zeros(len(tokens)),
        torch.zeros(len(tokens)),
        torch.tensor([len(tokens)]),
        weights=torch.ones(len(tokens)),
        beta=0.0,
        entropy_coef=0.0,
        kl="none",
        ratio="token",
        **RANGE,
    )[1]
    exact = (old.exp() * (old - new)).sum().item()
    assert terms.update_kl.item() / terms.tokens.item() == pytest.approx(exact, rel=1e-3)
    assert exact > 0.1


def test_without_a_divergence_the_reference_is_reported_but_not_learned_from():
    b = batch()
    options = dict(lengths=LENGTHS, weights=torch.ones(C), beta=0.1, entropy_coef=0.0, ratio="token", **RANGE)
    loss, terms = policy_loss(**b, kl="none", **options)
    moved, there = policy_loss(**{**b, "ref_logp": b["ref_logp"] - 1}, kl="none", **options)
    assert moved == loss and terms.kl == there.kl == 0
    assert there.symmetric_kl != terms.symmetric_kl
    assert terms.symmetric_kl == policy_loss(**b, kl="symmetric", **options)[1].symmetric_kl


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="trajectory"):
        importance_ratio(torch.zeros(C), torch.zeros(C), LENGTHS, "turn")
    with pytest.raises(ValueError, match="constant"):
        token_weights(LENGTHS, "mean", total_tokens=C, total_sequences=N, max_length=8)


def every_completion(seed, tokens=3, length=2):
    """All completions of an enumerable policy, and the probabilities of its and of another sampler's every token.

    Returns (tokens**length, length) tokens, and logits (2, contexts, tokens): of the policy, and of the sampler.
    """
    g = torch.Generator().manual_seed(seed)
    words = torch.cartesian_prod(*[torch.arange(tokens)] * length)
    return words, torch.randn(2, 1 + tokens, tokens, generator=g, dtype=torch.float64)


def logprobs_of(words, logits):
    """(completions, 2) log-probabilities: the second token depends on the first."""
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p[0, words[:, 0]], log_p[1 + words[:, 0], words[:, 1]]], 1)


@pytest.mark.parametrize("seed", range(3))
def test_uncapped_sequence_weights_give_the_gradient_of_the_policys_own_expectation(seed):
    words, (policy, sampler) = every_completion(seed)
    lengths = torch.full((len(words),), 2)
    advantages = torch.randn(len(words), generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def objective(logits):
        """−E_π[A], over every completion."""
        return -(logprobs_of(words, logits).sum(1).exp() * advantages).sum()

    logits = policy.clone().requires_grad_()
    logp, mu = logprobs_of(words, logits), logprobs_of(words, sampler)
    m, held = sampler_weights(logp.flatten(), mu.flatten(), lengths, "sequence", math.inf)
    drawn = mu.sum(1).exp().repeat_interleave(2)  # the sampler's probability of each completion
    loss, _ = policy_loss(
        logp.flatten(),
        logp.detach().flatten(),
        logp.detach().flatten(),
        torch.zeros(2 * len(words), dtype=torch.float64),
        advantages.repeat_interleave(2),
        lengths,
        weights=drawn * m,
        beta=0.0,
        entropy_coef=0.0,
        kl="none",
        ratio="token",
        **RANGE,
    )
    expected = autograd(objective, policy)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    uncorrected = (drawn * -advantages.repeat_interleave(2) * logprobs_of(words, logits).flatten()).sum()
    assert (torch.autograd.grad(uncorrected, logits)[0] - expected).abs().max() > 1e-2
    assert not held.any()


@pytest.mark.parametrize("correction", ["token", "mask"])
def test_uncapped_token_weights_give_the_policys_expectation_of_each_token(correction):
    words, (policy, sampler) = every_completion(1)
    logp, mu = logprobs_of(words, policy), logprobs_of(words, sampler)
    m, _ = sampler_weights(logp.flatten(), mu.flatten(), torch.full((len(words),), 2), correction, math.inf)
    value = torch.randn(len(words), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for first in range(3):  # E[f(second token) | first]
        here = words[:, 0] == first
        under_sampler = (mu[here, 1].exp() * m.view(-1, 2)[here, 1] * value[here]).sum()
        assert under_sampler.item() == pytest.approx((logp[here, 1].exp() * value[here]).sum().item())


def test_the_cap_truncates_from_above_and_the_mask_drops_both_tails():
    log_m = torch.tensor([0.0, 1.0, -1.0, 0.5, -3.0, 0.1])
    how = (torch.full((6,), -2.0) + log_m, torch.full((6,), -2.0), torch.tensor([2, 3, 1]))
    weights, held = sampler_weights(*how, "token", 2.0)
    torch.testing.assert_close(weights, log_m.exp().clamp(max=2.0))
    assert held.tolist() == [False, True, False, False, False, False]
    weights, held = sampler_weights(*how, "mask", 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, 0.0, math.exp(0.5), 0.0, math.exp(0.1)]))
    assert held.tolist() == [False, True, True, False, True, False]
    weights, held = sampler_weights(*how, "sequence", 2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 2.0, *[math.exp(-3.5)] * 3, math.exp(0.1)]))
    assert held.tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("correction", ["token", "sequence", "mask"])
def test_a_sampler_that_is_the_policy_has_weights_of_exactly_one(correction):
    logp = batch()["logp"].requires_grad_()
    weights, held = sampler_weights(logp, logp.detach(), LENGTHS, correction, 2.0)
    assert torch.equal(weights, torch.ones(C, dtype=torch.float64)) and not held.any() and not weights.requires_grad


def test_sampler_weights_refuse_what_they_do_not_know():
    logp = batch()["logp"]
    with pytest.raises(ValueError, match="correction must be one of token, sequence, mask"):
        sampler_weights(logp, logp, LENGTHS, "none", 2.0)
    with pytest.raises(ValueError, match="cap must be above 1"):
        sampler_weights(logp, logp, LENGTHS, "token", 1.0)


def test_a_range_without_ends_clips_nothing():
    ratio = torch.tensor([0.0, 1e-6, 0.5, 1.0, 3.0, 4e8], dtype=torch.float64, requires_grad=True)
    for advantage in (-2.0, 0.5):
        advantages = torch.full((6,), advantage, dtype=torch.float64)
        loss = clipped_surrogate(ratio, advantages, 1.0, math.inf)
        assert loss.tolist() == (-ratio * advantage).tolist()
        (gradient,) = torch.autograd.grad(loss.sum(), ratio)
        assert gradient[1:].tolist() == [-advantage] * 5
        assert clip_fractions(ratio, advantages, 1.0, math.inf)["region"] == 0

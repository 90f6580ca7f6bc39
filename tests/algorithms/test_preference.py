import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms import preference
from agrpo.algorithms.objective import policy_loss
from agrpo.algorithms.preference import Pairs, group_preference_loss, implicit_reward, ordered_pairs, pair_weights

NAN = math.nan
ranked = st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, NAN]), max_size=5), max_size=4)


def flat(groups):
    levels = torch.tensor([x for g in groups for x in g], dtype=torch.float64)
    return levels, torch.tensor([p for p, g in enumerate(groups) for _ in g], dtype=torch.long)


def pairs_of(groups):
    return ordered_pairs(*flat(groups))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@settings(max_examples=60, deadline=None)
@given(groups=ranked, seed=st.integers(0, 100))
def test_pairs_are_all_strictly_ordered_ones_of_a_group(groups, seed):
    levels, group = flat(groups)
    shuffled = torch.randperm(len(levels), generator=torch.Generator().manual_seed(seed))
    levels, group = levels[shuffled], group[shuffled]
    pairs = ordered_pairs(levels, group)
    expected = {
        (i, j, float(levels[i] - levels[j]))
        for i, j in itertools.permutations(range(len(levels)), 2)
        if group[i] == group[j] and levels[i] > levels[j]
    }
    listed = list(zip(pairs.better.tolist(), pairs.worse.tolist(), pairs.gap.tolist(), strict=True))
    assert set(listed) == expected and len(listed) == len(expected)


def test_integer_levels_make_pairs_too():
    pairs = ordered_pairs(torch.tensor([2, 0, 2]), torch.tensor([0, 0, 0]))
    assert (pairs.better.tolist(), pairs.worse.tolist(), pairs.gap.tolist()) == ([0, 2], [1, 1], [2, 2])


def test_confidences_equal_their_definition():
    margin = torch.tensor([0.0, 1e-4, 0.5, -3.0], dtype=torch.float64)
    expected = [abs(2 * sigmoid(m / 0.7) - 1) for m in margin.tolist()]
    assert preference.confidence_from_margin(margin, 0.7).tolist() == pytest.approx(expected, rel=1e-9)
    rewards = preference.confidence_from_rewards(margin + 5, torch.full((4,), 5.0, dtype=torch.float64), 0.7)
    assert rewards.tolist() == pytest.approx(expected, rel=1e-9)

    p = torch.tensor([0.5, 0.9, 0.2])
    assert preference.confidence_from_probability(p).tolist() == pytest.approx([0.0, 0.8, 0.6])

    votes_for, votes_against = torch.tensor([3, 0, 5, 0]), torch.tensor([1, 0, 5, 2])
    assert preference.confidence_from_votes(votes_for, votes_against).tolist() == [0.5, 0.0, 0.0, 1.0]

    means_i, means_j = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 2.0, 1.0])
    stds_i, stds_j = torch.tensor([0.3, 0.0, 1.0, 0.0]), torch.tensor([0.4, 0.0, 1.0, 0.0])
    confidence = preference.confidence_from_ensemble(means_i, means_j, stds_i, stds_j)
    assert confidence.tolist() == pytest.approx([abs(2 * NormalDist().cdf(0.5 / 0.5) - 1), 0.0, 0.0, 1.0])


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="scale"):
        preference.confidence_from_rewards(torch.ones(1), torch.zeros(1), 0.0)


def test_hierarchical_loss_is_the_mean_over_strata_of_their_weighted_means():
    pairs = pairs_of([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0], [5.0, 6.0, 6.0]])
    confidence, loss = torch.rand(2, len(pairs.gap), dtype=torch.float64)
    strata = []
    for gap in (1.0, 2.0, 3.0):
        members = [k for k in range(len(loss)) if pairs.gap[k] == gap]
        total = sum(float(confidence[k]) for k in members)
        strata.append(sum(float(confidence[k] * loss[k]) for k in members) / total)
    weights = pair_weights(pairs, confidence, "hierarchical")
    assert float((weights * loss).sum() / weights.sum()) == pytest.approx(sum(strata) / 3)


@pytest.mark.parametrize("scheme", preference.SCHEMES)
@settings(max_examples=30, deadline=None)
@given(groups=ranked, cut=st.integers(0, 4), seed=st.integers(0, 100))
def test_pair_shards_sum_to_the_whole(scheme, groups, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    everything = pairs_of(groups)
    confidence = torch.rand(len(everything.gap), generator=generator, dtype=torch.float64)
    scores = torch.randn(sum(map(len, groups)), generator=generator, dtype=torch.float64)
    border = sum(map(len, groups[:cut]))
    left = everything.better < border
    totals = {}
    for side in (left, ~left):
        shard = Pairs(everything.better[side], everything.worse[side], everything.gap[side])
        for gap, total in preference.stratum_totals(shard, confidence[side]).items():
            totals[gap] = totals.get(gap, 0.0) + total
    loss = weight = entropy = count = 0.0
    for side in (left, ~left):
        shard = Pairs(everything.better[side], everything.worse[side], everything.gap[side])
        weights = pair_weights(shard, confidence[side], scheme, totals=totals)
        loss, weight = loss + group_preference_loss(scores, shard, weights), weight + weights.sum()
        h, n = preference.preference_uncertainty(scores, shard)
        entropy, count = entropy + h, count + n
    whole = pair_weights(everything, confidence, scheme)
    torch.testing.assert_close(loss, group_preference_loss(scores, everything, whole))
    torch.testing.assert_close(weight, whole.sum())
    whole_entropy, whole_count = preference.preference_uncertainty(scores, everything)
    torch.testing.assert_close(entropy, whole_entropy)
    assert count == whole_count == len(everything.gap)


def test_a_stratum_without_confidence_weighs_nothing_rather_than_nan():
    weights = pair_weights(pairs_of([[0.0, 2.0], [0.0, 1.0]]), torch.tensor([0.0, 0.5]), "hierarchical")
    assert weights.tolist() == [0.0, 1.0]


LENGTHS = torch.tensor([3, 2])
LOGP = torch.tensor([-1.0, -0.5, -2.0, -0.3, -1.7], dtype=torch.float64)
REF = torch.tensor([-1.2, -0.9, -1.1, -0.8, -1.0], dtype=torch.float64)


def test_lambda_one_with_one_pair_and_full_confidence_is_dpo():
    """DPO by hand: −log σ(β[(log π_w − log ref_w) − (log π_l − log ref_l)]), gradient −β·σ(−z)·(±1) per token."""
    beta = 0.3
    z = beta * ((-3.5 + 3.2) - (-2.0 + 1.8))
    logp = LOGP.clone().requires_grad_()
    scores = implicit_reward(logp, REF, LENGTHS, alpha=beta, reduction="sum")
    pairs = pairs_of([[1.0, 0.0]])
    weights = pair_weights(pairs, torch.ones(1, dtype=torch.float64), "confidence")
    policy, _ = policy_loss(
        logp,
        LOGP,
        REF,
        torch.zeros(5),
        torch.tensor([1.0, -1.0]),
        LENGTHS,
        weights=torch.full((5,), 0.2),
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.1,
        entropy_coef=0.0,
        kl="symmetric",
        ratio="token",
    )
    lam = 1.0
    loss = lam * group_preference_loss(scores, pairs, weights) / weights.sum() + (1 - lam) * policy
    assert loss.item() == pytest.approx(-math.log(sigmoid(z)), abs=1e-12)
    loss.backward()
    slope = -beta * sigmoid(-z)
    torch.testing.assert_close(logp.grad, torch.tensor([slope] * 3 + [-slope] * 2, dtype=torch.float64))


def test_mean_reduction_takes_the_length_out():
    scores = implicit_reward(LOGP, REF, LENGTHS, alpha=2.0, reduction="mean")
    assert scores.tolist() == pytest.approx([2 * -0.3 / 3, 2 * -0.2 / 2])
    with pytest.raises(ValueError, match="sum or mean"):
        implicit_reward(LOGP, REF, LENGTHS, alpha=2.0, reduction="max")


def minimiser(**options):
    """z of one pair after Newton-free descent on the loss."""
    lead = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    pairs = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]))
    for _ in range(300):
        scores = torch.cat([lead, torch.zeros(1, dtype=torch.float64)])
        (gradient,) = torch.autograd.grad(group_preference_loss(scores, pairs, torch.tensor([0.4]), **options), lead)
        lead = (lead - 5 * gradient).detach().requires_grad_()
    return lead.item()


def test_soft_labels_move_the_minimiser_to_the_logit_and_weights_do_not():
    probability = torch.tensor([0.8], dtype=torch.float64)
    assert minimiser(labels="soft", probability=probability) == pytest.approx(math.log(4), abs=1e-6)
    assert minimiser(labels="soft", probability=probability, margin=0.5) == pytest.approx(math.log(4) + 0.5, abs=1e-6)
    assert minimiser() > 5


def test_soft_with_certain_labels_is_the_weighted_loss():
    pairs, scores = pairs_of([[0.0, 1.0, 2.0]]), torch.tensor([0.3, -1.0, 0.8])
    weights, margin = torch.tensor([0.2, 1.0, 0.5]), torch.tensor([0.1, 0.0, 0.4])
    weighted = group_preference_loss(scores, pairs, weights, margin=margin)
    soft = group_preference_loss(scores, pairs, weights, margin=margin, labels="soft", probability=torch.ones(3))
    torch.testing.assert_close(soft, weighted)
    z = (scores[pairs.better] - scores[pairs.worse] - margin).tolist()
    by_hand = sum(w * -math.log(sigmoid(x)) for w, x in zip(weights.tolist(), z, strict=True))
    assert weighted.item() == pytest.approx(by_hand, rel=1e-5)


def test_soft_needs_probabilities_and_unknown_names_are_refused():
    pairs = pairs_of([[0.0, 1.0]])
    with pytest.raises(ValueError, match="probability"):
        group_preference_loss(torch.zeros(2), pairs, torch.ones(1), labels="soft")
    with pytest.raises(ValueError, match="weighted or soft"):
        group_preference_loss(torch.zeros(2), pairs, torch.ones(1), labels="hard")
    with pytest.raises(ValueError, match="hierarchical"):
        pair_weights(pairs, torch.ones(1), "margin")


def test_no_pairs_give_a_differentiable_zero():
    scores = torch.zeros(3, requires_grad=True)
    loss = group_preference_loss(scores, pairs_of([[1.0, 1.0, NAN]]), torch.ones(0))
    loss.backward()
    assert loss == 0 and scores.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("lead", [0.0, 0.3, -2.0, 30.0, 1e4])
def test_uncertainty_is_the_binary_entropy_of_the_preference(lead):
    scores = torch.tensor([lead, 0.0], requires_grad=True)
    total, count = preference.preference_uncertainty(scores, pairs_of([[1.0, 0.0]]))
    p = sigmoid(min(abs(lead), 700))
    expected = 0.0 if p == 1.0 else -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert total.item() == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert count == 1 and not total.requires_grad


def test_label_entropy_of_known_probabilities():
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert preference.label_entropy(torch.tensor([0.5, 1.0, 0.0, 0.25])) == pytest.approx((1 + quarter) / 4)

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
        torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]),
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


ONE_PAIR = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]))


def loss_at(lead, **options):
    """Loss of one pair with the weight 1, as a function of s_i − s_j."""
    return group_preference_loss(torch.tensor([lead, 0.0], dtype=torch.float64), ONE_PAIR, torch.ones(1), **options)


def minimiser(**options):
    """s_i − s_j of one pair after descent on the loss."""
    lead = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        scores = torch.cat([lead, torch.zeros(1, dtype=torch.float64)])
        loss = group_preference_loss(scores, ONE_PAIR, torch.tensor([0.4]), **options)
        (gradient,) = torch.autograd.grad(loss, lead)
        lead = (lead - gradient).detach().requires_grad_()
    return lead.item()


@pytest.mark.parametrize("flipped", [0.2, torch.tensor([0.2], dtype=torch.float64)])
def test_doubted_labels_move_the_minimiser_to_the_logit_and_weights_do_not(flipped):
    assert minimiser(flipped=flipped) == pytest.approx(math.log(4), abs=1e-6)
    assert minimiser(flipped=flipped, margin=0.5) == pytest.approx(math.log(4) + 0.5, abs=1e-6)
    assert minimiser() > 4


def test_each_pair_has_its_own_doubt():
    doubt = torch.tensor([0.1, 0.3], dtype=torch.float64)
    pairs = Pairs(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2))
    scores = torch.tensor([math.log(9), 0.0, math.log(7 / 3), 0.0], dtype=torch.float64, requires_grad=True)
    group_preference_loss(scores, pairs, torch.ones(2), flipped=doubt).backward()
    assert scores.grad.abs().max() < 1e-12
    swapped = torch.autograd.grad(group_preference_loss(scores, pairs, torch.ones(2), flipped=doubt.flip(0)), scores)[0]
    assert swapped.abs().min() > 0.1


def test_ipo_stops_at_half_and_robust_never():
    assert minimiser(shape="ipo") == pytest.approx(0.5, abs=1e-9)
    assert minimiser(shape="ipo", margin=0.3) == pytest.approx(0.8, abs=1e-9)
    assert minimiser(shape="robust", flipped=0.2) > minimiser() + 10


@pytest.mark.parametrize("lead", [-3.0, -0.4, 0.0, 1.7, 40.0])
@pytest.mark.parametrize("doubt", [0.0, 0.1, 0.45])
def test_losses_of_a_pair_are_their_closed_forms(lead, doubt):
    clean, reversed_ = math.log1p(math.exp(-lead)), math.log1p(math.exp(lead))  # −log σ(z), −log σ(−z)
    conservative = (1 - doubt) * clean + doubt * reversed_
    assert loss_at(lead, flipped=doubt).item() == pytest.approx(conservative, rel=1e-9, abs=1e-12)
    robust = ((1 - doubt) * clean - doubt * reversed_) / (1 - 2 * doubt)
    assert loss_at(lead, shape="robust", flipped=doubt).item() == pytest.approx(robust, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("lead", [-3.0, 0.2, 4.0])
def test_robust_loss_is_unbiased_for_the_clean_one_when_labels_are_flipped(lead):
    doubt = 0.3
    noisy = (1 - doubt) * loss_at(lead, shape="robust", flipped=doubt)
    noisy = noisy + doubt * loss_at(-lead, shape="robust", flipped=doubt)
    assert noisy.item() == pytest.approx(math.log1p(math.exp(-lead)), rel=1e-12)
    conservative = (1 - doubt) * loss_at(lead, flipped=doubt) + doubt * loss_at(-lead, flipped=doubt)
    assert abs(conservative.item() - math.log1p(math.exp(-lead))) > 0.01


def test_ipo_is_the_squared_distance_of_the_mean_log_ratio_from_half_its_inverse_temperature():
    tau = 0.3
    mean_w, mean_l = (-3.5 + 3.2) / 3, (-2.0 + 3.8) / 2
    scores = implicit_reward(LOGP, REF - torch.tensor([0, 0, 0, 2, 0]), LENGTHS, alpha=tau, reduction="mean")
    loss = group_preference_loss(scores, ONE_PAIR, torch.tensor([0.7]), shape="ipo", alpha=tau, flipped=0.2)
    assert loss.item() == pytest.approx(0.7 * (mean_w - mean_l - 1 / (2 * tau)) ** 2, rel=1e-6)


def test_weighted_logistic_loss_over_a_group_by_hand():
    pairs, scores = pairs_of([[0.0, 1.0, 2.0]]), torch.tensor([0.3, -1.0, 0.8])
    weights, margin = torch.tensor([0.2, 1.0, 0.5]), torch.tensor([0.1, 0.0, 0.4])
    z = (scores[pairs.better] - scores[pairs.worse] - margin).tolist()
    by_hand = sum(w * -math.log(sigmoid(x)) for w, x in zip(weights.tolist(), z, strict=True))
    loss = group_preference_loss(scores, pairs, weights, margin=margin)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_unknown_names_are_refused_with_the_known_ones():
    pairs = pairs_of([[0.0, 1.0]])
    with pytest.raises(ValueError, match="logistic, ipo, robust"):
        group_preference_loss(torch.zeros(2), pairs, torch.ones(1), shape="hinge")
    with pytest.raises(ValueError, match="hierarchical"):
        pair_weights(pairs, torch.ones(1), "margin")


@pytest.mark.parametrize("shape", ["logistic", "ipo", "robust"])
def test_no_pairs_give_a_differentiable_zero(shape):
    scores = torch.zeros(3, requires_grad=True)
    loss = group_preference_loss(scores, pairs_of([[1.0, 1.0, NAN]]), torch.ones(0), shape=shape)
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


def test_label_entropy_sums_the_bits_of_the_labels():
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    flipped = torch.tensor([0.5, 0.0, 1.0, 0.25, 0.25])
    assert preference.label_entropy(flipped).item() == pytest.approx(1 + 2 * quarter)
    assert preference.label_entropy(torch.zeros(0)).item() == 0


def test_a_perfect_model_of_doubted_labels_keeps_their_entropy_as_its_uncertainty():
    doubt = torch.tensor([0.05, 0.2, 0.5], dtype=torch.float64)
    scores = torch.cat([torch.logit(1 - doubt), torch.zeros(3, dtype=torch.float64)])
    pairs = Pairs(torch.arange(3), torch.arange(3, 6), torch.ones(3))
    uncertainty, count = preference.preference_uncertainty(scores, pairs)
    assert count == 3
    torch.testing.assert_close(uncertainty, preference.label_entropy(doubt))


def test_a_confidence_of_one_is_never_flipped_and_none_is_a_coin_toss():
    confidence = torch.tensor([1.0, 0.0, 0.6], requires_grad=True)
    flipped = preference.flip_probability(confidence)
    assert flipped.tolist() == pytest.approx([0.0, 0.5, 0.2]) and not flipped.requires_grad
    p = torch.tensor([0.8])
    margin = torch.logit(p)  # annotators who are right with p
    assert preference.flip_probability(preference.confidence_from_margin(margin, 1.0)).item() == pytest.approx(0.2)

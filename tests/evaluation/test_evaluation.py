"""What held-out measurements say, against closed forms and pairs counted by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, engine_of

from agrpo.config import EvaluationConfig
from agrpo.engine.backends.native import Sampling
from agrpo.evaluation.intervals import bootstrap_interval
from agrpo.evaluation.policy import evaluate_policy
from agrpo.evaluation.preferences import HEURISTICS, calibration_error, evaluate_scores
from agrpo.types import PreferenceGroup, Prompt
from reward_models.compose import RewardSet


@pytest.mark.parametrize(("n", "passes"), [(400, 120), (1000, 900)])
def test_the_interval_of_a_share_is_the_binomials(n, passes):
    values = [1.0] * passes + [0.0] * (n - passes)
    share = passes / n
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.15 * half)
    assert bootstrap_interval(values) == (low, high)
    inner = bootstrap_interval(values, level=0.5)
    assert inner == pytest.approx((share - 0.344 * half, share + 0.344 * half), abs=0.15 * half)


def test_an_interval_of_equal_values_has_no_width_and_of_none_does_not_exist():
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


def group(completions, levels):
    return PreferenceGroup("p", tuple(completions), tuple(levels), (), None, {})


GROUPS = [group(["aa", "b\nb", "<x>c"], [2, 1, 0]), group(["long answer", "no"], [0, 1]), group(["d", "e"], [1, 1])]
# Pairs (better, worse): (0, 1) gap 1, (0, 2) gap 2, (1, 2) gap 1, (4, 3) gap 1. The tie of the last group is none.
SCORES = torch.tensor([1.0, 1.0, 0.5, 2.0, -1.0, 9.0, -9.0])


def test_pairwise_accuracy_counts_ties_as_half():
    measured = evaluate_scores(SCORES, GROUPS)
    assert measured.pairs == 4
    assert measured.accuracy == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert measured.by_gap == pytest.approx({1: (0.5 + 1 + 0) / 3, 2: 1.0})
    leads = [0.0, 0.5, 0.5, -3.0]
    squares = [(1 - 1 / (1 + math.exp(-lead))) ** 2 for lead in leads]
    assert measured.brier == pytest.approx(sum(squares) / 4)


def test_the_heuristics_are_measured_on_the_same_pairs():
    found = evaluate_scores(SCORES, GROUPS).heuristics
    assert found.keys() == HEURISTICS.keys()
    # lengths: aa 2, b⏎b 3, <x>c 4; long answer 11, no 2
    assert found["longer"] == 0 and found["shorter"] == 1
    assert found["formatted"] == pytest.approx((0.5 + 0 + 0 + 0.5) / 4)
    assert found["more lines"] == pytest.approx((0 + 0.5 + 1 + 0.5) / 4)


def test_a_model_that_knows_no_more_than_a_heuristic_is_told_so():
    measured = evaluate_scores(SCORES, GROUPS)
    assert measured.best_heuristic == ("shorter", 1.0)
    assert "best heuristic (shorter) 1.000" in measured.in_words() and "learned nothing" in measured.in_words()
    better = evaluate_scores(torch.tensor([2.0, 1.0, 0.0]), [group(["a", "bb", "c"], [2, 1, 0])])
    assert better.accuracy == 1 and "learned nothing" not in better.in_words()
    assert {"pairwise_accuracy", "best_heuristic", "pairs"} <= better.summary().keys()
    with pytest.raises(ValueError, match="no pair"):
        evaluate_scores(torch.zeros(2), GROUPS[2:])


@pytest.mark.parametrize(
    ("markup", "count"),
    [("<think>a</think>", 2), ("# Title\n- one\n2. two", 3), ("**b**", 2), (r"\boxed{3}", 1), ("3 < 4 and 5 > 2", 0)],
)
def test_markup_is_seen(markup, count):
    assert HEURISTICS["formatted"](markup) == count


def test_calibration_is_perfect_where_confidence_is_frequency():
    assert calibration_error(torch.tensor([0.8] * 8 + [0.2] * 2, dtype=torch.float64)) == pytest.approx(0, abs=1e-9)
    assert calibration_error(torch.full((7,), 0.5)) == 0
    assert calibration_error(torch.ones(7)) == 0
    assert calibration_error(torch.zeros(7)) == 1
    assert calibration_error(torch.tensor([0.9] * 5 + [0.1] * 5).double()) == pytest.approx(0.4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.randoms())
def test_calibration_error_is_a_share_and_knows_no_order(values, random):
    error = calibration_error(torch.tensor(values, dtype=torch.float64))
    shuffled = random.sample(values, len(values))
    assert -1e-12 <= error <= 1 + 1e-12
    assert calibration_error(torch.tensor(shuffled, dtype=torch.float64)) == pytest.approx(error, abs=1e-12)


def test_pass_rates_are_those_of_the_completions():
    torch.manual_seed(0)
    lm = FAMILIES["llama-untied"]()
    torch.nn.init.normal_(lm.lm_head.weight, std=0.5)  # the temperature matters
    engine = engine_of(lm)
    prompts = [Prompt(f"p{n}", (3 + n, 4), n, {"limit": 3 * n}) for n in range(5)]  # none passes on the first

    def short(prompts, completions, completion_ids, *, limit, **columns):
        return [
            None if len(ids) == 12 else float(len(ids) <= most) for ids, most in zip(completion_ids, limit, strict=True)
        ]

    config = EvaluationConfig(samples=6, temperature=2.0, max_completion_length=12)
    engine.stop = list(range(1, 12))
    engine._backend.stop = torch.arange(1, 12)  # many end tokens: completions of many lengths
    measured = evaluate_policy(engine, prompts, RewardSet([("short", short, 1.0)]), config, seed=4)

    key = (4, 1 << 31)
    sampled = engine.generate(prompts, [6] * 5, Sampling(12, 2.0), key)
    greedy = engine.generate(prompts, [1] * 5, Sampling(12, greedy=True), key)
    passes = [[length < 12 and length <= 3 * n for length in sampled.lengths[6 * n : 6 * n + 6]] for n in range(5)]
    assert [r.passes for r in measured.results] == [sum(p) for p in passes]
    assert measured.pass1 == pytest.approx(sum(map(sum, passes)) / 30)
    assert measured.pass_k == sum(map(any, passes)) / 5
    assert measured.mixed == sum(any(p) and not all(p) for p in passes) / 5
    assert measured.greedy == sum(n < 12 and n <= 3 * i for i, n in enumerate(greedy.lengths.tolist())) / 5
    assert measured.mean_length == pytest.approx(sampled.lengths.float().mean().item())
    assert measured.clipped == pytest.approx(1 - sampled.finished.float().mean().item())
    assert 0 < measured.pass1 < 1 and 0 < measured.clipped < 1 and measured.mixed > 0
    assert measured.interval[0] <= measured.pass1 <= measured.interval[1]
    assert set(measured.summary()) >= {"test_pass1", "test_pass6", "test_greedy", "mean_length"}

"""Intervals, tests and power against SciPy's own, enumeration and closed forms."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

scipy_stats = pytest.importorskip("scipy.stats")

from agrpo.ablation.claims import CONFIRMED, REFUTED, UNDECIDED, judge, number_of  # noqa: E402
from agrpo.ablation.grid import Claim  # noqa: E402
from agrpo.ablation.statistics import (  # noqa: E402
    Estimate,
    contrast,
    detectable,
    holm,
    power,
    sign_flip_p,
    t_interval,
)

VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=8).filter(
    lambda values: max(values) - min(values) > 0.01
)


@given(VALUES)
def test_interval_and_p_are_scipys(values):
    theirs = scipy_stats.ttest_1samp(values, 0.0)
    low, high = theirs.confidence_interval(0.95)
    ours = contrast(values)
    assert ours.estimate.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert (ours.estimate.low, ours.estimate.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    assert ours.p_t == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (ours.p_t < 0.05) == (ours.estimate.low > 0 or ours.estimate.high < 0)


def test_interval_of_three_by_hand():
    # Mean 2, deviation 1, t(0.975, 2) = 4.302653.
    e = t_interval([1.0, 2.0, 3.0])
    assert (e.mean, e.half_width, e.n) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6), 3)


def test_one_seed_has_no_interval_and_no_p():
    found = contrast([0.3])
    assert found.estimate.mean == 0.3
    assert math.isnan(found.estimate.low) and math.isnan(found.p_t) and not found.significant
    assert found.p_signs == 1.0
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_equal_differences_have_no_spread():
    assert contrast([0.0, 0.0, 0.0]).p_t == 1.0
    assert contrast([0.25, 0.25, 0.25]).p_t == 0.0


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_sign_flips_of_one_direction_reach_their_floor(n):
    assert sign_flip_p([0.1 * (i + 1) for i in range(n)]) == 2 / 2**n


def test_sign_flips_by_hand():
    # Sums of ±1 ± 2 ± 4 are ±7, ±5, ±3, ±1; the observed one is 3: six of eight are as far.
    assert sign_flip_p([1.0, -2.0, 4.0]) == 6 / 8
    assert sign_flip_p([1.0, -1.0]) == 1.0
    with pytest.raises(ValueError, match="enumerates"):
        sign_flip_p([1.0] * 17)


@given(VALUES)
def test_sign_flips_are_scipys_permutation_test(values):
    theirs = scipy_stats.permutation_test(
        (values,), lambda x: abs(sum(x)), permutation_type="samples", alternative="greater", n_resamples=1000
    )
    assert sign_flip_p(values) == pytest.approx(theirs.pvalue)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1; never below the one before.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    found = holm([0.01, math.nan])
    assert found[0] == 0.01 and math.isnan(found[1])


@pytest.mark.parametrize(("n", "effect"), [(3, 3.264), (5, 1.682), (20, 0.660)])
def test_power_is_the_noncentral_ts(n, effect):
    critical = scipy_stats.t.ppf(0.975, n - 1)
    assert power(effect, n) == pytest.approx(scipy_stats.nct.sf(critical, n - 1, effect * math.sqrt(n)), abs=1e-4)
    assert detectable(n) == pytest.approx(effect, abs=1e-3)


def test_power_without_an_effect_is_the_level():
    assert power(0.0, 4) == pytest.approx(0.05, abs=1e-6)
    assert detectable(1) == math.inf


def test_intervals_of_three_seeds_cover_the_truth_19_times_in_20():
    draw = random.Random(0)
    covered = [e.low < 5 < e.high for e in (t_interval([draw.gauss(5, 2) for _ in range(3)]) for _ in range(4000))]
    assert abs(sum(covered) / len(covered) - 0.95) < 0.01


LOWER = Claim(text="lower", measure="kl", band=(None, 0.0))
BAND = Claim(text="falls by 73%", measure="advantage_variance", compared="ratio", band=(-0.83, -0.63))


@pytest.mark.parametrize(
    ("claim", "interval", "verdict"),
    [
        (LOWER, (-3.0, -1.0), CONFIRMED),
        (LOWER, (1.0, 3.0), REFUTED),
        (LOWER, (-1.0, 3.0), UNDECIDED),
        (LOWER, (0.0, 3.0), UNDECIDED),
        (LOWER, (-3.0, 0.0), UNDECIDED),
        (BAND, (-0.80, -0.70), CONFIRMED),
        (BAND, (-0.60, -0.10), REFUTED),
        (BAND, (-0.95, -0.90), REFUTED),
        (BAND, (-0.80, -0.50), UNDECIDED),
        (BAND, (-0.99, 0.50), UNDECIDED),
        (BAND, (math.nan, math.nan), UNDECIDED),
    ],
)
def test_verdicts(claim, interval, verdict):
    low, high = interval
    assert judge(claim, Estimate((low + high) / 2, low, high, 3)).verdict == verdict


def test_a_number_that_does_not_exist_decides_nothing():
    assert judge(BAND, None).verdict == UNDECIDED
    assert number_of(BAND, [0.0, 1.0], [1.0, 1.0], [], []) is None


def test_numbers_of_claims():
    base, ours, started, ended = [1.0, 2.0, 4.0], [0.25, 0.5, 1.0], [2.0, 2.0], [1.0, 1.0]
    assert number_of(LOWER, base, ours, [], []).mean == pytest.approx(-1.75)
    ratio = number_of(BAND, base, ours, started, ended)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((-0.75, -0.75, -0.75))
    kept = Claim(text="kept", measure="entropy", compared="kept", band=(-0.5, None))
    assert number_of(kept, base, ours, started, ended).mean == pytest.approx(-0.5)
    # Of ratios in their logarithms: a halving and a doubling are as far from no change.
    even = number_of(BAND, [1.0, 1.0], [0.5, 2.0], [], [])
    assert even.mean == pytest.approx(0.0)
    assert (1 + even.low) * (1 + even.high) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"band": (None, None)}, "no end at all"),
        ({"band": (1.0, 0.0)}, "lower end first"),
        ({"measure": "reward", "compared": "kept", "band": (0, None)}, "no reward"),
    ],
)
def test_claims_that_say_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Claim(**{"text": "x", "measure": "kl", **values})

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agrpo.algorithms.grouping import kept_of, neyman_allocation, pass_deviation

deviation = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.01, 3))


def summed_variance(deviations, counts):
    return sum(s * s / n for s, n in zip(deviations, counts, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    deviations=st.lists(deviation, min_size=1, max_size=4),
    least=st.integers(1, 3),
    room=st.integers(0, 4),
    extra=st.integers(0, 18),
)
@example(deviations=[1.0, 0.3], least=1, room=4, extra=4)
@example(deviations=[0.3, 1.0, 0.3], least=1, room=4, extra=4)
def test_no_other_allocation_of_the_budget_has_less_variance(deviations, least, room, extra):
    prompts, most = len(deviations), least + room
    counts = neyman_allocation(deviations, prompts * least + extra, least, most)
    spent = min(prompts * least + extra, prompts * most)
    every = (c for c in itertools.product(range(least, most + 1), repeat=prompts) if sum(c) == spent)
    assert sum(counts) == spent and all(least <= n <= most for n in counts)
    assert summed_variance(deviations, counts) <= min(summed_variance(deviations, c) for c in every) * (1 + 1e-12)


def test_a_large_budget_is_shared_in_proportion_to_the_deviations():
    deviations = [0.5, 0.1, 0.3, 0.433]
    counts = neyman_allocation(deviations, 10_000, 2, 10_000)
    for s, n in zip(deviations, counts, strict=True):
        assert n == pytest.approx(10_000 * s / sum(deviations), abs=2)


def test_what_a_full_prompt_cannot_take_goes_to_the_others():
    assert neyman_allocation([9.0, 1.0, 1.0], 20, 2, 8) == [8, 6, 6]


def test_ties_go_to_the_smaller_group_then_to_the_earlier_prompt():
    assert neyman_allocation([0.4] * 4, 10, 2, 8) == [3, 3, 2, 2]
    assert neyman_allocation([0.0, 0.0, 0.0], 8, 1, 8) == [3, 3, 2]


def test_prompts_without_deviation_are_served_last():
    assert neyman_allocation([0.0, 0.2, 0.0], 9, 2, 5) == [2, 5, 2]
    assert neyman_allocation([0.0, 0.2, 0.0], 11, 2, 5) == [3, 5, 3]


def test_no_prompts_need_no_budget():
    assert neyman_allocation([], 5, 1, 2) == []


@pytest.mark.parametrize(
    ("budget", "least", "most", "what"),
    [(8, 3, 2, "least ≤ most"), (8, 0, 2, "1 ≤ least"), (5, 3, 4, "budget of 5 completions cannot give 2 prompts 3")],
)
def test_impossible_bounds_are_refused(budget, least, most, what):
    with pytest.raises(ValueError, match=what):
        neyman_allocation([1.0, 1.0], budget, least, most)


@pytest.mark.parametrize("prior", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("passes", "count"), [(0, 0), (0, 2), (2, 2), (3, 8), (40, 50)])
def test_pass_deviation_is_that_of_the_posterior_mean_by_quadrature(passes, count, prior):
    """The Beta posterior ∝ p^(k + a − 1)·(1 − p)^(n − k + a − 1), averaged over p = sin²θ, smooth at both ends."""
    mass = mean = 0.0
    for step in range(4000):
        theta = (step + 0.5) / 4000 * math.pi / 2
        p = math.sin(theta) ** 2
        weight = p ** (passes + prior - 0.5) * (1 - p) ** (count - passes + prior - 0.5)
        mass, mean = mass + weight, mean + weight * p
    p = mean / mass
    assert pass_deviation(passes, count, prior) == pytest.approx(math.sqrt(p * (1 - p)), rel=1e-6)


def test_agreeing_pilots_stay_open_and_a_draw_is_the_most_uncertain():
    assert 0 < pass_deviation(0, 1000) < pass_deviation(0, 2) < pass_deviation(1, 2) == 0.5
    assert pass_deviation(0, 2) == pass_deviation(2, 2)


@pytest.mark.parametrize("prior", [0.0, -1.0, math.nan])
def test_a_prior_that_closes_agreeing_pilots_is_refused(prior):
    with pytest.raises(ValueError, match="prior"):
        pass_deviation(1, 2, prior)


def test_kept_is_the_exact_ceiling_of_what_the_rate_leaves():
    for size, percent in itertools.product(range(130), range(100)):
        assert kept_of(size, percent / 100) == math.ceil((100 - percent) * size / Fraction(100))


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_rates_that_keep_nothing_are_refused(rate):
    with pytest.raises(ValueError, match="rate"):
        kept_of(4, rate)


def test_it_needs_no_torch():
    check = "import sys, agrpo.algorithms.grouping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0

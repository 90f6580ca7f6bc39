import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms.controllers import (
    AdaptiveBeta,
    AdaptiveEntropy,
    AdaptiveEpsilon,
    AdaptiveLambda,
    Fixed,
    check_beta_gain,
)

TARGET = 0.02
BUILDERS = {
    "fixed": lambda: Fixed(0.3),
    "beta": lambda: AdaptiveBeta(target=TARGET),
    "epsilon": lambda: AdaptiveEpsilon(),
    "lambda": lambda: AdaptiveLambda(target=0.7),
    "entropy": lambda: AdaptiveEntropy(),
}
every = pytest.mark.parametrize("name", BUILDERS)
adaptive = pytest.mark.parametrize("name", ["beta", "epsilon", "lambda", "entropy"])
anything = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60)


@adaptive
@settings(max_examples=80, deadline=None)
@given(observations=anything)
def test_no_sequence_moves_a_controller_out_of_its_bounds(name, observations):
    controller = BUILDERS[name]()
    for x in observations:
        controller.observe(x)
        low, high = controller.bounds
        assert low <= controller.value <= high  # false for NaN


@every
@settings(max_examples=40, deadline=None)
@given(before=anything, after=anything)
def test_a_restored_controller_continues_as_the_uninterrupted_one(name, before, after):
    uninterrupted, resumed = BUILDERS[name](), BUILDERS[name]()
    for x in before:
        uninterrupted.observe(x)
    resumed.load_state_dict(uninterrupted.state_dict())
    for x in after:
        uninterrupted.observe(x)
        resumed.observe(x)
    assert resumed.state_dict() == uninterrupted.state_dict()


@adaptive
def test_unusable_observations_hold_the_value_and_are_counted(name):
    controller, clean = BUILDERS[name](), BUILDERS[name]()
    for x in (0.5, 0.9, 0.4):
        for bad in (math.nan, math.inf, -math.inf):
            controller.observe(bad)
        controller.observe(x)
        clean.observe(x)
    assert controller.value == clean.value != BUILDERS[name]().value
    assert controller.state_dict() == clean.state_dict() | {"ignored": 9}


@adaptive
def test_saturation_does_not_wind_up(name):
    """After a long time at a bound, as many steps lead away from it as from a controller that just arrived there."""
    controller = BUILDERS[name]()
    upwards = {"beta": 10 * TARGET, "epsilon": 0.0, "lambda": 1.0, "entropy": 0.0}[name]
    for _ in range(5000):
        controller.observe(upwards)
    assert controller.value == controller.bounds[1]
    for _ in range(60):
        controller.observe({"beta": 0.0, "epsilon": 1.0, "lambda": 0.0, "entropy": 1.0}[name])
    assert controller.value < controller.bounds[1] * 0.9


def test_fixed_does_not_move():
    controller = Fixed(0.3)
    for x in (0.0, 1e9, math.nan):
        controller.observe(x)
    assert controller.value == 0.3


def test_beta_waits_for_the_divergence_to_arrive_and_then_follows_it():
    controller = AdaptiveBeta(target=TARGET)
    for _ in range(500):
        controller.observe(0.3 * TARGET)
    assert controller.value == 0.04
    for _ in range(100):
        controller.observe(0.6 * TARGET)
    assert controller.value < 0.04  # arrived, but below the target: let go
    for _ in range(200):
        controller.observe(0.3 * TARGET)
    assert controller.value < 0.01  # once released it does not wait again


def test_beta_average_is_bias_corrected():
    """The first observation counts in full: at twice the target the step is e^k at once, as at every later one."""
    controller = AdaptiveBeta(target=TARGET)
    for step in range(1, 6):
        controller.observe(2 * TARGET)
        assert controller.value == pytest.approx(0.04 * math.exp(0.02 * step))


# How each observation follows its coefficient once the policy has caught up. A penalised optimum is tilted by A/β and
# its divergence is the square of that, as an update's is of the clip range; the bonus raises the entropy by degrees;
# a larger λ makes the pairs easier to tell apart. Each has its target inside the controller's bounds.
PLANTS = {
    "beta": lambda beta: (0.02 / beta) ** 2,
    "epsilon": lambda epsilon: epsilon**2 / 16,
    "lambda": lambda lambda_: 0.95 - 0.8 * lambda_,
    "entropy": lambda eta: 0.3 * (eta / 0.004) ** 0.5,
}


def settled(name, controller, plant_lag, steps=3000):
    """Largest |log(observed/target)| over the last quarter; the plant needs `plant_lag` steps to follow."""
    observed, late = 0.0, []
    for step in range(steps):
        observed += (PLANTS[name](controller.value) - observed) / plant_lag
        controller.observe(observed)
        if step > 0.75 * steps:
            late.append(abs(math.log(observed / controller.target)))
    low, high = controller.bounds
    assert low < controller.value < high
    return max(late)


@adaptive
@pytest.mark.parametrize("plant_lag", [1, 5, 20, 50])
def test_it_settles_on_a_lagged_plant_with_its_defaults(name, plant_lag):
    assert settled(name, BUILDERS[name](), plant_lag) < 0.02


def test_beta_oscillates_at_five_times_the_gain():
    controller = AdaptiveBeta(target=TARGET)
    controller.gain = 0.1  # set past the constructor, which refuses it
    assert settled("beta", controller, 20) > 0.2


def test_check_beta_gain_names_the_limit():
    check_beta_gain(0.02, 0.9)
    check_beta_gain(0.025, 0.9)  # the limit itself, in spite of 1 − 0.9 < 0.1 in floats
    with pytest.raises(ValueError, match=r"0\.025"):
        check_beta_gain(0.1, 0.9)
    with pytest.raises(ValueError, match="decay"):
        check_beta_gain(0.02, 1.0)
    with pytest.raises(ValueError, match="oscillate"):
        AdaptiveBeta(target=TARGET, gain=0.1)


def test_epsilon_narrows_after_large_updates_and_widens_after_small_ones():
    controller = AdaptiveEpsilon(target=0.005)
    controller.observe(0.0075)
    assert controller.value == pytest.approx(0.2 * math.exp(-0.02 * 0.5))
    controller.observe(0.0)
    assert controller.value == pytest.approx(0.2 * math.exp(0.02 * 0.5))
    for _ in range(500):
        controller.observe(1.0)
    assert controller.value == 0.1


def test_entropy_bonus_grows_below_the_target_and_shrinks_above():
    controller = AdaptiveEntropy(target=0.4, gain=0.1, value=0.01)
    controller.observe(0.3)
    assert controller.value == pytest.approx(0.01 * math.exp(0.1 * 0.25))
    controller.observe(0.5)
    assert controller.value == pytest.approx(0.01)
    controller.observe(4.0)
    assert controller.value == pytest.approx(0.01 * math.exp(-0.1))


@pytest.mark.parametrize("controller", [AdaptiveBeta, AdaptiveEpsilon, AdaptiveEntropy])
@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_a_target_that_is_not_positive_is_refused(controller, target):
    with pytest.raises(ValueError, match="target"):
        controller(target=target)


def test_lambda_ascends_on_the_violated_constraint():
    controller = AdaptiveLambda(target=0.7, gain=0.1, value=0.5)
    controller.observe(0.9)
    assert controller.value == pytest.approx(0.52)
    controller.observe(0.4)
    assert controller.value == pytest.approx(0.49)
    for _ in range(100):
        controller.observe(0.0)
    assert controller.value == 0.05


def test_a_start_outside_the_bounds_is_refused_and_a_restored_value_is_brought_inside():
    with pytest.raises(ValueError, match="bounds"):
        AdaptiveLambda(target=0.7, value=0.95)
    narrowed = AdaptiveLambda(target=0.7, bounds=(0.2, 0.6))
    narrowed.load_state_dict({"value": 0.9, "ignored": 0})
    assert narrowed.value == 0.6

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.algorithms.controllers import AdaptiveBeta, AdaptiveEpsilon, AdaptiveLambda, Fixed, check_beta_gain

TARGET = 0.02
BUILDERS = {
    "fixed": lambda: Fixed(0.3),
    "beta": lambda: AdaptiveBeta(target=TARGET),
    "epsilon": lambda: AdaptiveEpsilon(),
    "lambda": lambda: AdaptiveLambda(target=0.7),
}
every = pytest.mark.parametrize("name", BUILDERS)
adaptive = pytest.mark.parametrize("name", ["beta", "epsilon", "lambda"])
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
    high_observation = {"beta": 10 * TARGET, "epsilon": 0.0, "lambda": 1.0}[name]
    for _ in range(5000):
        controller.observe(high_observation)
    assert controller.value == controller.bounds[1]
    for _ in range(60):
        controller.observe({"beta": 0.0, "epsilon": 1.0, "lambda": 0.0}[name])
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


def settled(gain, plant_lag, steps=3000):
    """Largest |log(KL/target)| over the last quarter, on a plant whose KL follows (c/β)² with a lag.

    The square is what a penalised optimum does (the tilt is A/β and the KL its square); the lag is how many steps the
    policy needs to get there.
    """
    controller, divergence, late = AdaptiveBeta(target=TARGET), 0.0, []
    controller.gain = gain  # set past the constructor, which refuses an unstable one
    for step in range(steps):
        divergence += ((0.02 / controller.value) ** 2 - divergence) / plant_lag
        controller.observe(divergence)
        if step > 0.75 * steps:
            late.append(abs(math.log(divergence / TARGET)))
    return max(late)


@pytest.mark.parametrize("plant_lag", [1, 5, 20, 50])
def test_beta_settles_on_a_lagged_plant_with_its_defaults(plant_lag):
    assert settled(AdaptiveBeta(target=TARGET).gain, plant_lag) < 0.02


def test_beta_oscillates_at_five_times_the_gain():
    assert settled(0.1, 20) > 0.2


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

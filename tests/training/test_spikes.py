"""What stands out of the steps before is told, and ordinary noise is not."""

import math
import random

from agrpo.training.spikes import Spikes


def told(values):
    spikes = Spikes()
    return [step for step, value in enumerate(values) if list(spikes.observe(step, {"loss": value}))]


def test_a_spike_is_told_once_and_at_its_step():
    noise = random.Random(0)
    values = [1.0 + noise.gauss(0, 0.05) for _ in range(60)]
    values[40] = 6.0
    assert told(values) == [40]


def test_noise_trends_and_rare_signals_are_not_spikes():
    noise = random.Random(1)
    assert told([noise.gauss(0, 0.02) for _ in range(2000)]) == []
    assert told([3 * math.exp(-step / 50) + noise.gauss(0, 0.02) for step in range(500)]) == []
    assert told([2.0] * 100) == []
    assert len(told([noise.random() if noise.random() < 0.1 else 0.0 for _ in range(500)])) < 10


def test_before_half_a_window_and_of_what_is_not_finite_nothing_is_told():
    assert told([1.0, 2.0, 900.0]) == [] and told([1.0] * 20 + [math.nan, math.inf, 1.0]) == []

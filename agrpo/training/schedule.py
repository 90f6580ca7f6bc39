"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

import math

from agrpo.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Of the step that runs next, counted from 0: linear warm-up, then the configured decay to its floor."""
    warmup = max(1, round(config.warmup_ratio * config.max_steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.max_steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * shape[config.lr_scheduler_type]
        if config.lr_scheduler_type != "constant"
        else 1.0
    )

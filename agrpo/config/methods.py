"""Methods: a method is only a set of settings, laid under what the user wrote."""

from __future__ import annotations

from typing import Any

_FIXED = {"beta": {"kind": "fixed"}, "epsilon": {"kind": "fixed"}, "lambda": {"kind": "fixed", "value": 0.0}}
_GRPO = {
    "objective": {"kl": "forward", "aggregation": "sequence", "updates_per_rollout": 1},
    "advantage": {"kind": "group"},
    "controllers": _FIXED,
}
_CLIPPED = {"kl": "none", "beta": 0.0, "updates_per_rollout": 2}
METHODS: dict[str, dict[str, Any]] = {
    # A method is only a set of these settings, laid under what the user wrote.
    "agrpo": {},
    "grpo": _GRPO,
    "dr_grpo": {
        "objective": {"kl": "none", "beta": 0.0, "aggregation": "constant", "updates_per_rollout": 1},
        "advantage": {"kind": "none"},
        "controllers": _FIXED,
    },
    "dapo": {
        "objective": {**_CLIPPED, "aggregation": "token", "epsilon_high": 0.28},
        "advantage": {"kind": "group"},
        "grouping": {"kind": "dynamic"},
        "overlong": {"buffer": 0.2},
        "controllers": _FIXED,
    },
    "gspo": {
        "objective": {
            **_CLIPPED,
            "aggregation": "sequence",
            "ratio": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
        "advantage": {"kind": "group"},
        "controllers": _FIXED,
    },
    "tic_grpo": {
        "objective": {"kl": "forward", "aggregation": "sequence", "ratio": "trajectory", "updates_per_rollout": 2},
        "advantage": {"kind": "group"},
        "controllers": _FIXED,
    },
    "cppo": {**_GRPO, "pruning": {"rate": 0.5, "refill": True}},
    "gdpo": {**_GRPO, "advantage": {"kind": "gdpo"}},
    "krpo": {**_GRPO, "advantage": {"kind": "kalman_recursive"}},
    "rloo": {
        "objective": {"kl": "reverse", "aggregation": "constant", "updates_per_rollout": 1},
        "advantage": {"kind": "rloo"},
        "controllers": _FIXED,
    },
    "reinforce_pp": {
        "objective": {"kl": "reverse", "kl_in": "reward", "aggregation": "token", "updates_per_rollout": 2},
        "advantage": {"kind": "reinforce_pp"},
        "controllers": _FIXED,
    },
    "ppo": {
        "objective": {"kl": "reverse", "kl_in": "reward", "aggregation": "token", "updates_per_rollout": 4},
        "advantage": {"kind": "gae"},
        "controllers": _FIXED,
    },
}
_DPO = {"kind": "implicit", "lambda": {"kind": "fixed", "value": 1.0}}
_PAIRS = {"pair_weighting": "uniform", "implicit_reward": "sum", "alpha": 0.1}
PREFERENCE_METHODS: dict[str, dict[str, Any]] = {
    # The same for stage 2.
    "agrpo": {},
    "bradley_terry": {"objective": {"pair_weighting": "uniform"}, "lambda": {"kind": "fixed", "value": 1.0}},
    "dpo": {**_DPO, "objective": _PAIRS},
    "ipo": {**_DPO, "objective": {**_PAIRS, "loss": "ipo", "implicit_reward": "mean"}},
    "cdpo": {**_DPO, "objective": {**_PAIRS, "label_smoothing": 0.1}},
    "robust_dpo": {**_DPO, "objective": {**_PAIRS, "loss": "robust", "label_smoothing": 0.1}},
}

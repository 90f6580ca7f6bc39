"""Each finding on curves where it must be made, and on the same curves without their fault."""

import json
import re
from pathlib import Path

import pytest

from agrpo.config import STAGES
from agrpo.reporting import diagnostics
from agrpo.reporting.diagnostics import RULES, Finding, Record, diagnose
from agrpo.reporting.metrics import RunLog

STEPS = 60
BOUNDS = {"beta": [1e-4, 1.0], "epsilon": [0.1, 0.5], "lambda": [0.05, 0.9], "entropy": [1e-5, 0.1]}
CONTROLLERS = {name: {"kind": "adaptive", "bounds": bounds} for name, bounds in BOUNDS.items()}
CONTROLLERS["beta"]["target"] = 0.05
CONFIG = {
    "objective": {"updates_per_rollout": 2},
    "controllers": CONTROLLERS,
    "training": {"gradient_clipping": 1.0, "max_steps": STEPS},
    "sampling": {"max_completion_length": 64},
    "rewards": [
        {"target": "reward_models.rules.accuracy", "name": None},
        {"target": "reward_models.learned", "name": "rm"},
    ],
}


def line(first, last, noise=0.02, steps=STEPS):
    """A curve from first to last with a deterministic wobble."""
    return [
        first + (last - first) * i / (steps - 1) + noise * max(abs(first), abs(last)) * (-1) ** i for i in range(steps)
    ]


HEALTHY = {
    "sft": {"loss": line(2.0, 0.5), "grad_norm": line(0.5, 0.4), "evaluation/loss": [1.5, 1.0, 0.8]},
    "reward": {
        "loss": line(0.7, 0.3),
        "accuracy": line(0.5, 0.85),
        "evaluation/pairwise_accuracy": [0.7, 0.82],
        "grad_norm": line(0.5, 0.4),
    },
    "agrpo": {
        "agrpo/policy_loss": line(-0.5, -0.4),
        "grad_norm": line(0.5, 0.4),
        "reward": line(0.3, 0.7),
        "entropy": line(0.5, 0.4),
        "agrpo/beta": line(0.04, 0.06),
        "agrpo/epsilon": line(0.2, 0.3),
        "agrpo/lambda": line(0.1, 0.3),
        "agrpo/entropy_coef": line(0.01, 0.02),
        "completions/mean_length": line(20, 35),
        "completions/clipped_ratio": line(0.1, 0.05),
        "frac_reward_zero_std": line(0.1, 0.5),
        "agrpo/kl_symmetric": line(0.001, 0.05),
        "agrpo/effective_sample_size": line(0.99, 0.9),
        "clip_ratio/region_mean": line(0.01, 0.02),
        "reward/errors": [0.0] * STEPS,
        "agrpo/skipped_steps": [0.0] * STEPS,
        "rewards/accuracy/mean": line(0.3, 0.6),
        "rewards/rm/mean": line(1, 3),
        "throughput/completion_tokens_per_s": line(900, 850),
        "evaluation/pass1": [0.3, 0.5, 0.6],
    },
}
SPIKED = line(0.5, 0.4)
SPIKED[40] = 30.0
HELD = [0.5] * (STEPS - 40)
# rule's key → the stage, and what differs from the healthy run
FAULTS = {
    "skipped-steps": ("agrpo", {"agrpo/skipped_steps": [0.0] * 50 + [2.0] * 10}),
    "no-gradient": ("agrpo", {"grad_norm": line(0.5, 0.4)[:50] + [0.0] * 10}),
    "gradient-clipped": ("agrpo", {"grad_norm": line(8.0, 9.0)}),
    "gradient-norm-spikes": ("agrpo", {"grad_norm": SPIKED}),
    "loss-spikes": ("sft", {"loss": SPIKED}),
    "slower": ("agrpo", {"throughput/completion_tokens_per_s": line(900, 880)[:30] + [300.0] * 30}),
    "small-loss": ("agrpo", {"agrpo/policy_loss": line(-0.01, 0.01)}),
    "epsilon-inert": ("agrpo", {}, {"objective": {"updates_per_rollout": 1}}),
    "beta-at-upper-bound": ("agrpo", {"agrpo/beta": HELD + [1.0] * 40}),
    "beta-at-lower-bound": ("agrpo", {"agrpo/beta": HELD + [1e-4] * 40}),
    "epsilon-at-upper-bound": ("agrpo", {"agrpo/epsilon": HELD[:-1] + [0.5] * 41}),
    "epsilon-at-lower-bound": ("agrpo", {"agrpo/epsilon": HELD + [0.1] * 40}),
    "lambda-at-upper-bound": ("agrpo", {"agrpo/lambda": HELD + [0.9] * 40}),
    "entropy-at-upper-bound": ("agrpo", {"agrpo/entropy_coef": HELD + [0.1] * 40}),
    "silent-groups": ("agrpo", {"frac_reward_zero_std": line(0.1, 0.97)}),
    "entropy-fell": ("agrpo", {"entropy": line(0.5, 0.02)}),
    "length-explodes": ("agrpo", {"completions/mean_length": line(20, 80)}),
    "length-grows": ("agrpo", {"completions/mean_length": line(20, 80), "reward": line(0.5, 0.5)}),
    "length-collapses": ("agrpo", {"completions/mean_length": line(60, 10)}),
    "kl-explodes": ("agrpo", {"agrpo/kl_symmetric": line(0.001, 1.4)}),
    "truncated": ("agrpo", {"completions/clipped_ratio": line(0.1, 0.6)}),
    "effective-sample-size": ("agrpo", {"agrpo/effective_sample_size": line(0.9, 0.2)}),
    "tokens-clipped": ("agrpo", {"clip_ratio/region_mean": line(0.01, 0.4)}),
    "reward-errors": ("agrpo", {"reward/errors": [0.0] * 30 + [3.0] * 2 + [0.0] * 28}),
    "reward-flat": ("agrpo", {"reward": line(0.4, 0.4)}),
    "reward-fell": ("agrpo", {"reward": line(0.6, 0.2)}),
    "reward-hacking": ("agrpo", {"rewards/accuracy/mean": line(0.6, 0.3)}),
    "evaluation-falls": ("agrpo", {"evaluation/pass1": [0.5, 0.6, 0.4]}),
    "overfits": ("sft", {"evaluation/loss": [1.0, 0.8, 1.1]}),
    "at-chance": ("reward", {"accuracy": line(0.5, 0.51), "evaluation/pairwise_accuracy": [0.5, 0.51]}),
    "memorises": ("reward", {"accuracy": line(0.5, 0.99), "evaluation/pairwise_accuracy": [0.6, 0.7]}),
}  # fmt: skip


def record(stage, changed=None, config=None):
    curves = {**HEALTHY[stage], **(changed or {})}
    series = {name: (list(range(1, len(values) + 1)), values) for name, values in curves.items()}
    return Record(series, {**CONFIG, **(config or {})}, STEPS)


@pytest.mark.parametrize("stage", HEALTHY)
def test_a_healthy_run_has_nothing_to_say(stage):
    assert diagnose(stage, record(stage)) == []


@pytest.mark.parametrize("key", FAULTS)
def test_a_fault_is_found_and_named(key):
    stage, *changes = FAULTS[key]
    found = {finding.key: finding for finding in diagnose(stage, record(stage, *changes))}
    assert key in found
    assert found[key].advice and (re.search(r"\d", found[key].text) or key == "epsilon-inert"), "evidence in numbers"


def test_every_rule_has_a_fault_here():
    """The keys that the source can make are the keys above."""
    source = Path(diagnostics.__file__).read_text(encoding="utf-8")
    made = set(re.findall(r'Finding\(\s*"([a-z-]+)"', source))
    made |= set(re.findall(r'"(length-explodes)" if rises else "(length-grows)"', source)[0])
    made |= {"gradient-norm-spikes", "loss-spikes"}
    made |= {f"{name}-at-{which}-bound" for name, which in diagnostics._BOUNDS}
    assert made == FAULTS.keys()


@pytest.mark.parametrize("stage", RULES)
@pytest.mark.parametrize("values", [[], [0.0], [0.0] * 200, [1e30] * 12], ids=["none", "one", "zeros", "huge"])
def test_strange_curves_break_no_rule(stage, values):
    names = {name for curves in HEALTHY.values() for name in curves}
    series = {name: (list(range(1, len(values) + 1)), values) for name in names}
    for config in ({}, CONFIG):
        assert all(isinstance(finding, Finding) for finding in diagnose(stage, Record(series, config, 10)))


def test_a_solved_task_is_no_warning():
    solved = {"frac_reward_zero_std": line(0.1, 0.97), "entropy": line(0.5, 0.02), "evaluation/pass1": [0.6, 0.97]}
    assert {f.key: f.severity for f in diagnose("agrpo", record("agrpo", solved))} == {
        "silent-groups": "note", "entropy-fell": "note",
    }  # fmt: skip


def test_settings_that_advice_names_exist():
    """Every dotted key in a text is a key of the stage's configuration."""
    schema = json.dumps({stage: STAGES[stage].model_json_schema() for stage in RULES})
    sections = "training|objective|controllers|sampling|grouping|overlong|rollout|pruning"
    for key, (stage, *changes) in FAULTS.items():
        for finding in diagnose(stage, record(stage, *changes)):
            for path in re.findall(rf"\b(?:{sections})(?:\.\w+)+", f"{finding.advice} {finding.text}"):
                for part in path.split("."):
                    assert f'"{part}"' in schema, f"{key}: {path}"


def test_the_log_says_a_finding_once_and_again_at_the_end(tmp_path):
    def run(first, last):
        with RunLog(tmp_path / "agrpo", "agrpo", STEPS, first_step=first, console=False, config=CONFIG) as log:
            for step in range(first, last):
                log.step(step, {"frac_reward_zero_std": 0.95, "reward": 0.5})

    run(0, 40)
    run(40, STEPS)  # resumed: what was said is not said again
    lines = [
        text for text in (tmp_path / "agrpo" / "log.txt").read_text().splitlines() if "rewards are all equal" in text
    ]
    assert len(lines) == 2
    assert re.search(r"step \d+: warning: rewards are all equal in 95% of groups.*num_generations", lines[0])
    assert "at the end: warning: rewards are all equal in 95% of groups" in lines[1]

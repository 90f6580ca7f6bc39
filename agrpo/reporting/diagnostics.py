"""What a run's numbers mean, in words: findings with their evidence and what to try.

A rule is a pure function of what was recorded and of the configuration; it returns a Finding, or None. The thresholds
are rules of thumb, named at the top and shown in each text beside the number that crossed them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agrpo.reporting.files import Series

PROBLEM, WARNING, NOTE = "problem", "warning", "note"
SEVERITIES = (PROBLEM, WARNING, NOTE)

FEWEST_STEPS = 10  # nothing is said of a shorter record, except of faults
AT_BOUND_STEPS = 10
SMALL_LOSS = 0.05
SILENT_SHARE = 0.8
SOLVED_SHARE = 0.9
ENTROPY_LEFT = 0.2
LENGTH_GROWTH, LENGTH_LOSS = 2.0, 0.4
KL_OVER_TARGET, KL_LARGE = 5.0, 1.0
TRUNCATED_SHARE = 0.3
SAMPLE_SIZE = 0.5
CLIPPED_TOKENS = 0.2
SPIKE = 6.0  # deviations (1.48 × median absolute deviation) above the running median
SLOW = 0.6
SIGNIFICANT = 2.0  # standard errors that a change of a noisy curve must exceed


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing. `key` names the rule: a run says it once."""

    key: str
    severity: Literal["problem", "warning", "note"]
    text: str
    advice: str

    def in_words(self) -> str:
        return f"{self.severity}: {self.text}. {self.advice}"


@dataclass(frozen=True)
class Record:
    """What the rules see of a stage: `series` holds finite values, with their steps counted from 1."""

    series: Mapping[str, Series]
    config: Mapping[str, Any] = field(default_factory=dict)
    total_steps: int = 0

    def __getitem__(self, name: str) -> Sequence[float]:
        found = self.series.get(name)
        return found[1] if found else ()

    @property
    def steps(self) -> int:
        return max((steps[-1] for steps, _ in self.series.values() if len(steps)), default=0)

    def setting(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path of the configuration."""
        node: Any = self.config
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def ends(self, name: str) -> tuple[float, float] | None:
        """Mean over the first and over the last tenth of a series, five values at least; None where it is short."""
        values = self[name]
        if len(values) < FEWEST_STEPS:
            return None
        window = max(5, len(values) // 10)
        return statistics.fmean(values[:window]), statistics.fmean(values[-window:])

    def change(self, name: str) -> float | None:
        """The last tenth's mean minus the first's, in standard errors of that difference; None where it is short."""
        values = self[name]
        if len(values) < FEWEST_STEPS:
            return None
        window = max(5, len(values) // 10)
        first, last = values[:window], values[-window:]
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / window)
        difference = statistics.fmean(last) - statistics.fmean(first)
        if error == 0:
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / error


def diagnose(stage: str, record: Record) -> list[Finding]:
    """The findings that hold at the end of a record, the gravest first.

    Args:
        stage: sft, reward or agrpo.
    """
    found = [finding for rule in RULES[stage] for finding in rule(record)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def skipped_steps(run: Record) -> Iterator[Finding]:
    skipped = run["agrpo/skipped_steps"]
    if skipped and skipped[-1] > 0:
        yield Finding(
            "skipped-steps",
            WARNING,
            f"{skipped[-1]:.0f} optimiser steps were skipped: their loss or gradient was not finite",
            "A few are harmless. If they go on, lower training.learning_rate; with bfloat16 try float32",
        )


def no_gradient(run: Record) -> Iterator[Finding]:
    last = run["grad_norm"][-FEWEST_STEPS:]
    if len(last) == FEWEST_STEPS and max(last) < 1e-8:
        yield Finding(
            "no-gradient",
            PROBLEM,
            f"the gradient was 0 in the last {FEWEST_STEPS} steps: nothing is learned",
            "See that the rewards of a group differ (frac_reward_zero_std), and that something in the model can learn",
        )


def gradient_clipped(run: Record) -> Iterator[Finding]:
    limit, last = run.setting("training.gradient_clipping", 0), run["grad_norm"][-50:]
    if not limit or len(last) < FEWEST_STEPS:
        return
    share = sum(norm > limit for norm in last) / len(last)
    if share >= 0.8 and statistics.median(last) > 3 * limit:
        yield Finding(
            "gradient-clipped",
            NOTE,
            f"{share:.0%} of the last {len(last)} steps had their gradient clipped: median norm"
            f" {statistics.median(last):.3g} against training.gradient_clipping {limit:g}",
            "The step size is then set by the clipping. Stable, but if learning is slow raise the limit; if it is"
            " restless lower training.learning_rate",
        )


def spikes(name: str, what: str) -> Any:
    """A rule: a few steps stand far above the running median of the steps before them."""

    def rule(run: Record) -> Iterator[Finding]:
        steps, values = run.series.get(name, ((), ()))
        found = []
        for i in range(2 * FEWEST_STEPS, len(values)):
            before = values[i - 2 * FEWEST_STEPS : i]
            middle = statistics.median(before)
            spread = 1.48 * statistics.median([abs(value - middle) for value in before])
            floor = 0.5 * abs(middle) + 1e-6  # a curve that is nearly constant has no spikes of a tenth
            if values[i] - middle > max(SPIKE * spread, floor):
                found.append((values[i], steps[i], middle))
        if found and max(value for value, _, _ in found) > 0:
            worst, step, middle = max(found)
            times = f"{len(found)} spikes" if len(found) > 1 else "a spike"
            yield Finding(
                f"{what.replace(' ', '-')}-spikes",
                WARNING if len(found) > 2 else NOTE,
                f"{times} of the {what}{', the highest' if len(found) > 1 else ''} at step {step}: {worst:.3g},"
                f" where {middle:.3g} was usual",
                "Look at that step's samples. If they go on: lower training.learning_rate, lengthen"
                " training.warmup_ratio, or clip harder (training.gradient_clipping)",
            )

    return rule


def slower(run: Record) -> Iterator[Finding]:
    name = "throughput/completion_tokens_per_s"
    values = run[name]
    if len(values) < 3 * FEWEST_STEPS:
        return
    window = max(FEWEST_STEPS, len(values) // 10)
    best = max(statistics.median(values[i : i + window]) for i in range(0, len(values) - window + 1, window))
    now = statistics.median(values[-window:])
    if now < SLOW * best:
        yield Finding(
            "slower",
            WARNING,
            f"throughput fell to {now:,.0f} completion tokens a second, {now / best:.0%} of its best",
            "See which part grew (time/generate_s, time/reward_s, time/update_s), whether completions became shorter,"
            " and what else runs on the machine",
        )


def small_loss(run: Record) -> Iterator[Finding]:
    values = run["agrpo/policy_loss"]
    if len(values) >= FEWEST_STEPS and statistics.median(map(abs, values)) < SMALL_LOSS:
        yield Finding(
            "small-loss",
            NOTE,
            f"a policy loss near 0 is expected here (median {statistics.median(map(abs, values)):.2g})",
            "A group's advantages cancel and the ratio starts at 1, so the value says nothing of progress; its gradient"
            " does the work. Watch the reward and the evaluation instead",
        )


def epsilon_inert(run: Record) -> Iterator[Finding]:
    if run.setting("objective.updates_per_rollout") == 1 and run["agrpo/epsilon"]:
        yield Finding(
            "epsilon-inert",
            NOTE,
            "ε is inert: one update a rollout, so the ratio is 1 and nothing is clipped",
            "Nothing to mend. For ε to matter, set objective.updates_per_rollout to 2 or more",
        )


# At a bound: what it means and what to try. A coefficient that began there and may well stay is not in the table.
_BOUNDS = {
    ("beta", "upper"): (
        WARNING,
        "the KL divergence is above its target and β cannot rise further",
        "Lower training.learning_rate, raise controllers.beta.bounds, or allow more with controllers.beta.target",
    ),
    ("beta", "lower"): (
        NOTE,
        "the policy stays closer to the reference than it may",
        "Harmless. A lower controllers.beta.target would bring β back into play",
    ),
    ("epsilon", "upper"): (
        NOTE,
        "an update moves the policy less than its target even when hardly anything is clipped",
        "Harmless: clipping limits nothing here. training.learning_rate or objective.updates_per_rollout could rise",
    ),
    ("epsilon", "lower"): (
        WARNING,
        "an update moves the policy more than its target even at the narrowest clip range",
        "Lower training.learning_rate or objective.updates_per_rollout",
    ),
    ("lambda", "upper"): (
        NOTE,
        "the preference loss has all the weight it may have, and the pairs are still uncertain",
        "Raise controllers.lambda.target, or lower its upper bound to leave the policy loss more weight",
    ),
    ("entropy", "upper"): (
        WARNING,
        "entropy stays below its target although its weight is at the most",
        "Raise controllers.entropy.bounds, lower its target, or lower training.learning_rate",
    ),
}


def at_bounds(run: Record) -> Iterator[Finding]:
    signs = {"beta": "β", "epsilon": "ε", "lambda": "λ", "entropy": "the entropy coefficient"}
    for name, sign in signs.items():
        if run.setting(f"controllers.{name}.kind") != "adaptive":
            continue
        if name == "epsilon" and run.setting("objective.updates_per_rollout") == 1:
            continue
        values = run["agrpo/entropy_coef" if name == "entropy" else f"agrpo/{name}"]
        for which, bound in zip(("lower", "upper"), run.setting(f"controllers.{name}.bounds", ()), strict=False):
            steps = 0
            for value in reversed(values):
                if not math.isclose(value, bound, rel_tol=1e-6):
                    break
                steps += 1
            if steps >= AT_BOUND_STEPS and (name, which) in _BOUNDS:
                severity, meaning, advice = _BOUNDS[name, which]
                yield Finding(
                    f"{name}-at-{which}-bound",
                    severity,
                    f"{sign} at its {which} bound {bound:g} for {steps} steps: {meaning}",
                    advice,
                )


def _solved(run: Record) -> bool:
    checks = run["evaluation/pass1"]
    return bool(checks) and checks[-1] >= SOLVED_SHARE


def silent_groups(run: Record) -> Iterator[Finding]:
    ends = run.ends("frac_reward_zero_std")
    if ends is None or ends[1] < SILENT_SHARE:
        return
    text = f"rewards are all equal in {ends[1]:.0%} of groups, which teach nothing"
    if _solved(run):
        accuracy = run["evaluation/pass1"][-1]
        yield Finding(
            "silent-groups",
            NOTE,
            f"{text}; evaluation pass@1 is {accuracy:.1%}: the task is nearly solved",
            "Stop here, or go on with harder prompts",
        )
    else:
        yield Finding(
            "silent-groups",
            WARNING,
            text,
            "Prompts are too easy, too hard, or the reward too coarse: choose prompts the policy sometimes solves,"
            " raise sampling.num_generations, set grouping.kind: dynamic, or add a graded reward",
        )


def entropy_fell(run: Record) -> Iterator[Finding]:
    ends = run.ends("entropy")
    if ends is None or ends[0] <= 0 or ends[1] >= ENTROPY_LEFT * ends[0]:
        return
    yield Finding(
        "entropy-fell",
        NOTE if _solved(run) else WARNING,
        f"entropy fell to {ends[1]:.3g} nats a token, {ends[1] / ends[0]:.0%} of the {ends[0]:.3g} it began with: the"
        " policy says nearly the same every time",
        "Fine when the task is solved. Otherwise set controllers.entropy.kind: adaptive or objective.entropy_coef,"
        " raise objective.epsilon_high or sampling.temperature, or lower training.learning_rate",
    )


def length_moved(run: Record) -> Iterator[Finding]:
    ends = run.ends("completions/mean_length")
    if ends is None or ends[0] <= 0:
        return
    first, last = ends
    rises = (run.change("reward") or 0.0) > SIGNIFICANT
    if last >= LENGTH_GROWTH * first and last - first >= 10:
        yield Finding(
            "length-explodes" if rises else "length-grows",
            WARNING,
            f"{'reward rises while length explodes' if rises else 'length grows and the reward does not'}: from"
            f" {first:.0f} to {last:.0f} tokens",
            "Read the longest samples: reasoning or padding? Add reward_models.rules.length or overlong.buffer, or use"
            " objective.aggregation: constant (Dr. GRPO), which does not favour long completions",
        )
    elif last <= LENGTH_LOSS * first and first - last >= 5:
        yield Finding(
            "length-collapses",
            WARNING,
            f"completions shrank from {first:.0f} to {last:.0f} tokens",
            "Read some samples: a reward that short answers win, or a format that pays without the work, shows at once",
        )


def kl_explodes(run: Record) -> Iterator[Finding]:
    name = "agrpo/kl_symmetric" if run["agrpo/kl_symmetric"] else "kl"
    ends = run.ends(name)
    if ends is None:
        return
    target = run.setting("controllers.beta.target")
    steered = run.setting("controllers.beta.kind") == "adaptive" and target is not None
    limit = max(KL_OVER_TARGET * target, 0.1) if steered else KL_LARGE
    if ends[1] > limit and ends[1] > 2 * ends[0]:
        against = f"{ends[1] / target:.0f} times its target {target:g}" if steered else f"above {KL_LARGE:g}"
        yield Finding(
            "kl-explodes",
            PROBLEM,
            f"the KL divergence to the reference grew from {ends[0]:.3g} to {ends[1]:.3g} nats a token, {against}",
            "Lower training.learning_rate; raise objective.beta (controllers.beta.bounds when it adapts); read samples"
            " for text that no longer looks like language",
        )


def truncated(run: Record) -> Iterator[Finding]:
    ends = run.ends("completions/clipped_ratio")
    if ends is not None and ends[1] > TRUNCATED_SHARE:
        limit = run.setting("sampling.max_completion_length")
        yield Finding(
            "truncated",
            WARNING,
            f"{ends[1]:.0%} of completions are cut at the length limit" + (f" of {limit} tokens" if limit else ""),
            "Their answers are never seen. Raise sampling.max_completion_length, give overlong.buffer a weight, or see"
            " that the model knows its end token (chat template, sampling.stop)",
        )


def far_from_sampler(run: Record) -> Iterator[Finding]:
    ends = run.ends("agrpo/effective_sample_size")
    if ends is not None and ends[1] < SAMPLE_SIZE:
        yield Finding(
            "effective-sample-size",
            WARNING,
            f"the effective sample size is {ends[1]:.0%} of the tokens: the sampler and the policy disagree",
            "Off-policy or numerically different samples: generate in the training precision, use fresher rollouts,"
            " or use rollout.backend: native to see whether it is the backend",
        )


def tokens_clipped(run: Record) -> Iterator[Finding]:
    ends = run.ends("clip_ratio/region_mean")
    if ends is not None and ends[1] > CLIPPED_TOKENS:
        yield Finding(
            "tokens-clipped",
            WARNING,
            f"the ratio is clipped at {ends[1]:.0%} of tokens: updates go further than the clip range",
            "Lower training.learning_rate or objective.updates_per_rollout",
        )


def rewards_fail(run: Record) -> Iterator[Finding]:
    errors = run["reward/errors"]
    if sum(errors) > 0:
        yield Finding(
            "reward-errors",
            WARNING,
            f"rewards failed {sum(errors):.0f} times, in {sum(e > 0 for e in errors)} of {len(errors)} steps; those"
            " completions were scored without them",
            "Try the reward by hand on those prompts, and look at its service or its limits of time and memory",
        )


def reward_flat(run: Record) -> Iterator[Finding]:
    values, change = run["reward"], run.change("reward")
    enough = run.total_steps and run.steps >= max(30, run.total_steps // 2)
    if change is None or not enough or (values and statistics.fmean(values[-10:]) >= SOLVED_SHARE):
        return
    ends = run.ends("reward")
    if change < -SIGNIFICANT:
        yield Finding(
            "reward-fell",
            PROBLEM,
            f"the reward fell from {ends[0]:.3g} to {ends[1]:.3g} in {run.steps} steps ({change:+.1f} standard errors)",
            "Lower training.learning_rate, and see whether the KL divergence or the length went with it",
        )
    elif change <= SIGNIFICANT:
        yield Finding(
            "reward-flat",
            WARNING,
            f"the reward did not move in {run.steps} steps: {ends[0]:.3g} to {ends[1]:.3g} ({change:+.1f} SE)",
            "If most groups are all equal, change the prompts or the reward; otherwise raise training.learning_rate or"
            " sampling.num_generations",
        )


def reward_hacking(run: Record) -> Iterator[Finding]:
    """A learned reward, or the reward trained on, rises while a rule or the evaluation falls."""
    rising, rules = [], []
    for spec in run.setting("rewards", ()):
        target = str(spec.get("target", ""))
        name = spec.get("name") or target.rsplit(".", 1)[-1].rsplit(":", 1)[-1]
        (rules if target.startswith("reward_models.rules") else rising).append(f"rewards/{name}/mean")
    falling = [name for name in rules if (run.change(name) or 0.0) < -SIGNIFICANT]
    for up in rising:
        if (run.change(up) or 0.0) > SIGNIFICANT and falling:
            told = "; ".join(_from_to(run, name) for name in (up, *falling))
            yield Finding("reward-hacking", PROBLEM, f"sign of reward hacking: {told}", _HACKING)
            return
    checks = run["evaluation/pass1"]
    if len(checks) >= 2 and max(checks) - checks[-1] > 0.05 and (run.change("reward") or 0.0) > SIGNIFICANT:
        yield Finding(
            "evaluation-falls",
            PROBLEM,
            f"sign of reward hacking: {_from_to(run, 'reward')}, yet evaluation pass@1 fell from its best"
            f" {max(checks):.1%} to {checks[-1]:.1%}",
            _HACKING,
        )


_HACKING = (
    "Read samples with high reward. Go back to a checkpoint before the turn, raise objective.beta, add a rule beside"
    " the learned reward, or train the reward model on this policy's samples"
)


def _from_to(run: Record, name: str) -> str:
    first, last = run.ends(name)
    return f"{name.removesuffix('/mean')} went from {first:.3g} to {last:.3g}"


def overfits(run: Record) -> Iterator[Finding]:
    held_out = run["evaluation/loss"]
    if len(held_out) >= 3 and held_out[-1] > 1.05 * min(held_out) and (run.change("loss") or 0.0) < 0:
        steps = run.series["evaluation/loss"][0]
        best = list(held_out).index(min(held_out))
        yield Finding(
            "overfits",
            WARNING,
            f"validation loss was lowest at step {steps[best]} ({held_out[best]:.3g}) and is {held_out[-1]:.3g} now,"
            " while the training loss falls: overfitting",
            f"Stop near step {steps[best]}, add data, or lower training.learning_rate",
        )


def at_chance(run: Record) -> Iterator[Finding]:
    name = "pairwise_accuracy" if run["pairwise_accuracy"] else "accuracy"
    held_out, ends = run["evaluation/pairwise_accuracy"], run.ends(name)
    if ends is None:
        return
    measured = held_out[-1] if held_out else ends[1]
    if run.steps >= 50 and measured < 0.55:
        yield Finding(
            "at-chance",
            WARNING,
            f"pairwise accuracy is {measured:.1%}, near the 50% of guessing",
            "See that levels are the right way round, that pairs differ in what should be judged, and that the learning"
            " rate is not too low",
        )
    elif held_out and ends[1] - held_out[-1] > 0.15:
        yield Finding(
            "memorises",
            WARNING,
            f"pairwise accuracy is {ends[1]:.1%} in training and {held_out[-1]:.1%} on held-out pairs: it memorises",
            "Train for fewer steps, add pairs, or lower training.learning_rate",
        )


_EVERY = (skipped_steps, no_gradient, gradient_clipped, slower)
RULES: dict[str, tuple[Any, ...]] = {
    "sft": (*_EVERY, spikes("loss", "loss"), overfits),
    "reward": (*_EVERY, spikes("loss", "loss"), at_chance),
    "agrpo": (
        *_EVERY,
        spikes("grad_norm", "gradient norm"),
        small_loss,
        epsilon_inert,
        at_bounds,
        silent_groups,
        entropy_fell,
        length_moved,
        kl_explodes,
        truncated,
        far_from_sampler,
        tokens_clipped,
        rewards_fail,
        reward_flat,
        reward_hacking,
    ),
}

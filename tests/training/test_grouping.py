"""How completions are dealt out over prompts, on a real engine: budgets, rounds, and which random stream is whose."""

import itertools
import math
from statistics import pvariance

import pytest
import torch
from tiny import FAMILIES, engine_of, ragged

from agrpo.config import PolicyConfig
from agrpo.data.streams import Stream
from agrpo.engine.backends.native import Sampling
from agrpo.training.grouping import Sampler, deviations
from agrpo.types import Prompt
from reward_models.compose import RewardSet

SEED, STEP = 3, 11
LIMIT = 6


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    return engine_of(FAMILIES["llama-tied"]())


def data(bars):
    """Prompts whose completions pass when their first token is below the prompt's bar, of 97: 0 never, 97 always."""
    ids = ragged(2, prompts=[3 + n % 5 for n in range(len(bars))], groups=((1,),))[0]
    return [Prompt(f"p{n}", tuple(i), n, {"bar": bar}) for n, (i, bar) in enumerate(zip(ids, bars, strict=True))]


def passes(prompts, completions, completion_ids, *, bar, **columns):
    return [float(ids[0] < b) for ids, b in zip(completion_ids, bar, strict=True)]


def first_token(prompts, completions, completion_ids, *, bar, **columns):
    return [ids[0] / 97 * b for ids, b in zip(completion_ids, bar, strict=True)]


class Recorder:
    """The engine, and what it was asked for."""

    def __init__(self, engine):
        self.engine, self.rollouts = engine, []

    def generate(self, *arguments):
        self.rollouts.append(self.engine.generate(*arguments))
        return self.rollouts[-1]


def sample(engine, prompts, reward=passes, prompts_per_step=4, size=4, **sections):
    """One step's rollout, scores, metrics, and the rollouts it is made of."""
    config = PolicyConfig(
        seed=SEED,
        data={"source": "python:agrpo.data.tasks.chains:problems"},
        rewards=[{"target": "reward_models.rules.accuracy"}],
        training={"max_steps": 1},
        sampling={
            "prompts_per_step": prompts_per_step,
            "num_generations": size,
            "max_completion_length": LIMIT,
            "temperature": 3.0,
        },
        **sections,
    )
    recorder = Recorder(engine)
    stream = Stream(len(prompts), config.prompts_per_rollout, SEED)
    rollout, scores, metrics = Sampler(config, prompts, stream, RewardSet([("own", reward, 1.0)]))(recorder, STEP)
    return rollout, scores, metrics, recorder.rollouts


def completions_of(rollout):
    """(slot, tokens) of each."""
    parts = rollout.tokens.split(rollout.lengths.tolist())
    return [(rollout.prompts[p].slot, t.tolist()) for p, t in zip(rollout.group.tolist(), parts, strict=True)]


def drawn(engine, prompt, count):
    """A prompt's completions, drawn alone and at once."""
    rollout = engine.generate([prompt], [count], Sampling(LIMIT, 3.0), (SEED, STEP))
    return [tokens for _, tokens in completions_of(rollout)]


def asked(prompts, count, per_round):
    """The stream's prompts in the slots of `count` rounds."""
    stream = Stream(len(prompts), per_round, SEED)
    order = [index for _ in range(count) for _, index in next(stream)]
    return [Prompt(prompts[i].text, prompts[i].ids, slot, prompts[i].columns) for slot, i in enumerate(order)]


def rewards_of(completions, prompt, reward=passes):
    return reward(None, None, completions, bar=[prompt.columns["bar"]] * len(completions))


def test_fixed_groups_are_all_alike(engine):
    prompts = data([0, 20, 40, 60, 80, 97])
    rollout, scores, _, _ = sample(engine, prompts, pruning={"rate": 0.5, "refill": True}, prompts_per_step=2)
    wanted = asked(prompts, 1, 4)  # half will be pruned: twice the prompts
    assert list(rollout.prompts) == wanted
    assert completions_of(rollout) == [(p.slot, tokens) for p in wanted for tokens in drawn(engine, p, 4)]
    assert scores[:, 0].tolist() == [r for p in wanted for r in rewards_of(drawn(engine, p, 4), p)]


BARS = [0, 48, 10, 97, 48, 80]
ADAPTIVE = {"grouping": {"kind": "adaptive", "least": 3, "most": 8}}


def best_counts(deviation, budget, least, most):
    """Every allocation that makes Σ σ²/n least, by trying them all."""
    tried = [
        counts for counts in itertools.product(range(least, most + 1), repeat=len(deviation)) if sum(counts) == budget
    ]
    cost = {counts: sum(d**2 / n for d, n in zip(deviation, counts, strict=True)) for counts in tried}
    least_cost = min(cost.values())
    return [counts for counts, value in cost.items() if value < least_cost * (1 + 1e-9)]


def test_adaptive_groups_spend_the_budget_where_the_pilot_was_least_certain(engine):
    prompts = data(BARS)
    rollout, scores, metrics, (pilot, rest) = sample(engine, prompts, prompts_per_step=6, size=5, **ADAPTIVE)
    wanted = asked(prompts, 1, 6)
    assert list(rollout.prompts) == wanted
    passed = [sum(rewards_of(drawn(engine, p, 3), p)) for p in wanted]  # by the pilot
    assert {0, 3} < set(passed)
    share = [(count + 1) / (3 + 2) for count in passed]  # the mean of Beta(1 + passed, 1 + failed)
    counts = torch.bincount(rollout.group).tolist()
    assert len(pilot.texts) == 3 * 6 and len(rest.texts) == 2 * 6
    assert tuple(counts) in best_counts([math.sqrt(p * (1 - p)) for p in share], 5 * 6, 3, 8)
    assert (metrics["agrpo/group_size_min"], metrics["agrpo/group_size_max"]) == (min(counts), max(counts))
    assert max(counts) > min(counts)
    # The pilot's samples and the rest are those that one call with these counts draws, in that order.
    assert completions_of(rollout) == [
        (p.slot, tokens) for p, n in zip(wanted, counts, strict=True) for tokens in drawn(engine, p, n)
    ]
    expected = [r for p, n in zip(wanted, counts, strict=True) for r in rewards_of(drawn(engine, p, n), p)]
    assert scores[:, 0].tolist() == expected


def test_a_prompt_whose_rewards_scatter_more_gets_more(engine):
    prompts = data([1, 2, 4, 30, 3, 5])
    rollout, _, _, (pilot, _) = sample(engine, prompts, first_token, prompts_per_step=6, size=6, **ADAPTIVE)
    counts = torch.bincount(rollout.group).tolist()
    widest = [p.columns["bar"] for p in rollout.prompts].index(30)
    assert sum(counts) == 36 and counts[widest] == max(counts) == 8
    assert max(n for p, n in enumerate(counts) if p != widest) < 8
    assert len(pilot.texts) == 18


def test_a_pilot_that_is_the_whole_budget_is_the_step(engine):
    prompts = data(BARS)
    rollout, scores, metrics, rollouts = sample(
        engine, prompts, prompts_per_step=6, size=3, grouping={"kind": "adaptive", "least": 3, "most": 8}
    )
    assert [len(r.tokens) for r in rollouts[1:]] == [0]  # a rank with nothing left to ask for takes part all the same
    assert len(scores) == len(rollout.texts) == 18
    assert metrics["agrpo/group_size_min"] == metrics["agrpo/group_size_max"] == 3


def test_deviations_of_passes_are_of_the_pass_rates_posterior():
    for low, high in ((0.0, 1.0), (-2.5, 0.5)):
        outcomes = [[high] * 3, [low] * 4, [low, high], [high, low, low]]
        means = [4 / 5, 1 / 6, 2 / 4, 2 / 5]
        assert deviations(outcomes) == pytest.approx([math.sqrt(p * (1 - p)) for p in means])
    assert len(set(deviations([[0.5, 0.5]] * 3))) == 1  # one value everywhere: nothing tells them apart
    assert deviations([[], [1.0, 0.0]]) == pytest.approx([0.5, 0.5])  # none of its completions was scored


def test_deviations_of_scattered_rewards_are_shrunk_towards_the_batchs():
    outcomes = [[0.0, 4.0], [1.0, 1.1, 1.2], [7.0, 7.0, 7.0, 7.0], []]
    pooled = (8.0 + 0.02) / 9  # squared distances from their own means, over all completions
    expected = [(len(g) * pvariance(g) + pooled) / (len(g) + 1) for g in outcomes[:3]]
    found = deviations(outcomes)
    assert found == pytest.approx([math.sqrt(v) for v in [*expected, pooled]])
    assert found[0] > found[3] > found[1] > found[2] > 0
    shifted = [[3.0 * r - 50.0 * n for r in g] for n, g in enumerate(outcomes)]
    assert deviations(shifted) == pytest.approx([3 * d for d in found])


def dynamic(engine, bars, wanted=3, size=4, rounds=4, prompts=None):
    prompts = prompts or data(bars)
    grouping = {"kind": "dynamic", "max_rounds": rounds}
    return prompts, sample(engine, prompts, prompts_per_step=wanted, size=size, grouping=grouping)


def groups_that_differ(engine, slots, size=4):
    """Slots whose completions do not all have the same reward, in order, each drawn alone."""
    return [p.slot for p in slots if len(set(rewards_of(drawn(engine, p, size), p))) > 1]


SOME = [0, 97, 40, 50, 97, 0, 60, 97, 0, 45, 50, 40, 40, 97, 0]  # half of the prompts can differ
MANY = [40] * 9


@pytest.mark.parametrize("bars", [SOME, MANY], ids=["some", "many"])
def test_dynamic_rounds_end_with_enough_groups_that_differ(engine, bars):
    prompts, (rollout, scores, metrics, rollouts) = dynamic(engine, bars, rounds=5)
    rounds = len(rollouts)
    slots = asked(prompts, rounds, 3)
    differ = groups_that_differ(engine, slots)
    assert metrics["agrpo/sampling_rounds"] == rounds
    assert len([slot for slot in differ if slot < 3 * (rounds - 1)]) < 3 <= len(differ)  # not a round too many or few
    assert (rounds > 1 and len(differ) > 3) or bars is MANY
    kept = [slots[slot] for slot in differ[:3]]
    assert list(rollout.prompts) == kept
    assert completions_of(rollout) == [(p.slot, tokens) for p in kept for tokens in drawn(engine, p, 4)]
    assert scores[:, 0].tolist() == [r for p in kept for r in rewards_of(drawn(engine, p, 4), p)]
    assert metrics["agrpo/groups_discarded"] == 3 * rounds - 3
    assert metrics["agrpo/groups_mixed"] == pytest.approx(len(differ) / (3 * rounds))


@pytest.mark.parametrize("bars", [[0, 97, 0, 97, 0, 97, 40, 0, 97, 0, 0, 0], [0, 97] * 6], ids=["one", "none"])
def test_dynamic_rounds_that_run_out_fill_up_with_groups_that_do_not_differ(engine, bars):
    prompts, (rollout, scores, metrics, rollouts) = dynamic(engine, bars, rounds=2)
    slots = asked(prompts, 2, 3)
    differ = groups_that_differ(engine, slots)
    assert len(differ) < 3 and len(rollouts) == metrics["agrpo/sampling_rounds"] == 2
    filled = [p.slot for p in slots if p.slot not in differ][: 3 - len(differ)]
    kept = [slots[slot] for slot in sorted(differ + filled)]
    assert list(rollout.prompts) == kept
    assert completions_of(rollout) == [(p.slot, tokens) for p in kept for tokens in drawn(engine, p, 4)]
    assert scores[:, 0].tolist() == [r for p in kept for r in rewards_of(drawn(engine, p, 4), p)]
    assert metrics["agrpo/groups_discarded"] == 3 and metrics["agrpo/groups_mixed"] == len(differ) / 6


def test_a_prompt_that_comes_again_in_a_later_round_is_not_drawn_alike(engine):
    prompts, (_, _, _, rollouts) = dynamic(engine, [0, 97, 0], rounds=3)  # each round is a whole epoch
    drawn_of = {
        prompt.text: [
            tokens
            for rollout in rollouts
            for slot, tokens in completions_of(rollout)
            for p in rollout.prompts
            if p.slot == slot and p.text == prompt.text
        ]
        for prompt in prompts
    }
    assert sorted(p.slot for rollout in rollouts for p in rollout.prompts) == list(range(9))
    for completions in drawn_of.values():
        assert len(completions) == 12 == len({tuple(tokens) for tokens in completions})

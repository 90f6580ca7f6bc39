"""Two ranks learn what one rank learns, whatever the micro-batches, in all three stages."""

import pytest
from stage_runs import LENGTH_REWARD, rows, run_several, run_tiny, tiny_policy

STAGES = ("sft", "reward", "agrpo")
COMMON = ["evaluation.data=null", "evaluation.test=null", "training.learning_rate=1e-3", "logging.samples_per_step=99"]
OWN = {
    "sft": [],
    "reward": ["objective.pair_weighting=hierarchical", "centring=0.01"],
    "agrpo": [LENGTH_REWARD, "controllers.lambda.value=0.3", "objective.entropy_coef=0.01"],
}
EXACT = {"reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std"}
EXACT |= {"num_tokens", "learning_rate", "agrpo/sampling_rounds", "agrpo/groups_discarded", "agrpo/groups_mixed"}
EXACT |= {"agrpo/group_size_min", "agrpo/group_size_max"}
RANKED = "{data: {source: 'python:agrpo.data.tasks.chains:preference_groups', parameters: {count: 32}}, ratio: 0.4}"
TWO_REWARDS = LENGTH_REWARD[:-1] + ", {target: reward_models.rules.length, name: short, scale: 8, weight: 0.5}]"
# Methods whose step is not the default's, with what makes the ranks depend on each other.
METHODS = {
    "ppo": ["method=ppo", LENGTH_REWARD],
    "lora": ["method=ppo", LENGTH_REWARD, "model.lora={rank: 4}"],
    "reinforce_pp": ["method=reinforce_pp", LENGTH_REWARD, "advantage.gamma=0.9"],
    "dapo": ["method=dapo", LENGTH_REWARD, "sampling.temperature=0.3"],
    "gdpo": ["method=gdpo", TWO_REWARDS],
    "cppo": ["method=cppo", LENGTH_REWARD],
    "adaptive": [
        *("grouping.kind=adaptive", "grouping.most=8", LENGTH_REWARD, "controllers.lambda.value=0.3"),
        *(f"objective.group_loss.ranked={RANKED}", "objective.group_loss.ranked.groups_per_step=5"),
        *("objective.group_loss.labels=soft", "objective.group_loss.pair_weighting=hierarchical"),
    ],
}
CLOSE = {"loss", "grad_norm", "entropy", "accuracy", "kl", "agrpo/kl_symmetric", "agrpo/kl_update", "agrpo/lambda"}
CLOSE |= {"agrpo/advantage_variance", "agrpo/group_loss", "agrpo/regulariser", "agrpo/uncertainty", "agrpo/beta"}
CLOSE |= {"agrpo/epsilon", "clip_ratio/region_mean", "agrpo/value_loss", "agrpo/policy_loss", "agrpo/label_entropy"}
CLOSE |= {"agrpo/ranked_loss", "agrpo/ranked_accuracy", "agrpo/ranked_uncertainty"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """All three stages by one rank, each step one micro-batch."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    for stage in STAGES:
        run_tiny(stage, run, *COMMON, *OWN[stage])
    return run


def other(alone, run, stage, *overrides, nproc):
    """The same stage done otherwise, from the same model."""
    model = [] if stage == "sft" else [f"model.name_or_path={alone / 'sft' / 'model'}"]
    return run_tiny(stage, run, *COMMON, *OWN[stage], *model, *overrides, nproc=nproc)


def assert_same_curves(directory, expected):
    for row, alone in zip(rows(directory / "metrics.jsonl"), rows(expected / "metrics.jsonl"), strict=True):
        assert row.keys() == alone.keys()
        for key in row.keys() & EXACT:
            assert row[key] == pytest.approx(alone[key], rel=1e-9), (row["step"], key)
        for key in row.keys() & CLOSE:
            assert row[key] == pytest.approx(alone[key], rel=1e-4, abs=2e-7), (row["step"], key)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_in_small_micro_batches_give_the_curve_of_one(alone, stage, tmp_path):
    split = ["engine.zero_stage=2", "training.micro_batch_tokens=70"]
    directory = other(alone, tmp_path / "two", stage, *split, nproc=2)
    assert_same_curves(directory, alone / stage)
    if stage == "agrpo":
        assert_same_samples(directory, alone / stage)


@pytest.mark.parametrize("source", ["whole", "layers"])
def test_two_ranks_that_shard_every_weight_give_the_curve_of_one(alone, tmp_path, source):
    shards = ["engine.zero_stage=3", "engine.param_persistence_threshold=0", f"engine.sample_from={source}"]
    directory = other(alone, tmp_path / "two", "agrpo", *shards, nproc=2)
    assert_same_curves(directory, alone / "agrpo")
    assert_same_samples(directory, alone / "agrpo")


def assert_same_samples(directory, expected):
    """Rank 0 of two keeps the completions of every second prompt."""
    mine, alone = rows(directory / "samples.jsonl"), rows(expected / "samples.jsonl")
    assert len(alone) == 5 * 16 and len(mine) == 5 * 8
    assert len({row["completion"] for row in alone}) > 40
    for step in range(5):
        here = [row for row in mine if row["step"] == step]
        there = [row for row in alone if row["step"] == step]
        for row, same in zip(here, [*there[0:4], *there[8:12]], strict=True):
            assert (row["prompt"], row["completion"]) == (same["prompt"], same["completion"])
            assert row["advantage"] == pytest.approx(same["advantage"], rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Directories of METHODS' runs by one rank, and by two in small micro-batches; one job each."""
    folder = tmp_path_factory.mktemp("methods")
    model = f"model.name_or_path={tiny_policy(folder / 'start')}"
    for nproc, split in ((1, []), (2, ["engine.zero_stage=2", "training.micro_batch_tokens=40"])):
        runs = [
            ("agrpo", folder / f"{name}-{nproc}", [*COMMON, model, "training.max_steps=3", *how, *split])
            for name, how in METHODS.items()
        ]
        done = run_several(runs, nproc)
        assert all((run / "agrpo" / "result.json").exists() for _, run, _ in runs), done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_curve_does_not_depend_on_the_ranks(both, name):
    alone, two = (both / f"{name}-{nproc}" / "agrpo" for nproc in (1, 2))
    assert_same_curves(two, alone)
    completions = {
        directory: {(row["step"], row["prompt"], row["completion"]) for row in rows(directory / "samples.jsonl")}
        for directory in (alone, two)
    }
    assert completions[two] < completions[alone]  # the first rank's

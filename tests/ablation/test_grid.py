"""Grids are checked before anything runs; what finished cells show is compared as written down."""

import json
import math

import pytest
import yaml
from made_grid import fill, finish, grid_file, planned, step
from stage_runs import ROOT

from agrpo.ablation.command import main
from agrpo.ablation.grid import plan, read_grid
from agrpo.ablation.measures import wins
from agrpo.ablation.runner import forget_changed, require_unchanged, sole_owner
from agrpo.types import InputError
from agrpo.yaml_input import ConfigError

SEED = ROOT / "configs" / "ablations" / "seed.yaml"
FULL, NO_KL = {"full": {"label": "full"}}, {"label": "no KL", "settings": {"objective": {"kl": "none", "beta": 0.0}}}


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_seeds_grid_says_what_its_rows_mean():
    found = planned(SEED)
    assert len(found.cells) == 12 * 2 * 3
    assert len(found.jobs) == 11 * 2 * 3  # G = 8 is the full row's own
    assert found.same_as(found.cell("g8", "agrpo", 1)) == "full"
    full = {method: found.cell("full", method, 0).job.config for method in ("grpo", "agrpo")}
    for config in full.values():
        assert config.objective.clip and config.objective.updates_per_rollout == 2 and config.objective.watch_kl
        assert config.controllers.lambda_.value == 0 and config.controllers.lambda_.kind == "fixed"
        assert config.objective.entropy_coef == 0.01
    assert full["grpo"].controllers.beta.kind == full["grpo"].controllers.epsilon.kind == "fixed"
    assert full["agrpo"].controllers.beta.kind == full["agrpo"].controllers.epsilon.kind == "adaptive"
    for method in full:
        of = {row: found.cell(row, method, 0).job.config for row in found.grid.rows}
        assert not of["no-clipping"].objective.clip
        assert of["no-kl"].objective.kl == of["no-kl-no-entropy"].objective.kl == "none"
        assert of["no-entropy"].objective.entropy_coef == of["no-kl-no-entropy"].objective.entropy_coef == 0
        assert of["no-kl"].objective.entropy_coef == 0.01
        assert of["no-kl"].needs_reference  # to measure the KL that nothing penalises
        assert [of[f"epsilon-{end}"].objective.epsilon_low for end in ("low", "high")] == [0.1, 0.5]
        assert [of[f"beta-{end}"].objective.beta for end in ("low", "high")] == [0.1, 1.0]
        assert [of[f"g{size}"].sampling.num_generations for size in (4, 8, 16)] == [4, 8, 16]
        assert {c.sampling.num_generations * c.sampling.prompts_per_step for c in of.values()} == {128}
    # A row changes what it says and nothing else.
    base = full["agrpo"].model_dump(exclude={"run"})
    high = found.cell("epsilon-high", "agrpo", 0).job.config.model_dump(exclude={"run"})
    assert {k for k in base["objective"] if base["objective"][k] != high["objective"][k]} == {
        "epsilon_low",
        "epsilon_high",
    }
    assert {k: v for k, v in base.items() if k != "objective"} == {k: v for k, v in high.items() if k != "objective"}


def test_cells_start_from_their_seeds_sft_model():
    found = planned(SEED)
    for cell in found.cells:
        sft = next(job for job in found.sft if job.seed == cell.seed)
        assert cell.job.config.model.name_or_path == str(sft.directory / "model")
        assert cell.job.config.seed == sft.config.seed == cell.seed


WRONG = {
    "unknown key of a cell": (
        {"rows": {**FULL, "typo": {"label": "x", "settings": {"objective": {"bta": 1}}}}},
        ["rows.typo, grpo, seed 0", "rows.typo, agrpo", "objective.bta", "did you mean beta?"],
    ),
    "out of bounds": (
        {"rows": {**FULL, "no-kl": {"label": "x", "methods": {"agrpo": {"objective": {"beta": 2.0}}}}}},
        ["rows.no-kl, agrpo", "objective.beta: 2.0 is outside"],
    ),
    "no such method": (
        {"rows": {**FULL, "x": {"label": "x", "methods": {"ppo": {}}}}},
        ["rows.x.methods: ppo is none of grpo, agrpo"],
    ),
    "no full row": ({"rows": {"no-kl": NO_KL}}, ["full: full is none of the rows"]),
    "no baseline": ({"baseline": "ppo"}, ["baseline: ppo is none of the methods"]),
    "a seed twice": ({"seeds": [1, 1]}, ["seeds: one stands there twice"]),
    "owned key": (
        {"rows": {"full": {"label": "x", "settings": {"seed": 3}}}},
        ["rows.full: settings: seed: is the grid's own"],
    ),
    "unknown key": ({"sedes": [1]}, ["sedes", "did you mean seeds?"]),
    "odd name": ({"name": "../up"}, ["name", "pattern"]),
    "other test prompts": (
        {"policy": {"config": "configs/quickstart/agrpo.yaml", "settings": {}}},
        ["sft and policy have different evaluation.test"],
    ),
    "a secret": (
        {
            "rows": {
                "full": {
                    "label": "x",
                    "settings": {"rewards": [{"target": "reward_models.rules.accuracy", "api_key": "hush"}]},
                }
            }
        },
        ["holds a secret", "environment variable"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_grid_is_refused_before_anything_runs(case, tmp_path, capsys):
    changes, said = WRONG[case]
    assert main([str(grid_file(tmp_path, **changes))]) == 2
    told = capsys.readouterr().err
    for words in said:
        assert words in told
    assert "hush" not in told
    assert not (tmp_path / "runs").exists()


def test_wrong_command_lines(tmp_path, capsys):
    path = str(grid_file(tmp_path))
    for arguments, words in (
        (["--jobs", "0"], "1 or more"),
        (["--prefix", "no-such-command -n 10"], "no command no-such-command"),
        (["--rows", "ful"], "ful is none of full, no-kl"),
        (["seeds.0=x"], "seeds.0"),
    ):
        assert main([path, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main([path, "--no-run"]) == 1
    assert "no cell has finished" in capsys.readouterr().err


def test_another_configuration_is_refused_or_redone_when_asked(tmp_path):
    path = grid_file(tmp_path)
    before = planned(path)
    fill(before)
    require_unchanged(before)
    changed = planned(path, "rows.no-kl.settings.training={learning_rate: 0.5}")
    with pytest.raises(ConfigError, match=r"no-kl-agrpo-seed0(.|\n)*training.learning_rate differ(.|\n)*--redo"):
        require_unchanged(changed)
    assert sorted(forget_changed(changed)) == ["no-kl-agrpo-seed0", "no-kl-grpo-seed0"]
    require_unchanged(changed)
    assert [job.finished for job in changed.jobs] == [True, True, False, False]
    # What only says where or how loudly to run is no other configuration.
    require_unchanged(planned(path, "policy.settings.logging={console: false}", "rows.no-kl.label=KL off"))


def test_cells_of_another_sft_model_are_stale(tmp_path):
    path = grid_file(tmp_path)
    fill(planned(path))
    changed = planned(path, "sft.settings.training.max_steps=4")
    with pytest.raises(ConfigError, match=r"sft-seed0/sft: holds a run with another(.|\n)*max_steps"):
        require_unchanged(changed)
    assert len(forget_changed(changed)) == 1 + 4
    fill(changed)
    (changed.sft[0].directory / "result.json").unlink()
    with pytest.raises(ConfigError, match="SFT model that full-grpo-seed0"):
        require_unchanged(changed)


def test_a_directory_has_one_owner(tmp_path):
    with (
        sole_owner(tmp_path / "a"),
        sole_owner(tmp_path / "b"),
        pytest.raises(InputError, match="another agrpo ablate"),
        sole_owner(tmp_path / "a"),
    ):
        pass
    with sole_owner(tmp_path / "a"):
        pass


def test_wins_are_of_all_pairs_of_samples():
    ours, theirs = [[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a in x for b in y]
    found = wins([sum(x) / 3 for x in ours], [sum(y) / 3 for y in theirs])
    assert found.won == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    assert found.lost == pytest.approx(sum(a < b for a, b in pairs) / len(pairs))
    assert found.rate == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))


def test_what_cells_measured_by_hand(tmp_path):
    pytest.importorskip("scipy")
    from agrpo.ablation.comparison import compare

    path = grid_file(tmp_path, seeds=[0, 1, 2])
    found = planned(path)
    for job in found.sft:
        finish(job, [0, 0, 1, 1])  # of two samples: pass@1 1/4
    for job in found.jobs:
        ours = int("-agrpo-" in job.name)
        passes = [2, 2, 1, job.seed if ours else 0]
        steps = [step(0.1 * i, 0.01 * i, 0.4 - 0.1 * i, (1 - 0.75 * ours) * (1 + i)) for i in range(4)]
        finish(job, passes, steps)
    shown = compare(found)
    grpo, agrpo = (shown.line("full", method).estimates for method in ("grpo", "agrpo"))
    assert grpo["reward"].mean == 5 / 8 and grpo["reward"].half_width == 0
    assert agrpo["reward"].mean == pytest.approx((5 + 6 + 7) / 3 / 8)
    assert agrpo["reward"].half_width == pytest.approx(4.302653 * (1 / 8) / math.sqrt(3), rel=1e-6)
    assert grpo["kl"].mean == pytest.approx(0.025)  # of steps 2 and 3: the window is 2
    assert grpo["entropy"].mean == pytest.approx(0.15)
    assert grpo["advantage_variance"].mean == pytest.approx(2.5)  # of all steps
    assert grpo["win"].mean == pytest.approx(0.5 + (5 / 8 - 1 / 4) / 2)
    assert shown.sft_reward.mean == 0.25
    (found.cell("no-kl", "grpo", 2).job.directory / "result.json").unlink()
    both = compare(found).difference("no-kl", "reward")  # over the seeds that both have
    assert (both.baseline, both.method, both.contrast.estimate.mean) == (5 / 8, 11 / 16, 1 / 16)
    moved = shown.difference("full", "reward").contrast
    assert moved.estimate.mean == pytest.approx(1 / 8)
    assert moved.p_signs == pytest.approx(4 / 8)  # differences 0, 1/8, 2/8: four of eight sums are ±3/8
    assert shown.difference("full", "reward").p_holm == pytest.approx(min(1.0, 2 * moved.p_t))  # two rows
    assert shown.beats["full"].mean == pytest.approx(0.5 + 1 / 16)


def test_results_are_written_and_cells_that_are_missing_are_said(tmp_path, capsys):
    pytest.importorskip("scipy")
    rows = {**FULL, "no-kl": NO_KL, "same": {"label": "same"}}
    claims = [{"text": "falls by 73%", "measure": "advantage_variance", "compared": "ratio", "band": [-0.83, -0.63]}]
    path = grid_file(tmp_path, seeds=[0, 1, 2], rows=rows, claims=claims)
    found = planned(path)
    fill(found)
    (found.cell("no-kl", "agrpo", 2).job.directory / "result.json").unlink()
    assert main([str(path), "--no-run"]) == 0
    told, root = capsys.readouterr().out, tmp_path / "runs" / "try"
    assert "2 of 3 seeds" in told and "the runs of full" in told and "cannot give a p below 0.25" in told
    for name in ("table", "side-by-side", "significance", "claims"):
        for kind in ("md", "csv", "tex"):
            assert (root / f"{name}.{kind}").read_text().count("\n") >= 2
    numbers = json.loads((root / "results.json").read_text())
    assert len(numbers["cells"]) == 17 and numbers["versions"] == ["agrpo, made up"]
    assert numbers["claims"][0]["verdict"] in ("confirmed", "refuted", "undecided")
    pytest.importorskip("matplotlib")
    for name in ("bars.png", "radar.png", "dynamics.png"):
        assert (root / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_reduced_grid_by_the_command_line(tmp_path, capsys):
    path = str(grid_file(tmp_path))
    assert main([path, "--plan", "--rows", "full", "seeds=[3,4]"]) == 0
    told = capsys.readouterr().out
    assert "full-agrpo-seed4" in told and "no-kl" not in told and "4 cells, 6 runs, 0 done" in told
    assert main([path, "--plan", "rows={full: {label: all}}"]) == 0
    assert "2 cells" in capsys.readouterr().out


def test_a_plan_can_be_made_of_what_a_cell_wrote(tmp_path):
    """The file of a cell resolves to the configuration that was planned."""
    from agrpo.config import resolve

    path = grid_file(tmp_path)
    job = plan(read_grid(path), path).jobs[0]
    again = yaml.safe_load(yaml.safe_dump(dict(job.values), allow_unicode=True))
    assert resolve("agrpo", again, path, models_exist=False) == job.config

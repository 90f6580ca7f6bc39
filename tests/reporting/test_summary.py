import json

import pytest

from agrpo.reporting.summary import load, main, record

SFT = {"test_pass1": 0.45, "test_pass8": 0.71, "test_greedy": 0.5}
REWARD = {"pairwise_accuracy": 0.87, "best_heuristic": 0.61, "pairs": 1200}
AGRPO = {"test_pass1": 0.81, "test_pass8": 0.9, "test_greedy": 0.45, "mean_length": 31.2}


@pytest.fixture
def run(tmp_path):
    record(tmp_path, "sft", SFT, seconds=33.0, seed=3)
    record(tmp_path, "reward", REWARD, seconds=20.0, seed=3)
    record(tmp_path, "agrpo", AGRPO, seconds=200.0, seed=3)
    return tmp_path


def test_the_summary_has_the_promised_shape_in_whatever_order_stages_end(run, tmp_path_factory):
    promised = {
        "sft": SFT,
        "reward": REWARD,
        "agrpo": AGRPO,
        "seconds": {"sft": 33.0, "reward": 20.0, "agrpo": 200.0},
        "seed": 3,
    }
    assert load(run) == promised
    other = tmp_path_factory.mktemp("other")
    for section, values in (("agrpo", AGRPO), ("sft", SFT), ("reward", REWARD)):
        record(other, section, values, promised["seconds"][section], 3)
    assert load(other) == promised


def test_a_stage_run_again_replaces_only_its_own_section(run):
    record(run, "reward", {"pairwise_accuracy": float("nan")}, seconds=1.0, seed=3)
    summary = load(run)
    assert summary["reward"] == {"pairwise_accuracy": None}
    assert (summary["sft"], summary["agrpo"]) == (SFT, AGRPO)
    assert [path.name for path in run.iterdir()] == ["summary.json"], "no temporary file stays"


def test_an_unknown_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are sft, reward, agrpo"):
        record(tmp_path, "ppo", {}, 1.0, 0)


def test_the_table_shows_the_change_against_sft_and_only_what_exists(run, capsys):
    (run / "agrpo" / "model").mkdir(parents=True)
    assert main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "+36.0 points on SFT" in out and "-5.0 points on SFT" in out
    assert "87.0%" in out and "61.0%" in out and "1,200 pairs" in out
    assert str(run / "agrpo" / "model") in out
    assert "curves.png" not in out


def test_a_run_that_stopped_after_its_first_stage_has_a_table_too(tmp_path, capsys):
    record(tmp_path, "sft", {"test_pass1": None, "test_greedy": 0.5}, seconds=1.0, seed=0)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "not measured" in out and "A-GRPO" not in out


def test_json_prints_the_file(run, capsys):
    assert main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == load(run)


@pytest.mark.parametrize("content", [None, "{"])
def test_no_summary_exits_2_and_names_the_file(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path / "summary.json") in capsys.readouterr().err

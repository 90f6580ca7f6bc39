import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrpo.reporting.dynamics import families, plot_dynamics
from agrpo.reporting.files import read_series
from agrpo.reporting.plots import main, plot_run, running_mean

pytest.importorskip("matplotlib")


def write(path, rows):
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_one_stage_is_enough_and_nulls_are_no_points(tmp_path):
    rows = [{"step": step, "time_s": 1.0, "loss": None if step == 3 else 1.0} for step in range(30)]
    rows[10]["evaluation/pass1"] = 0.5
    write(tmp_path / "sft" / "metrics.jsonl", rows)
    series = read_series(tmp_path / "sft" / "metrics.jsonl")
    assert series.keys() == {"loss", "evaluation/pass1"}
    assert series["evaluation/pass1"] == ([11], [0.5])
    assert series["loss"][0] == [step for step in range(1, 31) if step != 4]
    assert plot_run(tmp_path) == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_controllers_that_are_zero_do_not_break_the_log_axis(tmp_path):
    write(tmp_path / "agrpo" / "metrics.jsonl", [{"step": s, "time_s": 1.0, "agrpo/beta": 0.0} for s in range(5)])
    assert plot_run(tmp_path, tmp_path / "other.png").exists()


def test_nothing_recorded_is_said(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no metrics"):
        plot_run(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(1, 20))
def test_running_mean_is_the_mean_of_the_last_values(values, window):
    for i, mean in enumerate(running_mean(values, window)):
        part = values[max(0, i - window + 1) : i + 1]
        assert math.isclose(mean, sum(part) / len(part), abs_tol=1e-9)


def test_dynamics_draw_the_mean_of_seeds_and_leave_out_what_stays_at_0(tmp_path, monkeypatch):
    from matplotlib import pyplot

    for name, rewards in (("a-seed0", (0.0, 0.2, 0.4)), ("a-seed1", (0.2, 0.4, 0.8)), ("b", (1.0, 1.0, 1.0))):
        rows = [{"step": s, "time_s": 1.0, "reward": r, "agrpo/lambda": 0.0} for s, r in enumerate(rewards)]
        write(tmp_path / name / "agrpo" / "metrics.jsonl", rows)
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    assert plot_dynamics(families(sorted(tmp_path.iterdir())), tmp_path / "dynamics.png").exists()
    axes = [axis for axis in kept[0].axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in axes] == ["Averaged reward", "Training reward"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes[1].lines}
    assert lines == {"a (2 runs)": pytest.approx([0.1, 0.3, 0.6]), "b": [1.0, 1.0, 1.0]}
    (band,) = axes[1].collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(3, 0.4), (3, 0.8)}
    monkeypatch.undo()
    pyplot.close(kept[0])

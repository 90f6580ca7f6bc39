import io
import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agrpo.reporting.files import read_jsonl, replace, to_json
from agrpo.reporting.metrics import RunLog, printable


def steps_of(path):
    return [row["step"] for row in read_jsonl(path)]


def test_a_resumed_run_leaves_the_same_steps_as_an_uninterrupted_one(tmp_path):
    with RunLog(tmp_path, "sft", 10, console=False) as log:
        for step in range(7):
            log.step(step, {"loss": float(step)})
            log.samples(step, [{"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "b"}])
    first_part = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # killed mid-write
    with RunLog(tmp_path, "sft", 10, first_step=5, console=False) as log:
        for step in range(5, 10):
            log.step(step, {"loss": 100.0 + step})
            log.samples(step, [{"prompt": "p", "completion": "c"}])

    rows = list(read_jsonl(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(10))
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:5] == first_part[:5]
    assert [row["loss"] for row in rows] == [0, 1, 2, 3, 4, 105, 106, 107, 108, 109]
    assert all(a["time_s"] <= b["time_s"] for a, b in pairwise(rows)), "the clock goes on"
    assert steps_of(tmp_path / "samples.jsonl") == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9]


def test_tensorboard_has_every_scalar_under_the_same_name_and_no_step_twice(tmp_path):
    with RunLog(tmp_path, "agrpo", 4, console=False) as log:
        for step in range(3):
            log.step(step, {"reward": 0.5 * step, "agrpo/beta": 0.04})
    with RunLog(tmp_path, "agrpo", 4, first_step=2, console=False) as log:
        for step in range(2, 4):
            log.step(step, {"reward": 7.0, "agrpo/beta": torch.tensor(0.25)})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"reward", "agrpo/beta"}
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [(0, 0.0), (1, 0.5), (2, 7.0), (3, 7.0)]
    assert list(read_jsonl(tmp_path / "metrics.jsonl"))[-1]["agrpo/beta"] == 0.25


def test_values_that_are_not_finite_are_null_and_the_file_is_strict_json(tmp_path):
    with RunLog(tmp_path, "sft", 1, console=False) as log:
        log.step(0, {"loss": math.nan, "grad_norm": math.inf, "kl": torch.tensor(-math.inf), "reward": 1})

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert {key: row[key] for key in ("step", "loss", "grad_norm", "kl", "reward")} == {
        "step": 0, "loss": None, "grad_norm": None, "kl": None, "reward": 1,
    }  # fmt: skip


def test_each_line_is_on_disk_when_step_returns(tmp_path):
    log = RunLog(tmp_path, "sft", 2, console=False)
    log.step(0, {"loss": 1.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [0]
    log.close()


def test_a_step_is_recorded_once(tmp_path):
    with RunLog(tmp_path, "sft", 2, console=False) as log:
        log.step(0, {"loss": 1.0})
        with pytest.raises(ValueError, match="once"):
            log.step(0, {"evaluation/pass1": 1.0})
        with pytest.raises(ValueError, match="time_s"):
            log.step(1, {"time_s": 1.0})


def test_other_ranks_touch_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "sft", "sft", 2, rank=1) as log:
        log.step(0, {"loss": 1.0})
        log.samples(0, [{}])
        log.note("hello")
    assert not (tmp_path / "sft").exists()
    assert capsys.readouterr().out == ""


def test_a_pipe_gets_a_line_every_tenth_and_an_eta(tmp_path, capsys):
    with RunLog(tmp_path, "agrpo", 300) as log:
        for step in range(300):
            log.step(step, {"reward": 0.5, "kl": 0.25, "throughput/completion_tokens_per_s": 1234.0})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("agrpo ")]
    assert [line.split()[1] for line in lines] == ["1/300", *(f"{n}/300" for n in range(30, 301, 30))]
    assert lines[-1] == "agrpo 300/300  0:00:00 left · reward 0.500 · KL 0.2500 · 1,234 tokens/s"


def test_a_terminal_gets_a_bar_and_its_cursor_back(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(RuntimeError), RunLog(tmp_path, "reward", 2) as log:
        log.step(0, {"accuracy": 0.75, "loss": 0.5})
        log.note("a note")
        raise RuntimeError
    out = sys.stdout.getvalue()
    assert "reward 1/2" in out and "pairwise accuracy 0.750" in out and "a note" in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "a failed stage must not leave the cursor hidden"


def test_what_a_model_writes_cannot_break_the_terminal(tmp_path, capsys):
    with RunLog(tmp_path, "sft", 1) as log:
        log.note("[bold red]it[/nope] said \x1b[2J\x1b]0;title\x07\x9b1A\r\u202eevil \ud800 and left " + "x" * 200)
    out = capsys.readouterr().out
    assert out == "[bold red]it[/nope] said 1Aevil ? and left " + "x" * 200 + "\n"
    assert (tmp_path / "log.txt").read_text().endswith("Z " + out)


def test_a_terminal_without_greek_still_gets_its_line(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with RunLog(tmp_path, "sft", 1) as log:
        log.note("β is 0.1")
    assert raw.getvalue() == b"? is 0.1\n"


@given(st.text())
def test_printable_text_has_no_control_characters(text):
    kept = printable(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in kept)
    assert printable(kept) == kept


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_value_is_one_line_of_ascii_and_reads_back(value):
    line = to_json(value)
    assert line.isascii() and len(line.splitlines()) == 1
    assert to_json(json.loads(line)) == line


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def chunks():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(path, chunks())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

"""A reduced grid by the command: stopped, killed, gone on with, a failing cell in it."""

import fcntl
import json
import signal
import subprocess
import sys
import time

import pytest
from made_grid import grid_file, planned
from stage_runs import ROOT, environment

pytest.importorskip("scipy")

# The failing cell: four prompts a step are asked of a data set of two. Under GRPO the row is the full one's twin.
ROWS = {
    "full": {"label": "full"},
    "broken": {"label": "broken", "methods": {"agrpo": {"data": {"parameters": {"count": 2}}}}},
}


def command(path, *arguments):
    return [sys.executable, "-m", "agrpo.cli", "ablate", str(path), *arguments]


def start(path, *arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen(command(path, *arguments), cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True)


def run(path, *arguments):
    return subprocess.run(
        command(path, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def locked(root):
    with (root / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_grid_survives_a_signal_a_kill_and_a_cell_that_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = grid_file(tmp_path, rows=ROWS)
    found, root = planned(path), tmp_path / "runs" / "try"
    sft, cells = found.sft[0], {job.name: job for job in found.jobs}
    assert set(cells) == {"full-grpo-seed0", "full-agrpo-seed0", "broken-agrpo-seed0"}

    stopped = start(path, "--prefix", """bash -c '"$@"; exit $?' prefix""")  # which a signal ends before the run
    wait_for((root / "logs" / "sft-seed0.log").exists)
    stopped.send_signal(signal.SIGTERM)
    out, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 75 and "run again to go on" in out
    assert not locked(root)  # nothing is left behind
    assert not any(job.finished for job in cells.values())

    killed = start(path)
    wait_for((root / "logs" / "full-grpo-seed0.log").exists)
    killed.kill()
    killed.communicate()
    assert sft.finished
    refused = run(path)  # the cell that was left behind still works there
    assert refused.returncode == 2 and "a run that one has left behind" in refused.stderr
    wait_for(lambda: not locked(root))
    kept = {job.name: (job.directory / "result.json").stat().st_mtime_ns for job in (sft, cells["full-grpo-seed0"])}

    done = run(path)
    assert done.returncode == 1, done.stderr
    assert "1 of 3 agrpo runs are there; 2 to do" in done.stdout
    assert "broken-agrpo-seed0: FAILED, exit code 2: error: " in done.stdout
    assert "broken-agrpo-seed0.log" in done.stderr
    assert {name: (job.directory / "result.json").stat().st_mtime_ns for name, job in cells.items() if name in kept} | {
        sft.name: (sft.directory / "result.json").stat().st_mtime_ns
    } == kept
    numbers = json.loads((root / "results.json").read_text())
    assert {(c["row"], c["method"]) for c in numbers["cells"]} == {
        ("full", "grpo"),
        ("full", "agrpo"),
        ("broken", "grpo"),
    }
    assert [failure["name"] for failure in numbers["failures"]] == ["broken-agrpo-seed0"]
    assert "0 of 1 seeds" in (root / "table.md").read_text()
    # Both cells began with the same weights, and saw the reward and the KL that their tables show.
    rows = {name: _steps(cells[name].directory) for name in ("full-grpo-seed0", "full-agrpo-seed0")}
    assert all(row["agrpo/kl_symmetric"] >= 0 for steps in rows.values() for row in steps)
    assert rows["full-grpo-seed0"][0]["reward"] == rows["full-agrpo-seed0"][0]["reward"]
    for cell in numbers["cells"]:
        steps = rows.get(f"{cell['row']}-{cell['method']}-seed0", rows["full-grpo-seed0"])
        assert cell["values"]["training_reward"] == pytest.approx(sum(s["reward"] for s in steps[-2:]) / 2)

    changed = run(path, "rows.broken.methods.agrpo.data.parameters.count=32")
    assert changed.returncode == 2 and "data.parameters.count differ" in changed.stderr


def _steps(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]

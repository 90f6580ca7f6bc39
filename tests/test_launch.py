"""The launcher watches real processes: they import agrpo.job and nothing heavy, so each case takes a second."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stage_runs import ROOT, environment

from agrpo import job
from agrpo.launch import processes

# A rank: its place is in RANK, what befalls it in the test's own words.
RANK = """
import os, signal, sys, time
from agrpo import job
job.listen()
rank = int(os.environ["RANK"])
job.enter("update", 7)
job.mark()
def wait_for(others):  # as in a collective: until the launcher ends it
    time.sleep(30)
"""
LAUNCHER = """
import sys, tempfile
from pathlib import Path
from agrpo import job
from agrpo.launch import _Ranks
job.listen()
print("listens", flush=True)
with tempfile.TemporaryDirectory() as folder:
    ranks = _Ranks(Path(folder), [sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), 1)
    try:
        code = ranks.watch(float(sys.argv[3]), saves=sys.argv[4] == "saves")
    finally:
        ranks.kill()
raise SystemExit(code)
"""


def start(what, count=2, hang_timeout=60.0, saves=True):
    arguments = [RANK + what, str(count), str(hang_timeout), "saves" if saves else "does not"]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *arguments],
        cwd=ROOT,
        env=environment(count),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    began = time.monotonic()
    said = process.communicate(timeout=40)
    return process.returncode, "".join(said), time.monotonic() - began


def test_ranks_that_end_well_end_the_job():
    assert finish(start("print('rank', rank)"))[:1] == (0,)


def test_a_killed_rank_is_named_with_its_phase_and_the_others_end():
    what = "wait_for('rank 1') if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)"
    code, said, seconds = finish(start(what))
    assert code == 128 + signal.SIGKILL and seconds < 10
    assert "rank 1 was killed by SIGKILL in phase 'step 7: update'" in said


def test_the_rank_that_failed_first_is_told_from_the_one_that_lost_its_peer():
    what = """
if rank == 1:
    job.enter("score")
    job.report("rewards: nothing can be scored")
    raise SystemExit(2)
time.sleep(0.3)
raise RuntimeError("connection closed by peer")
"""
    code, said, _ = finish(start(what))
    assert code == 2 and "error: rewards: nothing can be scored" in said
    assert "rank 1 ended with exit code 2 in phase 'step 7: score'" in said


@pytest.mark.parametrize(
    "hangs", ["job.mark(); wait_for('rank 1')", "job.mark(); os.kill(os.getpid(), signal.SIGSTOP)"]
)
def test_a_hung_rank_is_named_and_says_where(hangs):
    """Rank 0 has gone one mark further, or rank 1 is frozen beside it."""
    what = f"""
def reward_that_never_ends():
    {hangs if "SIGSTOP" in hangs else "wait_for('ever')"}
if rank == 0:
    job.mark()
    wait_for('rank 1')
reward_that_never_ends()
"""
    code, said, seconds = finish(start(what, hang_timeout=1.0))
    assert code == 1 and seconds < 10
    assert "rank 1 hangs: no progress for 1 s in phase 'step 7: update'" in said and "rank 0 hangs" not in said
    assert "SIGSTOP" in hangs or "reward_that_never_ends" in said


SAVES = """
while not job.stop_asked():
    time.sleep(0.02)
    job.mark()
time.sleep(0.2)
raise SystemExit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_every_rank_also_while_they_start(number):
    process = start(SAVES)
    assert process.stdout.readline() == "listens\n"
    process.send_signal(number)
    assert finish(process)[0] == 75


def test_what_cannot_be_saved_ends_at_once():
    process = start(SAVES, saves=False)
    assert process.stdout.readline() == "listens\n"
    process.send_signal(signal.SIGTERM)
    code, _, seconds = finish(process)
    assert code == 128 + signal.SIGTERM and seconds < 5


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path):
    process = start(f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(str(os.getpid()))" + SAVES)
    until = time.monotonic() + 20
    while time.monotonic() < until and len([p for p in tmp_path.iterdir() if p.read_text()]) < 2:
        time.sleep(0.05)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    while time.monotonic() < until and any(map(_runs, pids)):
        time.sleep(0.05)
    assert not any(map(_runs, pids))


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_progress_of_a_rank_that_never_began_is_known(tmp_path):
    assert str(job.progress(tmp_path, 3)) == "start-up" and job.reported(tmp_path, 3) is None


@pytest.mark.parametrize(("saved", "code"), [(True, 0), (False, -signal.SIGTERM)])
def test_a_signal_while_python_ends_changes_no_exit_code_of_what_is_saved(saved, code):
    # A module's objects go after Python has put the default handlers back.
    source = "import os, signal\nfrom agrpo import job\njob.listen()\n" + ("job.over()\n" if saved else "")
    source += (
        "class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()):\n        kill(pid, 15)\nlate = Late()\n"
    )
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=environment(), timeout=60).returncode == code


@pytest.mark.parametrize(
    ("visible", "count"), [("0", 1), ("2,5, 7", 3), ("", 1), ("-1", 1), ("0,-1,1", 1), ("GPU-8932f937,GPU-1b2c3d4e", 2)]
)
def test_one_process_for_each_gpu_that_may_be_seen(monkeypatch, visible, count):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert processes() == count


def test_the_number_of_processes_that_is_asked_for_comes_first(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert processes() == 2


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATES = """
import torch
tensor = torch.ones(1 << 24)  # 64 MiB
[line] = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(line.split()[1])
"""


@pytest.mark.skipif(
    not HUGE.exists() or "[madvise]" not in HUGE.read_text(), reason="Linux gives huge pages to none or to all"
)
@pytest.mark.parametrize("own", [None, "0"])
def test_large_tensors_of_a_stage_lie_on_huge_pages_unless_the_environment_says_otherwise(own, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(ALLOCATES)
    start = f"from agrpo.launch import main; raise SystemExit(main([{str(script)!r}], check=lambda arguments: None))"
    env = {name: value for name, value in environment().items() if name != "THP_MEM_ALLOC_ENABLE"}
    if own is not None:
        env["THP_MEM_ALLOC_ENABLE"] = own
    done = subprocess.run([sys.executable, "-c", start], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert (int(done.stdout.split()[-1]) > 32 << 10) == (own is None)  # KiB

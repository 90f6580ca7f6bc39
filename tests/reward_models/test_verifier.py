"""The pool's promises, with functions of the standard library as verifiers: os.getpid, time.sleep, operator.pow …"""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from reward_models.verifier import VerifierError, VerifierPool


@pytest.fixture
def pool():
    with VerifierPool(workers=2, deadline_s=5.0, memory_mb=512) as pool:
        yield pool


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process has ended (a zombie has) within the time."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_results_keep_the_order_of_the_jobs(pool):
    assert pool.map("math:factorial", [(n,) for n in (3, 0, 5, 1, 4)]) == [6, 1, 120, 1, 24]
    assert pool.map("math:factorial", []) == []
    assert not pool.errors


def test_workers_persist_and_there_are_no_more_than_asked_for(pool):
    first = {pid for _ in range(5) for pid in pool.map("os:getpid", [()] * 6)}
    assert len(first) <= 2 and os.getpid() not in first


def test_secrets_of_the_environment_do_not_reach_a_worker(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf-sesame")
    monkeypatch.setenv("PLAIN_SETTING", "seen")
    with VerifierPool(1) as fresh:
        values = fresh.map("os:getenv", [("HF_TOKEN", "nothing"), ("PLAIN_SETTING", "nothing")])
    assert values == ["nothing", "seen"]


def test_workers_do_not_import_torch(pool):
    pool.workers = 1
    assert pool.map("reward_models.rules.symbolic:equal", [("x+1", "1+x", False)]) == [True]
    assert pool.map("builtins:eval", [("'torch' in __import__('sys').modules",)]) == [False]


def test_a_job_that_raises_is_none_and_counted_and_its_worker_lives_on(pool):
    before = pool.map("os:getpid", [()])
    assert pool.map("math:sqrt", [(4,), (-1,)])[:2] == [2.0, None]
    assert pool.errors == {"raised": 1} and "ValueError" in pool.last_error
    assert before[0] in pool.map("os:getpid", [()] * 8)


@pytest.mark.parametrize(
    "endless", [("time:sleep", (60,)), ("operator:pow", (7, 10**9))], ids=["sleeps", "computes in C"]
)
def test_a_job_past_its_deadline_is_killed_and_the_others_are_not_affected(endless):
    function, arguments = endless
    with VerifierPool(workers=2, deadline_s=0.7) as pool:
        pool.map("math:factorial", [(1,), (1,)])  # both workers are up: what is measured is the deadline
        pool.map(function, [(0,) if function == "time:sleep" else (1, 1)] * 2)
        started = time.monotonic()
        jobs = [arguments] + [(0,) if function == "time:sleep" else (2, n) for n in range(5)]
        results = pool.map(function, jobs)
        assert 0.6 < time.monotonic() - started < 5
        assert results[0] is None
        if function == "operator:pow":
            assert results[1:] == [1, 2, 4, 8, 16]
        assert pool.errors["deadline"] == 1
        assert pool.map("math:factorial", [(3,)] * 4) == [6] * 4


def test_a_crash_costs_one_job(pool):
    assert pool.map("os:_exit", [(3,), (3,)]) == [None, None]
    assert pool.map("os:abort", [()]) == [None]
    assert pool.errors == {"crashed": 3}
    assert pool.map("math:factorial", [(4,)] * 3) == [24] * 3


def test_memory_is_limited(pool):
    assert pool.map("builtins:bytearray", [(2 << 30,)]) == [None]
    assert pool.errors == {"crashed": 1}
    assert pool.map("operator:mul", [(6, 7)]) == [42]


def test_a_worker_that_used_half_its_memory_is_replaced_without_an_error():
    with VerifierPool(workers=1, memory_mb=256) as pool:
        before = pool.map("os:getpid", [()])
        assert pool.map("os:getpid", [()]) == before
        pool.map("builtins:exec", [("import os; os.kept = b'x' * (150 << 20)",)])
        assert pool.map("os:getpid", [()]) != before
        assert not pool.errors


def test_a_worker_killed_while_idle_costs_nothing(pool):
    pids = set(pool.map("os:getpid", [()] * 4))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
    assert pool.map("operator:add", [(1, 2)] * 3) == [3, 3, 3]
    assert not pool.errors


def test_megabytes_and_any_unicode_pass_both_ways(pool):
    texts = ["x" * 3_000_000, "π\ud800\n\x00\u2028", '"\\']
    assert pool.map("builtins:str", [(text,) for text in texts]) == texts


def test_what_a_verifier_prints_is_not_taken_for_a_reply(pool):
    assert pool.map("builtins:eval", [("print('{\"result\": 1}') or 2",)]) == [2]
    assert pool.map("subprocess:call", [(["echo", '{"result": 1}'],)]) == [0]


def test_a_function_that_cannot_be_imported_is_an_error_and_not_a_score(pool):
    with pytest.raises(VerifierError, match="no_such_module"):
        pool.map("no_such_module:f", [(), ()])
    with pytest.raises(VerifierError, match="no_such_function"):
        pool.map("math:no_such_function", [()])
    assert pool.map("operator:add", [(1, 2)]) == [3]


def test_a_result_that_json_cannot_carry_is_counted(pool):
    assert pool.map("builtins:object", [()]) == [None]
    assert pool.errors == {"raised": 1}


def test_closing_leaves_no_process(pool):
    pids = set(pool.map("os:getpid", [()] * 4))
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(VerifierError, match="closed"):
        pool.map("os:getpid", [()])


def test_workers_outlive_the_thread_that_started_them(pool):
    pids = []
    thread = threading.Thread(target=lambda: pids.extend(pool.map("os:getpid", [()])))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert pids[0] in pool.map("os:getpid", [()] * 8) and not pool.errors


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "exit"])
def test_no_worker_outlives_the_process_even_in_the_middle_of_a_computation(how, tmp_path):
    program = """
        import sys, threading, time
        from reward_models.verifier import shared_pool
        print(shared_pool().map("os:getpid", [()])[0], flush=True)
        threading.Thread(target=shared_pool().map, args=("operator:pow", [(7, 10**9)]), daemon=True).start()
        time.sleep(0.5)
        print("busy", flush=True)
        if sys.argv[1] != "exit":
            time.sleep(60)
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ, PYTHONPATH=root),
    )
    worker = int(parent.stdout.readline())
    assert parent.stdout.readline() == "busy\n"
    if how != "exit":
        assert not gone(worker, within_s=0.1)
        parent.send_signal(getattr(signal, how))
    parent.wait(10)
    parent.stdout.close()
    assert gone(worker)


FORKS = """
import os
from reward_models.verifier import shared_pool
ours = shared_pool()
assert shared_pool() is ours
child = os.fork()
if child == 0:
    os._exit(0 if shared_pool() is not ours else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_the_shared_pool_is_one_and_a_fork_gets_its_own():
    """In a small process of its own: a fork of this one, with every engine of the suite in it, may not find room."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("limits", [{"workers": 0}, {"deadline_s": 0}, {"deadline_s": float("nan")}, {"memory_mb": 1}])
def test_senseless_limits_are_refused(limits):
    with pytest.raises(ValueError):
        VerifierPool(**limits)

"""The fault campaign: runs that are stopped, killed, damaged and poisoned must end as if nothing had happened.

    python tests/chaos.py [--short] [--seed N] [--only NAME …] [--table FILE]

Runs are forks of this process, which has imported everything once; those that concern the launcher are processes of
their own. Prints a table; exit code 1 if anything is not as promised.
"""

import argparse
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.utils.tensorboard
from stage_runs import LENGTH_REWARD, MAINS, ROOT, environment, tiny, tiny_policy

from agrpo import job
from agrpo.engine import checkpoint, distributed
from agrpo.engine.backends.native import NativeBackend
from agrpo.engine.hybrid import HybridEngine
from agrpo.training import session

CLOCKS = re.compile(r"^(time|throughput|memory)/|^time_s$")
STEPS = 12
BARE = ["evaluation.data=null", "evaluation.test=null", "logging.samples_per_step=99", "logging.console=false"]
BARE += [f"training.max_steps={STEPS}", "checkpoint.every=12", "checkpoint.keep=9", "training.learning_rate=1e-3"]
POLICY = ["data.parameters.count=32", "sampling.prompts_per_step=2", "sampling.max_completion_length=8"]
POLICY += ["training.micro_batch_tokens=40", LENGTH_REWARD[:-2] + ", normalise: true}]"]


# Faults, installed in a forked rank before its stage begins.


def stop_after(optimiser_step, rank):
    """SIGTERM to one rank as its optimiser step of that number, from 1, ends."""
    step, done = HybridEngine.step, 0

    def counted(self, rate):
        nonlocal done
        norm = step(self, rate)
        done += 1
        if done == optimiser_step and distributed.rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    HybridEngine.step = counted


def kill_in_a_save(event):
    """SIGKILL before the event of that number of the file system, from 0, that belongs to writing checkpoints."""
    seen = 0

    def dying(act):
        def counted(*args, **kwargs):
            nonlocal seen
            if str(args[0]).find("step-") >= 0 or act is os.fsync:
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
            return act(*args, **kwargs)

        return counted

    class Half:
        """A file that is written by halves, an event between them."""

        def __init__(self, file):
            self.file = file
            self.note = dying(lambda path: None)

        def __enter__(self):
            return self

        def __exit__(self, *how):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.note("step-")
            self.file.write(content[len(content) // 2 :])

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = Path.open

    def open_(self, mode="r", *args, **kwargs):
        file = opened(self, mode, *args, **kwargs)
        return Half(file) if mode == "wb" and ".partial" in str(self) else file

    Path.open = open_
    os.fsync, Path.rename, shutil.rmtree = dying(os.fsync), dying(Path.rename), dying(shutil.rmtree)


def poison(rank, first, last):
    """NaN in the loss of one rank in optimiser steps first … last, from 0; checks that no weight moves by it."""
    backward, step, done = HybridEngine.backward, HybridEngine.step, 0

    def poisoned(self, loss, end):
        bad = distributed.rank() == rank and first <= done <= last
        backward(self, loss * float("nan") if bad else loss, end)

    def weights(engine):
        return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]

    def checked(self, rate):
        nonlocal done
        before, skipped = weights(self), self.skipped_steps
        norm = step(self, rate)
        moved = any(not torch.equal(a, b) for a, b in zip(weights(self), before, strict=True))
        expected = (first <= done <= last, not first <= done <= last)
        seen = distributed.gather_objects((self.skipped_steps > skipped, moved))
        if seen != [expected] * distributed.world():
            raise AssertionError(f"optimiser step {done}: (skipped, moved) is {seen}, not {expected} on every rank")
        done += 1
        return norm

    HybridEngine.backward, HybridEngine.step = poisoned, checked


def run_out_of_memory(where):
    """Once: in the forward or backward of the fourth optimiser step's second micro-batch, or the third generation."""
    step, steps, calls = HybridEngine.step, 0, 0
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    on_cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")
    kind, error = (NativeBackend, on_gpu) if where == "generate" else (HybridEngine, on_cpu)
    act = getattr(kind, where)

    def counted(self, rate):
        nonlocal steps, calls
        steps, calls = steps + 1, 0
        return step(self, rate)

    def failing(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if (steps, calls) == ((4, 1) if where == "generate" else (3, 2)):
            raise error
        return act(self, *args, **kwargs)

    HybridEngine.step = counted
    setattr(kind, where, failing)


# Jobs.


def fork_job(stage, arguments, folder, nproc=1, fault=None):
    """Process ids of the ranks of a stage, each a fork; what they print is in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    sys.stdout.flush()
    sys.stderr.flush()
    return [_fork(stage, arguments, folder, rank, nproc, port, fault) for rank in range(nproc)]


def _fork(stage, arguments, folder, rank, nproc, port, fault):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(folder / f"rank-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), MASTER_PORT=port)
        os.environ.update(MASTER_ADDR="127.0.0.1", NPROC=str(nproc))
        if fault is not None:
            fault()
        job.listen()
        sys.argv = [MAINS[stage], *arguments]
        runpy.run_path(str(ROOT / MAINS[stage]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pids, kill_after=None):
    """Exit codes, negative for a signal. With `kill_after`, SIGKILL to all after so many seconds."""
    until = time.monotonic() + (kill_after or 120)
    codes = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        lost = any(code < 0 for code in codes.values())
        if time.monotonic() > until or lost:  # the launcher's part: a dead rank ends the job
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def run(stage, arguments, folder, nproc=1, fault=None, kill_after=None):
    return wait(fork_job(stage, arguments, folder, nproc, fault), kill_after)


# What must be equal.


def digest(value):
    """SHA-256 of nested values, tensors by their bytes."""
    found = hashlib.sha256()

    def visit(item):
        if isinstance(item, torch.Tensor):
            found.update(f"{item.dtype}{tuple(item.shape)}".encode())
            found.update(item.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                found.update(str(key).encode())
                visit(item[key])
        elif isinstance(item, list | tuple):
            for one in item:
                visit(one)
        elif type(item).__module__ == "builtins":
            found.update(repr(item).encode())

    visit(value)
    return found.hexdigest()


def outcome(directory):
    """Digest of the last checkpoint's weights and optimiser, every rank's state, the logged scalars, the samples."""
    found, damaged = checkpoint.newest(directory / "checkpoints")
    assert found is not None and not damaged and found.state["step"] == STEPS, (directory, damaged)
    parts = {}
    for path in sorted(found.path.glob("engine/*.pt")):
        parts[path.name] = digest(torch.load(path, weights_only=False))
    for path in sorted(found.path.glob("rank-*.json")):
        tensors = checkpoint.safetensors.torch.load_file(path.with_suffix(".safetensors"))
        own = checkpoint._together(json.loads(path.read_text()), tensors)
        parts[path.name] = digest(own)
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = directory / name
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        parts[name] = digest([{k: v for k, v in row.items() if not CLOCKS.match(k)} for row in rows])
        assert name == "samples.jsonl" or [row["step"] for row in rows] == list(range(STEPS)), directory
    return parts


def temporary(directory):
    """What a killed run may have left half done."""
    return [str(p) for p in directory.rglob(".*") if p.name not in (".", "..")]


# The campaign.


class Campaign:
    def __init__(self, folder, seed, short):
        self.folder, self.random, self.short = folder, random.Random(seed), short
        self.policy = f"model.name_or_path={tiny_policy(folder / 'start')}"
        self.rows = []
        self.count = 0

    def place(self):
        self.count += 1
        folder = self.folder / f"run-{self.count:04d}"
        folder.mkdir()
        return folder

    def arguments(self, stage, folder, *more):
        own = [*POLICY, self.policy] if stage == "agrpo" else []
        if stage == "reward":
            own = [self.policy]
        return tiny(stage, folder, *BARE, *own, *more)

    def tell(self, name, passed, of, began, note=""):
        self.rows.append((name, passed, of, time.monotonic() - began, note))
        print(f"{name}: {passed}/{of} {note}", flush=True)

    def straight(self, stage, nproc, *more):
        folder = self.place()
        codes = run(stage, self.arguments(stage, folder, *more), folder, nproc)
        assert codes == [0] * nproc, (codes, (folder / "rank-0.txt").read_text()[-3000:])
        return outcome(folder / stage)

    def resume_at(self, name, stage, nproc, updates, *more):
        """Stop after each optimiser step, `updates` a step of the run, and resume: the uninterrupted run's outcome."""
        began = time.monotonic()
        expected = self.straight(stage, nproc, *more)
        stops = list(range(1, STEPS * updates + 1))
        if self.short:
            stops = self.random.sample(stops[:-1], min(nproc, updates))
        passed = 0
        for stop in stops:
            folder = self.place()
            arguments = self.arguments(stage, folder, *more)
            rank = self.random.randrange(nproc)
            codes = run(stage, arguments, folder, nproc, lambda s=stop, r=rank: stop_after(s, r))
            saved = sorted(path.name for path in (folder / stage / "checkpoints").iterdir())
            step, inside = divmod(stop, updates)
            named = f"step-{step:06d}" + (f".{inside}" if inside else "")
            codes += run(stage, arguments, folder, nproc)
            same = codes == [session.RESUME_LATER] * nproc + [0] * nproc and saved == [named]
            if same and outcome(folder / stage) == expected:
                passed += 1
                shutil.rmtree(folder)
            else:
                print(f"  stop {stop}: {codes} {saved} in {folder}", flush=True)
        of_buffer = sum(stop % updates > 0 for stop in stops)
        self.tell(name, passed, len(stops), began, f"{of_buffer} in mid-buffer" if of_buffer else "")

    def exact(self):
        for zero in (0, 2, 3):
            self.resume_at(f"stop and resume, A-GRPO, 2 ranks, ZeRO {zero}", "agrpo", 2, 2, f"engine.zero_stage={zero}")
            if self.short:
                break

    def exact_alone(self):
        self.resume_at("stop and resume, PPO, 1 rank", "agrpo", 1, 2, "method=ppo", "objective.updates_per_rollout=2")
        if not self.short:
            self.resume_at("stop and resume, stage 1, 1 rank", "sft", 1, 1)
            self.resume_at("stop and resume, stage 2, 1 rank", "reward", 1, 1)

    def kills(self):
        """SIGKILL at random moments of the clock, and between and within the writes of a checkpoint."""
        often = ["engine.zero_stage=2", "checkpoint.every=2", "checkpoint.keep=2"]
        since = time.monotonic()
        expected = self.straight("agrpo", 2, *often)
        seconds = time.monotonic() - since
        for how, count in (("while a checkpoint is written", 12), ("at any moment", 8)):
            began, passed = time.monotonic(), 0
            count = 1 if self.short else count
            for n in range(count):
                more = [*often, f"checkpoint.asynchronous={'true' if n % 2 else 'false'}"]
                folder, arguments = self.killed(how == "at any moment", seconds, more)
                codes = run("agrpo", arguments, folder, 2)
                left = temporary(folder)
                if codes == [0, 0] and not left and outcome(folder / "agrpo") == expected:
                    passed += 1
                    shutil.rmtree(folder)
                else:
                    print(f"  kill {n}: {codes} {left} in {folder}", flush=True)
            self.tell(f"SIGKILL {how}", passed, count, began)

    def killed(self, by_clock, seconds, more):
        """Folder and arguments of a run that a SIGKILL reached before its end."""
        while True:
            folder = self.place()
            arguments = self.arguments("agrpo", folder, *more)
            if by_clock:
                codes = run("agrpo", arguments, folder, 2, kill_after=self.random.uniform(0.1, seconds))
            else:
                event = self.random.randrange(60)
                codes = run("agrpo", arguments, folder, 2, lambda e=event: kill_in_a_save(e))
            if -signal.SIGKILL in codes:
                return folder, arguments

    def flips(self):
        began = time.monotonic()
        folder = self.place()
        assert run("agrpo", self.arguments("agrpo", folder, "checkpoint.every=6"), folder, 1) == [0]
        saved = folder / "agrpo" / "checkpoints"
        files = [path for path in (saved / "step-000012").rglob("*") if path.is_file()]
        passed, count = 0, 8 if self.short else 40
        for n in range(count):
            path = files[n % len(files)]
            content = path.read_bytes()
            place = self.random.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            found, damaged = checkpoint.newest(saved)
            passed += found.path.name == "step-000006" and len(damaged) == 1 and "step-000012" in damaged[0]
            path.write_bytes(content)
        whole = checkpoint.newest(saved)[0].path.name == "step-000012"
        self.tell("single-bit flips in checkpoint files", passed * whole, count, began, "each falls back")

    def poisons(self):
        cases = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32")]
        cases += [(1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")]
        began, passed = time.monotonic(), 0
        cases = cases[5:6] if self.short else cases
        for zero, dtype in cases:
            folder = self.place()
            more = [f"engine.zero_stage={zero}", f"model.dtype={dtype}", "training.max_steps=4"]
            codes = run("agrpo", self.arguments("agrpo", folder, *more), folder, 2, lambda: poison(1, 3, 3))
            log = (folder / "agrpo" / "log.txt").read_text()
            if codes == [0, 0] and "step 1: loss or gradient not finite in 1" in log:
                passed += 1
            else:
                print(f"  ZeRO {zero} {dtype}: {codes} in {folder}", flush=True)
        self.tell("NaN on one rank of 2, ZeRO 0–3, float32 and bfloat16", passed, len(cases), began)

    def full_disk(self):
        """On a small tmpfs where it can be mounted: the second checkpoint finds no room."""
        began = time.monotonic()
        folder = self.place()
        disk = folder / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            self.tell("full disk during a save (tmpfs)", 0, 0, began, "not mountable here")
            return
        try:
            more = ["checkpoint.every=1", "checkpoint.keep=1", "training.max_steps=4"]
            start = self.arguments("agrpo", disk / "run", *more)
            codes = run("agrpo", start, folder, 1, lambda: _grow(disk))
            log = (disk / "run" / "agrpo" / "log.txt").read_text()
            whole = checkpoint.newest(disk / "run" / "agrpo" / "checkpoints")
            told = "No space left on device" in log + (folder / "rank-0.txt").read_text()
            good = told and whole[0] is not None and not whole[1] and whole[0].state["step"] == 2
            (disk / "ballast").unlink()
            again = run("agrpo", start, folder, 1)
            if not (good and again == [0]):
                print(codes, again, whole, log[-500:], flush=True)
            note = f"exit code {codes[0]}, then resumed"
            self.tell("full disk during a save (tmpfs)", int(good and again == [0]), 1, began, note)
        finally:
            subprocess.run(["umount", str(disk)], check=False)

    def memory(self):
        """Out of memory: smaller pieces, the same rewards exactly, the same gradient up to the order of its sum."""
        began, passed = time.monotonic(), 0
        more = ["training.micro_batch_tokens=90", "sampling.prompts_per_step=4", "training.max_steps=4"]
        folder = self.place()
        assert run("agrpo", self.arguments("agrpo", folder, *more), folder) == [0]
        enough = _rows(folder / "agrpo" / "metrics.jsonl")
        for where in ("forward", "backward", "generate"):
            folder = self.place()
            arguments = self.arguments("agrpo", folder, *more)
            codes = run("agrpo", arguments, folder, fault=lambda w=where: run_out_of_memory(w))
            said = (folder / "agrpo" / "log.txt").read_text() + (folder / "rank-0.txt").read_text()
            told = "half as many sequences" if where == "generate" else "micro-batches of 45 tokens"
            short = _rows(folder / "agrpo" / "metrics.jsonl")
            same = len(short) == 4 and all(_alike(a, b) for a, b in zip(short, enough, strict=True))
            if codes == [0] and told in said and same:
                passed += 1
            else:
                print(f"  {where}: {codes} {told in said} {same} in {folder}", flush=True)
        folder = self.place()
        arguments = self.arguments("agrpo", folder, *more, "engine.zero_stage=2")
        codes = run("agrpo", arguments, folder, 1, lambda: run_out_of_memory("forward"))
        passed += codes == [2] and "training.micro_batch_tokens=45" in (folder / "rank-0.txt").read_text()
        self.tell("out of memory in forward, backward, generation; refused with ZeRO", passed, 4, began)

    def signals(self):
        """SIGTERM or SIGUSR1 to one rank at a random moment: every rank ends with 75, saved, and the run resumes."""
        since = time.monotonic()
        expected = self.straight("agrpo", 2)
        seconds = time.monotonic() - since
        began, passed, slowest, early = time.monotonic(), 0, 0.0, 0
        count = 1 if self.short else 10
        for n in range(count):
            folder = self.place()
            arguments = self.arguments("agrpo", folder)
            pids = fork_job("agrpo", arguments, folder, 2)
            time.sleep(0.3 + self.random.uniform(0, 0.9 * seconds))  # a fork listens within the first moment
            early += not (folder / "agrpo" / "metrics.jsonl").exists()
            os.kill(self.random.choice(pids), (signal.SIGTERM, signal.SIGUSR1)[n % 2])
            asked = time.monotonic()
            codes = wait(pids)
            slowest = max(slowest, time.monotonic() - asked)
            again = run("agrpo", arguments, folder, 2)
            same = again == [0, 0] and outcome(folder / "agrpo") == expected
            if codes in ([75, 75], [0, 0]) and slowest < 25 and same:
                passed += 1
            else:
                print(f"  signal {n}: {codes} {again} {slowest:.1f} s in {folder}", flush=True)
        note = f"slowest {slowest:.1f} s; {early} during set-up"
        self.tell("SIGTERM or SIGUSR1 to one rank of 2 at a random moment", passed, count, began, note)

    # The launcher's, with processes of their own.

    def dead_launcher(self):
        """The launcher is killed outright: its ranks see that it is gone, save, and end."""
        began = time.monotonic()
        folder = self.place()
        process = self.start(self.arguments("agrpo", folder, "training.max_steps=9999"), folder, 2)
        self.wait_for(folder / "agrpo" / "metrics.jsonl", 1.0)
        ranks = children(process.pid)
        process.kill()
        process.wait()
        since = time.monotonic()
        wait_until(lambda: not any(runs(pid) for pid in ranks), 25)
        took = time.monotonic() - since
        left = [pid for pid in ranks if runs(pid)]
        saved = [path.name for path in (folder / "agrpo" / "checkpoints").glob("step-*")]
        self.tell("launcher of 2 ranks killed", int(not left and len(saved) == 1), 1, began, f"{took:.1f} s, saved")

    def terms(self):
        """SIGTERM and SIGUSR1 to run.sh at random moments: exit code 75 within 25 s, no orphans, then resumed."""
        began, passed, slowest = time.monotonic(), 0, 0.0
        count = 1 if self.short else 10
        expected = {nproc: self.straight("agrpo", nproc) for nproc in ((2,) if self.short else (1, 2))}
        for n in range(count):
            nproc = 2 if n % 2 == 0 else 1
            folder = self.place()
            arguments = self.arguments("agrpo", folder)
            process = self.start(arguments, folder, nproc)
            slow = self.random.uniform(0.5, 12.0)
            self.wait_for(folder / "agrpo" / "metrics.jsonl", 0.0) if self.short else time.sleep(slow)
            ranks = children(process.pid)
            number = signal.SIGTERM if n % 4 < 2 else signal.SIGUSR1
            os.kill(process.pid, number)
            since = time.monotonic()
            code = process.wait(240)
            took = time.monotonic() - since
            slowest = max(slowest, took)
            time.sleep(0.2)
            orphans = [pid for pid in ranks if runs(pid)]
            again = run("agrpo", arguments, folder, nproc)
            same = again == [0] * nproc and outcome(folder / "agrpo") == expected[nproc]
            if code in (0, session.RESUME_LATER) and took < 25 and not orphans and same:
                passed += 1
            else:
                print(f"  {number} after {slow:.1f} s: {code} {took:.1f} s {orphans} {again} in {folder}", flush=True)
        note = f"slowest {slowest:.1f} s"
        self.tell("SIGTERM or SIGUSR1 to run.sh at a random moment", passed, count, began, note)

    def dead_rank(self):
        began = time.monotonic()
        folder = self.place()
        process = self.start(self.arguments("agrpo", folder, "training.max_steps=9999"), folder, 2)
        self.wait_for(folder / "agrpo" / "metrics.jsonl", 1.0)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        since = time.monotonic()
        code = process.wait(60)
        took = time.monotonic() - since
        said = (folder / "job.txt").read_text()
        named = re.search(r"rank 1 was killed by SIGKILL in phase 'step \d+: \w+'", said)
        if not named:
            print(said[-1500:], flush=True)
        note = f"{took:.1f} s, exit code {code}: {named[0] if named else 'not named'}"
        self.tell("one rank of 2 killed", int(bool(named) and code == 137 and took < 30), 1, began, note)

    def hung_rank(self):
        began = time.monotonic()
        folder = self.place()
        more = ["training.max_steps=9999", "engine.hang_timeout_s=4"]
        process = self.start(self.arguments("agrpo", folder, *more), folder, 2)
        self.wait_for(folder / "agrpo" / "metrics.jsonl", 1.0)
        stopped = children(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        since = time.monotonic()
        code = process.wait(60)
        took = time.monotonic() - since
        said = (folder / "job.txt").read_text()
        named = re.search(r"rank 1 hangs: no progress for 4 s in phase '[^']+'", said)
        if not named:
            print(said[-1500:], flush=True)
        gone = not Path(f"/proc/{stopped}").exists()
        note = f"{took:.1f} s, exit code {code}: {named[0] if named else 'not named'}"
        self.tell("one rank of 2 hung (SIGSTOP)", int(bool(named) and code == 1 and gone), 1, began, note)

    def start(self, arguments, folder, nproc):
        with (folder / "job.txt").open("wb") as out:
            return subprocess.Popen(
                ["bash", str(ROOT / "stages/stage3_agrpo/run.sh"), *arguments],
                env=environment(nproc),
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, path, more):
        wait_until(lambda: path.exists() and path.stat().st_size, 90)
        time.sleep(more * self.random.random())

    def table(self):
        lines = ["| fault | as promised | seconds | |", "| --- | --- | --- | --- |"]
        lines += [f"| {name} | {passed}/{of} | {took:.0f} | {note} |" for name, passed, of, took, note in self.rows]
        return "\n".join(lines)


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _alike(row, other):
    exact = ("reward", "completions/mean_length")
    close = ("loss", "grad_norm", "entropy", "kl")
    return all(row[key] == other[key] for key in exact) and all(
        abs(row[key] - other[key]) <= 1e-7 + 1e-4 * abs(other[key]) for key in close
    )


def _grow(disk):
    """Fill the disk up after the second checkpoint."""
    save = checkpoint.Writer.save

    def filling(self, step, *args, **kwargs):
        if step == 3:
            with (disk / "ballast").open("wb") as file:
                try:
                    while True:
                        file.write(bytes(4096))
                        file.flush()
                except OSError:
                    file.truncate(max(0, file.tell() - 40960))  # room for the log, not for a checkpoint
        return save(self, step, *args, **kwargs)

    checkpoint.Writer.save = filling


def children(pid):
    """Children of a process, in the order in which they were made."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def runs(pid):
    """Is there such a process, and not only its entry?"""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(holds, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until and not holds():
        time.sleep(0.05)


NAMES = ("exact", "exact_alone", "kills", "flips", "poisons", "full_disk", "memory", "signals")
NAMES += ("terms", "dead_rank", "hung_rank", "dead_launcher")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--table", type=Path, help="write the table here too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="agrpo-chaos-"))
    campaign = Campaign(folder, options.seed, options.short)
    began = time.monotonic()
    for name in options.only:
        getattr(campaign, name)()
    print(f"\n{campaign.table()}\n\n{time.monotonic() - began:.0f} s, seed {options.seed}")
    if options.table:
        options.table.write_text(campaign.table() + "\n", encoding="utf-8")
    failed = [name for name, passed, of, *_ in campaign.rows if passed != of]
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

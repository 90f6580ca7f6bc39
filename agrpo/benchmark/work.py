"""The work that every contestant does, its arithmetic, and how one turn is measured.

Legend: P prompts of p tokens each, G completions of each prompt, T tokens of each completion.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from agrpo.engine import distributed
from agrpo.engine.memory import peak_memory

PHASES = ("generation", "reference", "forward", "backward", "optimiser", "sync", "other")
UPDATE = ("reference", "forward", "backward", "optimiser")


@dataclass(frozen=True)
class Work:
    """One GRPO step. End tokens are ignored: every completion has the same length, so all do the same work."""

    model: str  # a Hugging Face folder
    prompts: int = 4
    group: int = 8
    prompt_tokens: int = 0  # 0: a task's own prompts; else made-up prompts of so many tokens
    completion_tokens: int = 64
    beta: float = 0.04
    dtype: str = "bfloat16"
    learning_rate: float = 1e-6
    pruned: float = 0.0  # CPPO's rate
    threads: int = 1  # of each rank
    ranks: int = 1
    micro_batch_tokens: int = 4096  # of ours
    steps: int = 4  # of which the first is reported apart
    plain: bool = False  # ours without its fast paths
    trace: bool = False  # ours: say where the time goes, operator by operator

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def prompt_ids(work: Work, tokenizer: Any, vocabulary: int, step: int) -> list[list[int]]:
    """The P prompts of a step: of the procedural instructions task, in the model's chat format where it has one."""
    if work.prompt_tokens:
        import random

        source = random.Random(step)
        return [[source.randrange(3, vocabulary) for _ in range(work.prompt_tokens)] for _ in range(work.prompts)]
    from agrpo.data.tasks.instructions import prompts
    from agrpo.data.tokens import encode_prompt

    rows = prompts(split="train", count=64, seed=0)
    chosen = [rows[(step * work.prompts + i) % len(rows)]["prompt"] for i in range(work.prompts)]
    return [encode_prompt(tokenizer, text) for text in chosen]


def reward_of(tokens: Sequence[int]) -> float:
    """A number that differs between completions and costs nothing."""
    return float(sum(tokens) % 97)


@dataclass(frozen=True)
class Shape:
    """What of a decoder decides its arithmetic."""

    body: int  # parameters of the layers' matrices
    head: int  # of the language-model head
    layers: int
    attention: int  # heads × head size

    @classmethod
    def of(cls, lm: Any) -> Shape:
        config = lm.config
        body = sum(p.numel() for name, p in lm.get_decoder().named_parameters() if p.ndim == 2 and "embed" not in name)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            body,
            lm.get_output_embeddings().weight.numel(),
            config.num_hidden_layers,
            size * config.num_attention_heads,
        )

    def forward(self, prompts: Sequence[int], group: int, length: int) -> float:
        """Operations of one forward that reads each prompt once: 2 a weight and token, attention's scores and sums."""
        tokens = sum(prompts) + len(prompts) * group * length
        of_prompts = sum(p * (p + 1) / 2 for p in prompts)
        of_completions = sum(group * length * (p + (length + 1) / 2) for p in prompts)
        scores = 4 * self.layers * self.attention * (of_prompts + of_completions)
        return 2 * self.body * tokens + 2 * self.head * len(prompts) * group * length + scores

    def step(self, prompts: Sequence[int], group: int, length: int, kept: int, reference: bool) -> float:
        """Of a GRPO step: sampling, the reference's forward, the policy's forward, and a backward of twice as much."""
        update = self.forward(prompts, kept, length)
        return self.forward(prompts, group, length) + update * (4 if reference else 3)


class Clock:
    """Wall and CPU seconds by phase. A phase inside another counts once, for itself."""

    def __init__(self) -> None:
        self.wall: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()
        self._open: list[list[float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = [perf_counter(), process_time(), 0.0, 0.0]
        self._open.append(began)
        try:
            yield
        finally:
            self._open.pop()
            wall, cpu = perf_counter() - began[0], process_time() - began[1]
            self.wall[name] += wall - began[2]
            self.cpu[name] += cpu - began[3]
            if self._open:
                self._open[-1][2] += wall
                self._open[-1][3] += cpu

    def wrap(self, owner: Any, method: str, name: str | Callable[[], str]) -> None:
        """Count every call of a method for a phase."""
        plain = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name()):
                return plain(*args, **kwargs)

        setattr(owner, method, timed)


class Turns:
    """A contestant's side of the talk with the referee: it waits for its turn, and tells what the turn cost.

    After its last turn it waits for the end: what a library does behind its loop would take time from the others.
    Of several ranks the first one talks; all begin and end their turns together.
    """

    def __init__(self, steps: int, clock: Clock) -> None:
        self.steps, self.clock = steps, clock
        self._out = sys.stdout
        sys.stdout = sys.stderr  # whatever a library prints stays out of the talk

    def tell(self, kind: str, **values: Any) -> None:
        if distributed.rank() == 0:
            print(json.dumps({"kind": kind, **values}), file=self._out, flush=True)

    def wait(self) -> None:
        if distributed.max_over_ranks(int(distributed.rank() == 0 and not sys.stdin.readline())):
            raise SystemExit(0)
        self.clock.wall.clear()
        self.clock.cpu.clear()
        self._began = perf_counter(), process_time()

    def done(self, **values: Any) -> None:
        distributed.barrier()
        wall, cpu = perf_counter() - self._began[0], process_time() - self._began[1]
        phases = {name: self.clock.wall[name] for name in PHASES if name != "other"}
        phases_cpu = {name: self.clock.cpu[name] for name in phases}
        phases["other"] = max(0.0, wall - sum(phases.values()))
        phases_cpu["other"] = max(0.0, cpu - sum(phases_cpu.values()))
        self.tell("step", wall=wall, cpu=cpu, phases=phases, phases_cpu=phases_cpu, peak_memory=peak_memory(), **values)
        self.steps -= 1
        if self.steps == 0:
            self.wait()


def dense_model(gguf: str, folder: str) -> None:
    """A GGUF model as a Hugging Face folder that any trainer reads."""
    from agrpo.config import ModelConfig
    from agrpo.models import load_language_model, load_tokenizer, save_language_model

    config = ModelConfig(gguf=gguf)
    tokenizer, _ = load_tokenizer(config)
    save_language_model(load_language_model(config, tokenizer, 0), tokenizer, Path(folder))

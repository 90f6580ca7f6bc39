"""What a stage writes while it runs: metrics.jsonl, the loggers, samples.jsonl, log.txt, report.html, and progress."""

from __future__ import annotations

import math
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from agrpo.reporting.diagnostics import Finding, Record, diagnose
from agrpo.reporting.files import read_jsonl, read_series, replace, to_json
from agrpo.reporting.loggers import LOGGERS
from agrpo.reporting.report.page import NAME as REPORT
from agrpo.reporting.report.page import write_report

# Each stage's headline: label, the metrics that may carry it (the first present is shown), format.
HEADLINES: dict[str, tuple[tuple[str, tuple[str, ...], str], ...]] = {
    "sft": (("loss", ("loss",), ".3f"),),
    "reward": (
        ("pairwise accuracy", ("pairwise_accuracy", "accuracy", "evaluation/pairwise_accuracy"), ".3f"),
        ("loss", ("loss",), ".3f"),
    ),
    "agrpo": (
        ("reward", ("reward",), ".3f"),
        ("KL", ("agrpo/kl_symmetric", "kl"), ".4f"),
        ("length", ("completions/mean_length",), ".0f"),
    ),
}
THROUGHPUT = "throughput/completion_tokens_per_s"
PLAIN_LINE_EVERY_S = 5.0

# Terminal escape sequences, control characters but for tab and newline, and the marks that reorder text.
_UNPRINTABLE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


def printable(text: str, encoding: str = "utf-8") -> str:
    """Text that cannot move the cursor, recolour or reorder a terminal, in characters that the encoding has."""
    return _UNPRINTABLE.sub("", text).encode(encoding, "replace").decode(encoding)


class RunLog:
    """The record of one stage. A context manager; on ranks other than 0 every method does nothing.

    Steps count from 0 and only grow. `first_step` is the one that runs next: a resumed run drops what was recorded from
    there on, since it will do those steps again, and its clock goes on from the last step kept.
    """

    def __init__(
        self,
        directory: Path,
        stage: str,
        total_steps: int,
        *,
        first_step: int = 0,
        rank: int = 0,
        console: bool = True,
        loggers: Sequence[str] = ("tensorboard",),
        report_every_s: float = 0.0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            loggers: where metrics go beside metrics.jsonl; names in agrpo.reporting.loggers.LOGGERS.
            report_every_s: seconds between two writings of the run's report.html, which is written at the end too;
                0 writes none.
            config: the stage's configuration, plain and without secrets: the diagnostics and the loggers read it.
        """
        self.stage, self.total_steps = stage, total_steps
        self.latest: Mapping[str, float] = {}  # metrics of the last step
        self._silent = rank != 0
        if self._silent:
            return
        directory.mkdir(parents=True, exist_ok=True)
        metrics, samples = directory / "metrics.jsonl", directory / "samples.jsonl"
        for path in (metrics, samples):
            _cut(path, first_step)
        elapsed = max((row["time_s"] for row in read_jsonl(metrics)), default=0.0)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._samples = samples.open("a", encoding="utf-8")
        self._log = (directory / "log.txt").open("a", encoding="utf-8")
        self._directory, self._config = directory, config or {}
        name = f"{directory.parent.name}/{stage}"
        self._loggers = [LOGGERS[one](directory, name, first_step, self._config) for one in loggers]
        self._series = read_series(metrics)
        self._said = {finding.key for finding in self._diagnose()}
        self._diagnose_every = max(1, total_steps // 100)
        self._report_every_s, self._report_due = report_every_s, time.monotonic() + report_every_s

        now = time.monotonic()
        self._began = now - elapsed
        self._last_step = first_step - 1
        self._finished: deque[tuple[int, float]] = deque([(first_step, now)], maxlen=20)  # (steps done, when)
        self._printed_step, self._printed_at = first_step - 1, -PLAIN_LINE_EVERY_S
        self._console = Console(quiet=not console)
        # Not rich's is_terminal, which FORCE_COLOR makes true for a pipe.
        self._live = console and sys.stdout.isatty() and not self._console.is_dumb_terminal
        self._bar: Progress | None = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records a finished step. Values that are not finite are null in metrics.jsonl, under their key.

        Raises:
            ValueError: the step was recorded before, or a metric is called step or time_s.
        """
        if self._silent:
            return
        if step <= self._last_step:
            raise ValueError(
                f"step {step} comes after step {self._last_step}: a step is recorded once, with all it has"
            )
        if taken := {"step", "time_s"} & metrics.keys():
            raise ValueError(f"a metric may not be called {taken.pop()}: metrics.jsonl has that name already")
        now = time.monotonic()
        self.latest = metrics
        self._last_step = step
        self._finished.append((step + 1, now))
        self._metrics.write(to_json({"step": step, "time_s": round(now - self._began, 3), **metrics}) + "\n")
        self._metrics.flush()
        values = {name: float(value) for name, value in metrics.items()}
        for logger in self._loggers:
            logger.log(step, values)
        for name, value in values.items():
            if math.isfinite(value):
                steps, curve = self._series.setdefault(name, ([], []))
                steps.append(step + 1)
                curve.append(value)
        self._show(step, metrics, now)
        if (step + 1) % self._diagnose_every == 0 or step + 1 == self.total_steps:
            self._say_findings(step)
        if self._report_every_s and now >= self._report_due:
            self.report()

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps samples of a step: prompt, completion, each reward, advantage."""
        if self._silent:
            return
        for row in rows:
            self._samples.write(to_json({"step": step, **row}) + "\n")
        self._samples.flush()

    def note(self, text: str) -> None:
        """Says something once: on the console, and with the time in log.txt."""
        if self._silent:
            return
        text = printable(text)
        self._log.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {text}\n")
        self._log.flush()
        self._print(text)

    def report(self) -> None:
        """Writes the run's report.html. It takes a hundredth of the time at most, and no run ends for its sake."""
        if self._silent or not self._report_every_s:
            return
        began = time.monotonic()
        run = self._directory.parent
        try:
            write_report([run], run / REPORT)
            shutil.copyfile(run / REPORT, self._directory / REPORT)
        except Exception as error:  # the run is worth more than its picture: said, and the run goes on
            self.note(f"{REPORT} was not written: {type(error).__name__}: {error}")
        ended = time.monotonic()
        self._report_due = ended + max(self._report_every_s, 100 * (ended - began))

    def _diagnose(self) -> list[Finding]:
        return diagnose(self.stage, Record(self._series, self._config, self.total_steps))

    def _say_findings(self, step: int) -> None:
        """Each finding when it first holds, and once more, without the advice, if it does after the last step."""
        for finding in self._diagnose():
            if finding.key not in self._said:
                self._said.add(finding.key)
                self.note(f"step {step + 1}: {finding.in_words()}")
            elif step + 1 == self.total_steps:
                self.note(f"at the end: {finding.severity}: {finding.text}")

    def close(self) -> None:
        if self._silent:
            return
        self.report()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for file in (self._metrics, self._samples, self._log, *self._loggers):
            file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        done = step + 1
        line = " · ".join([f"{self._remaining()} left", *_headline(self.stage, metrics)])
        count = f"{self.stage} {done}/{self.total_steps}"
        if self._live:
            if self._bar is None:
                width = len(f"{self.stage} {self.total_steps}/{self.total_steps}")
                self._bar = Progress(
                    TextColumn("{task.description}", table_column=Column(min_width=width, no_wrap=True)),
                    BarColumn(12),
                    TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True)),
                    console=self._console,
                )
                self._bar.start()
                self._task = self._bar.add_task(count, total=self.total_steps, line=line)
            self._bar.update(self._task, completed=done, description=count, line=line)
            return
        tenth = max(1, self.total_steps // 10)
        due = now - self._printed_at >= PLAIN_LINE_EVERY_S or done >= self.total_steps
        if due or done // tenth > (self._printed_step + 1) // tenth:
            self._printed_step, self._printed_at = step, now
            self._print(f"{count}  {line}")

    def _remaining(self) -> str:
        """Time to go at the pace of the last steps, as h:mm:ss."""
        (first, since), (last, now) = self._finished[0], self._finished[-1]
        seconds = round(max(0, self.total_steps - last) * (now - since) / max(1, last - first))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _print(self, text: str) -> None:
        # As Text, since a completion may contain rich's markup; unwrapped, so that a log keeps one line a line.
        self._console.print(Text(printable(text, self._console.encoding)), soft_wrap=True)


def _headline(stage: str, metrics: Mapping[str, float]) -> list[str]:
    parts = []
    for label, names, form in HEADLINES.get(stage, HEADLINES["sft"]):
        name = next((name for name in names if name in metrics), None)
        if name is not None:
            parts.append(f"{label} {float(metrics[name]):{form}}")
    if THROUGHPUT in metrics:
        parts.append(f"{float(metrics[THROUGHPUT]):,.0f} tokens/s")
    return parts


def _cut(path: Path, first_step: int) -> None:
    """Keeps the lines of the steps before first_step."""
    if path.exists():
        replace(path, (to_json(row) + "\n" for row in read_jsonl(path) if row["step"] < first_step))

"""The session of a run: its directory, log, checkpoints and signals. The three stages' loops stand inside it."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import agrpo
from agrpo.config import StageConfig
from agrpo.engine import checkpoint, distributed
from agrpo.engine.hybrid import HybridEngine, TrainingDiverged
from agrpo.engine.modules import Policy, causal_lm
from agrpo.reporting.files import replace, to_json
from agrpo.reporting.hub import PushFailed, push_model
from agrpo.reporting.metrics import RunLog
from agrpo.reporting.model_card import model_card
from agrpo.reporting.summary import record
from agrpo.types import Demonstration, Experience, InputError, PreferenceGroup
from agrpo.yaml_input import ConfigError, to_yaml

RESUME_LATER = 75
_RESULT = "result.json"
# What may differ between a run and its resumption.
_FREE = {"run", "checkpoint", "logging", "evaluation", "hub"}


@contextmanager
def readable_errors() -> Iterator[None]:
    """Bad input ends with exit code 2 and one message instead of a traceback."""
    try:
        yield
    except InputError as error:
        if distributed.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class Session:
    """One stage's run, `runs/<name>/<stage>/`.

    A run that was interrupted resumes from its newest whole checkpoint; one that had finished starts over. SIGTERM and
    SIGINT end it after the step at hand, saved, with exit code 75.
    """

    def __init__(self, config: StageConfig, stage: str) -> None:
        distributed.start()
        self.config, self.stage = config, stage
        self.directory = config.run_root / stage
        self._checkpoints = self.directory / "checkpoints"
        self._began = time.monotonic()
        self._engine: HybridEngine | None = None
        self._tracked: Mapping[str, checkpoint.Stateful] = {}
        self._save_model: Callable[[Path], None] | None = None
        self._found = self._look_for_checkpoint()
        self.first_step = self._found[1]["step"] if self._found else 0
        distributed.barrier()
        if distributed.rank() == 0:
            self._prepare_directory()
        distributed.barrier()
        self.log = RunLog(
            self.directory,
            stage,
            config.training.max_steps,
            first_step=self.first_step,
            rank=distributed.rank(),
            console=config.logging.console,
        )
        self._stop_asked = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: object) -> None:
        if self._stop_asked:
            raise KeyboardInterrupt
        self._stop_asked = True

    def _look_for_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        if not self.config.checkpoint.resume or (self.directory / _RESULT).exists():
            return None
        found = checkpoint.newest(self._checkpoints)
        if found is not None:
            changed = _differences(found[1]["config"], _identity(self.config))
            if changed:
                raise ConfigError(
                    f"{self._checkpoints}: holds an unfinished run with another configuration"
                    f" ({', '.join(changed)} differ): give this one another run.name, restore those keys,"
                    " or start over with checkpoint.resume=false"
                )
        return found

    def _prepare_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._found is None:
            for stale in ("checkpoints", "tensorboard", "model"):
                shutil.rmtree(self.directory / stale, ignore_errors=True)
        for name in (_RESULT, "diverged.json"):
            (self.directory / name).unlink(missing_ok=True)
        (self.directory / "config.yaml").write_text(f"{_provenance()}{to_yaml(self.config)}", encoding="utf-8")

    def restore(self, engine: HybridEngine, **tracked: checkpoint.Stateful) -> None:
        """Name what checkpoints hold, and load it when this run resumes."""
        self._engine, self._tracked = engine, tracked
        if self._found is not None:
            checkpoint.load(*self._found, engine, tracked)
            self.log.note(f"resumed from {self._found[0]}")

    def push_saves(self, save_model: Callable[[Path], None]) -> None:
        """With `hub.strategy: every_save` each checkpoint's model goes to the Hub too, saved by this."""
        if self.config.hub.push is not None and self.config.hub.strategy == "every_save":
            self._save_model = save_model

    def steps(self) -> Iterator[int]:
        """The steps that remain. After each, a checkpoint when one is due, and an orderly end when a signal came."""
        every, total = self.config.checkpoint.every, self.config.training.max_steps
        for step in range(self.first_step, total):
            skipped = self._engine.skipped_steps
            yield step
            if self._engine.skipped_steps > skipped:
                self.log.note(
                    f"step {step}: loss or gradient not finite in {self._engine.skipped_steps - skipped} optimiser"
                    f" step(s): skipped, weights unchanged; {self._engine.skipped_in_a_row} in a row by now"
                )
            stop = distributed.max_over_ranks(int(self._stop_asked)) > 0
            if stop or (every and (step + 1) % every == 0) or (every and step + 1 == total):
                self._save(step + 1)
            if stop:
                self.log.note(f"stopped by a signal after step {step + 1}, saved: run again to resume")
                self.log.close()
                raise SystemExit(RESUME_LATER)

    @contextmanager
    def guard(self, step: int, batch: Experience | Sequence[Demonstration | PreferenceGroup]) -> Iterator[None]:
        """Around an update: if training has diverged, its batch is kept in diverged.json, all ranks' rows together."""
        try:
            yield
        except TrainingDiverged as error:
            finite = self._engine.losses_finite
            own = [{"rank": distributed.rank(), "loss_finite": finite, **row} for row in _texts(batch)]
            rows = [row for of_rank in distributed.gather_objects(own) for row in of_rank]
            if distributed.rank() == 0:
                version = self._engine.weight_version
                told = {"step": step, "weight_version": version, "error": str(error), "batch": rows}
                replace(self.directory / "diverged.json", [to_json(told)])
            self.log.note(f"step {step}: {error}")
            self.log.close()
            raise

    def _save(self, step: int) -> None:
        state = {name: one.state_dict() for name, one in self._tracked.items()}
        state["config"] = _identity(self.config)
        checkpoint.save(self._checkpoints, step, self._engine, state, self.config.checkpoint.keep)
        if self._save_model is not None:
            self._engine.generation_mode()
            if distributed.rank() == 0:
                folder = self.directory / ".model.pushed"
                self._write_model(folder, self._save_model, {"step": step})
                self._push(folder, f"step {step}")
                shutil.rmtree(folder)
            distributed.barrier()

    def _write_model(self, folder: Path, save_model: Callable[[Path], None], results: Mapping[str, Any]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_model(folder)
        (folder / "README.md").write_text(model_card(self.config, self.stage, results), encoding="utf-8")

    def _push(self, folder: Path, message: str) -> None:
        """To the Hub. A run does not end for it: the model is on disk, and can be pushed again."""
        hub = self.config.hub
        try:
            self.log.note(f"pushed {message}: {push_model(folder, hub.push, message, private=hub.private)}")
        except PushFailed as error:
            again = f"agrpo push {self.directory} {hub.push}" + ("" if hub.private else " --public")
            self.log.note(f"{message} was not pushed: {error}; once the run is done: {again}")

    def notes(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.log.note(text)

    def describe(self, policy: Policy) -> None:
        """Say how large the model is, what of it learns, and why it is not on the fast path when it is not."""
        total = sum(p.numel() for p in policy.parameters())
        learns = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        self.log.note(
            f"model: {causal_lm(policy.lm).config.model_type}, {total:,} parameters, {learns:,} of them learn"
        )
        if policy.fallback_reason is not None:
            self.log.note(f"plain rows instead of the flat layout: {policy.fallback_reason}")

    def evaluation_due(self, step: int) -> bool:
        """Is the validation data looked at after this step?"""
        every = self.config.evaluation.every
        return bool(every) and self.config.evaluation.data is not None and (step + 1) % every == 0

    def finish(self, results: Mapping[str, Any], save_model: Callable[[Path], None]) -> None:
        """Save the model, record the results; the last thing that a stage does."""
        if distributed.rank() == 0:
            partial, final = self.directory / ".model.partial", self.directory / "model"
            self._write_model(partial, save_model, results)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            seconds = time.monotonic() - self._began
            record(self.config.run_root, self.stage, results, seconds, self.config.seed)
            text = json.dumps({"results": results, "seconds": seconds}, indent=1)
            (self.directory / _RESULT).write_text(text, encoding="utf-8")
            if self.config.hub.push is not None:
                self._push(final, "the finished model")
        distributed.barrier()
        self.log.note(f"{self.stage}: model in {self.directory / 'model'}")
        self.log.close()
        distributed.stop()


def _texts(batch: Experience | Sequence[Demonstration | PreferenceGroup]) -> list[dict[str, Any]]:
    """A batch's rows for a person to read: prompt and completions, of an experience the rewards too."""
    if isinstance(batch, Experience):
        rollout = batch.rollout
        prompts = [rollout.prompts[p].text for p in rollout.group.tolist()]
        columns = zip(prompts, rollout.texts, batch.rewards.tolist(), strict=True)
        return [{"prompt": prompt, "completion": text, "reward": reward} for prompt, text, reward in columns]
    kept = ("prompt", "completion", "completions", "levels")
    return [{key: value for key, value in vars(row).items() if key in kept} for row in batch]


def _identity(config: StageConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json", by_alias=True, exclude=_FREE)
    del values["training"]["max_steps"]
    return values


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [path]


def _provenance() -> str:
    """Versions and the git revision, as YAML comments: the file remains a configuration that can be run again."""
    packages = ("torch", "transformers", "deepspeed", "peft")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    revision = git.stdout.strip() or "unknown"
    return f"# agrpo {agrpo.__version__}, revision {revision}, Python {platform.python_version()}\n# {versions}\n"

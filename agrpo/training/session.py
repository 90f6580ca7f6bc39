"""The session of a run: its directory, log, checkpoints and signals. The three stages' loops stand inside it."""

from __future__ import annotations

import errno
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import agrpo
from agrpo import job
from agrpo.config import StageConfig
from agrpo.engine import checkpoint, distributed
from agrpo.engine.hybrid import HybridEngine, TrainingDiverged
from agrpo.engine.modules import Policy, causal_lm
from agrpo.engine.out_of_memory import MicroBatches
from agrpo.reporting.files import replace, to_json
from agrpo.reporting.hub import PushFailed, push_model
from agrpo.reporting.metrics import RunLog
from agrpo.reporting.model_card import model_card
from agrpo.reporting.summary import record
from agrpo.training.randomness import RandomState, seed_generators
from agrpo.training.spikes import Spikes
from agrpo.types import Demonstration, Experience, InputError, PreferenceGroup
from agrpo.yaml_input import ConfigError, redacted, to_yaml

RESUME_LATER = 75
_RESULT = "result.json"
# What may differ between a run and its resumption.
_FREE = {"run", "checkpoint", "logging", "evaluation", "hub"}
_LEFTOVER = re.compile(r"^\.(model\.(partial|pushed)|.+\.\d+)$")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Bad input ends with exit code 2, a full disk with 1, and one message instead of a traceback."""
    try:
        yield
    except InputError as error:
        _say(f"{error}")
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        if not _no_room(error):
            raise
        where = getattr(error, "filename", None) or "a file of the run"
        _say(
            f"{where}: the disk is full ({error}). Checkpoints that were there are whole: free some space, and the same"
            " command resumes"
        )
        raise SystemExit(1) from None


def _no_room(error: Exception) -> bool:
    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"os error (\d+)", str(error))):  # safetensors' way
        number = int(told[1])
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _say(message: str) -> None:
    """Once for all ranks: the launcher prints the message of the first one that fails."""
    if not job.report(message) and distributed.rank() == 0:
        print(f"error: {message}", file=sys.stderr)


class Session:
    """One stage's run, `runs/<name>/<stage>/`.

    A run that was interrupted resumes from its newest whole checkpoint; one that had finished starts over. SIGTERM,
    SIGUSR1 and SIGINT end it after the optimiser step at hand, saved, with exit code 75.

    `results`: what was measured so far; it is in the checkpoint.
    """

    def __init__(self, config: StageConfig, stage: str) -> None:
        job.listen()
        distributed.start()
        seed_generators(config.seed, distributed.rank())
        self.config, self.stage = config, stage
        self.directory = config.run_root / stage
        self.results: dict[str, Any] = {}
        self._checkpoints = self.directory / "checkpoints"
        self._began = time.monotonic()
        self._engine: HybridEngine | None = None
        self._tracked: dict[str, checkpoint.Stateful] = {}
        self._save_model: Callable[[Path], None] | None = None
        self._found, damaged = self._look_for_checkpoint()
        self.first_step = self._step = self._found.state["step"] if self._found else 0
        leftovers = self._prepare_directory() if distributed.rank() == 0 else []
        distributed.barrier()
        options = config.checkpoint
        best = {"max": max, "min": min}[options.best_mode] if options.best_metric else None
        self._writer = checkpoint.Writer(
            self._checkpoints, checkpoint.Keep(options.keep, best), asynchronous=options.asynchronous
        )
        self.log = RunLog(
            self.directory,
            stage,
            config.training.max_steps,
            first_step=self.first_step,
            rank=distributed.rank(),
            console=config.logging.console,
            loggers=config.logging.loggers,
            report_every_s=config.logging.report_every_s,
            config=redacted(config),
        )
        self._spikes = Spikes()
        self._micro_batches = MicroBatches(config.training.micro_batch_tokens, self.log.note)
        self.notes(f"checkpoint passed over: {why}" for why in damaged)
        self.notes(f"left half written by a run that was killed, removed: {name}" for name in leftovers)

    def _look_for_checkpoint(self) -> tuple[checkpoint.Found | None, list[str]]:
        if not self.config.checkpoint.resume or (self.directory / _RESULT).exists():
            return None, []
        own = checkpoint.newest(self._checkpoints) if distributed.rank() == 0 else None
        found, damaged = distributed.gather_objects(own)[0]
        if found is None and damaged:
            raise checkpoint.CheckpointError(
                f"{self._checkpoints}: no whole checkpoint is left: {'; '.join(damaged)}; bring one back,"
                " or start over with checkpoint.resume=false"
            )
        if found is not None:
            changed = _differences(found.state["config"], _identity(self.config))
            if changed:
                raise ConfigError(
                    f"{self._checkpoints}: holds an unfinished run with another configuration"
                    f" ({', '.join(changed)} differ): give this one another run.name, restore those keys,"
                    " or start over with checkpoint.resume=false"
                )
            checkpoint.require_world(found.path, found.state)
        return found, damaged

    def _prepare_directory(self) -> list[str]:
        """Make it ready for this run; the names of what a killed one left half written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._found is None:
            for stale in ("checkpoints", "tensorboard", "model"):
                shutil.rmtree(self.directory / stale, ignore_errors=True)
        leftovers = checkpoint.remove_leftovers(self._checkpoints)
        checkpoint.set_aside(self._checkpoints)
        for path in self.directory.glob(".*"):
            if _LEFTOVER.match(path.name):
                leftovers.append(path.name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in (_RESULT, "diverged.json"):
            (self.directory / name).unlink(missing_ok=True)
        (self.directory / "config.yaml").write_text(f"{_provenance()}{to_yaml(self.config)}", encoding="utf-8")
        return leftovers

    def restore(self, engine: HybridEngine, **tracked: checkpoint.Stateful) -> None:
        """Name what checkpoints hold, and load it when this run resumes. A signal that came before ends the run here.

        Each rank has a state of its own of every tracked object; it may hold tensors.
        """
        self._engine, self._tracked = engine, {"random": RandomState(), **tracked}
        if self._found is not None:
            path, state = self._found.path, self._found.state
            if state["reference"] != engine.reference_hash:
                raise checkpoint.CheckpointError(
                    f"{path}: was trained against another reference than this run's model: restore the model that it"
                    " began with, or start over with checkpoint.resume=false"
                )
            checkpoint.load(path, state, engine, self._tracked)
            self.results = state["results"]
            self.log.note(f"resumed from {path}")
        if distributed.max_over_ranks(int(job.stop_asked())):
            self._leave("before the first step", self._save(self.first_step) if self._found is None else None)

    def push_saves(self, save_model: Callable[[Path], None]) -> None:
        """With `hub.strategy: every_save` each checkpoint's model goes to the Hub too, saved by this."""
        if self.config.hub.push is not None and self.config.hub.strategy == "every_save":
            self._save_model = save_model

    def steps(self) -> Iterator[int]:
        """The steps that remain. After each, a checkpoint when one is due, and an orderly end when a signal came."""
        every, total = self.config.checkpoint.every, self.config.training.max_steps
        for step in range(self.first_step, total):
            self._step = step
            job.enter("begin", step)
            skipped = self._engine.skipped_steps
            yield step
            if self._engine.skipped_steps > skipped:
                self.log.note(
                    f"step {step}: loss or gradient not finite in {self._engine.skipped_steps - skipped} optimiser"
                    f" step(s): skipped, weights unchanged; {self._engine.skipped_in_a_row} in a row by now"
                )
            self.notes(self._spikes.observe(step, self.log.latest))
            asked = distributed.sum_over_ranks({"stop": job.stop_asked(), "writing": self._writer.busy})
            if self._writer.pending and not asked["writing"]:
                self._tell(self._writer.settle())
            error = None
            if asked["stop"] or (every and (step + 1) % every == 0) or (every and step + 1 == total):
                error = self._save(step + 1)
            if asked["stop"]:
                self._leave(f"after step {step + 1}", error or self._tell(self._writer.settle()))
        self._tell(self._writer.settle())
        job.enter("after the last step")

    def in_micro_batches(self, update: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """`update(config)` with micro-batches of the configuration's size, or smaller since memory ran out."""
        tried = self._micro_batches
        return tried.run(self._engine, lambda tokens: update(self.config.with_micro_batches(tokens)))

    def pause(self, update: int) -> None:
        """Between two updates of a rollout, `update` of them done: a signal that came ends the run here, saved."""
        if distributed.max_over_ranks(int(job.stop_asked())):
            error = self._save(self._step, update) or self._tell(self._writer.settle())
            self._leave(f"after update {update} of step {self._step + 1}", error)

    def _leave(self, where: str, error: str | None) -> None:
        if error:
            self.log.note(f"stopped by a signal {where}, NOT saved: the checkpoints before are as they were")
        else:
            self.log.note(f"stopped by a signal {where}, saved: run again to resume")
        self.log.close()
        job.stopped()
        raise SystemExit(1 if error else RESUME_LATER)

    def _save(self, step: int, update: int = 0) -> str | None:
        """Why the checkpoint could not be written, or None. The run goes on without: a full disk may be emptied."""
        job.enter("save")
        shared = {
            "config": _identity(self.config),
            "reference": self._engine.reference_hash,
            "results": self.results,
        }
        own = {name: one.state_dict() for name, one in self._tracked.items()}
        score = None
        if self.config.checkpoint.best_metric and not update:
            score = self.log.latest.get(self.config.checkpoint.best_metric)
        error = self._tell(self._writer.save(step, self._engine, own, shared, update=update, score=score))
        if self._save_model is not None and not update:
            self._push_step(step)
        return error

    def _tell(self, error: str | None) -> str | None:
        if error:
            self.log.note(f"checkpoint not written: {error}; the checkpoints before are as they were, the run goes on")
        return error

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

    def _push_step(self, step: int) -> None:
        self._engine.gather()
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

    def measures_before(self) -> bool:
        """Is the test data looked at before the first step? Once: a run that stopped after it has its results."""
        return self.config.evaluation.test_before and self.first_step == 0 and not self.results

    def finish(self, results: Mapping[str, Any], save_model: Callable[[Path], None]) -> None:
        """Save the model, record the results; the last thing that a stage does."""
        job.enter("finish")
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
    """What a checkpoint's run and its resumption must have in common, secrets redacted."""
    values = redacted(config)
    for key in ("max_steps", "micro_batch_tokens"):  # the gradient does not depend on how a step is cut
        del values["training"][key]
    return {key: value for key, value in values.items() if key not in _FREE}


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

"""A grid of cells, rows × methods × seeds: typed, and every cell's configuration resolved before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from agrpo.config import PolicyConfig, SFTConfig, StageConfig, resolve
from agrpo.config.base import Count, NonEmpty, Section
from agrpo.yaml_input import ConfigError, explain, merge, read_yaml, set_path, to_yaml

Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
Settings = dict[str, Any]
# What a grid decides for its cells.
_OWNED = ("seed", "run")
# What may differ between a finished cell and the one that is asked for.
_FREE = ("run", "logging", "checkpoint", "hub")


class StageSpec(Section):
    """A stage's configuration file, and what the whole grid changes in it."""

    config: Path
    settings: Settings = {}


class MethodSpec(Section):
    label: NonEmpty
    settings: Settings = {}


class RowSpec(Section):
    """One ablation: what it changes under every method, and what under one of them alone."""

    label: NonEmpty
    note: str = ""
    settings: Settings = {}
    methods: dict[Name, Settings] = {}


class Claim(Section):
    """What is said of a method, as a band for a number that is measured; see `agrpo.ablation.claims`."""

    text: NonEmpty
    measure: Literal["reward", "training_reward", "kl", "entropy", "length", "advantage_variance", "win"]
    compared: Literal["difference", "ratio", "kept"] = "difference"
    band: tuple[float | None, float | None]  # null: no end

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        low, high = self.band
        if low is None and high is None:
            raise ValueError("band: has no end at all, so nothing could refute it; give one")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"band: {low} ≥ {high}; write the lower end first")
        if self.compared == "kept" and self.measure not in ("kl", "entropy", "advantage_variance", "training_reward"):
            raise ValueError(f"compared: kept reads a run's steps, which have no {self.measure}")
        return self


class Grid(Section):
    name: Name
    dir: Path = Path("runs")
    sft: StageSpec
    policy: StageSpec
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    baseline: Name
    methods: Annotated[dict[Name, MethodSpec], Field(min_length=2, max_length=2)]
    rows: Annotated[dict[Name, RowSpec], Field(min_length=1)]
    full: Name = "full"  # the row that claims are about, and that others are compared with
    window: Count = 10  # last steps over which KL, entropy and the training reward are averaged
    claims: list[Claim] = []

    @property
    def root(self) -> Path:
        return self.dir / self.name

    @property
    def method(self) -> str:
        """The one that is compared with the baseline."""
        return next(name for name in self.methods if name != self.baseline)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.baseline not in self.methods:
            raise ValueError(f"baseline: {self.baseline} is none of the methods: {', '.join(self.methods)}")
        if self.full not in self.rows:
            raise ValueError(f"full: {self.full} is none of the rows: {', '.join(self.rows)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands there twice; a seed is run once")
        for name, row in self.rows.items():
            if unknown := set(row.methods) - set(self.methods):
                raise ValueError(f"rows.{name}.methods: {unknown.pop()} is none of {', '.join(self.methods)}")
        parts = {"sft": self.sft.settings, "policy": self.policy.settings}
        parts |= {f"methods.{name}": method.settings for name, method in self.methods.items()}
        parts |= {f"rows.{name}": row.settings for name, row in self.rows.items()}
        parts |= {f"rows.{name}.methods.{m}": s for name, row in self.rows.items() for m, s in row.methods.items()}
        for where, settings in parts.items():
            for key in _OWNED:
                if key in settings:
                    raise ValueError(f"{where}: settings: {key}: is the grid's own to set; remove it")
        return self


@dataclass(frozen=True)
class Job:
    """One run of a stage."""

    name: str
    stage: str  # sft or agrpo
    seed: int
    values: Mapping[str, Any]  # what its configuration file holds
    config: StageConfig  # the same, resolved

    @property
    def directory(self) -> Path:
        return self.config.run_root / self.stage

    @property
    def finished(self) -> bool:
        return (self.directory / "result.json").exists()

    def changed(self) -> list[str]:
        """The keys in which what stands in its directory differs from what is asked for; none where nothing stands."""
        path = self.directory / "config.yaml"
        if not path.exists():
            return []
        there, asked = (dict(_leaves(values)) for values in (read_yaml(path), yaml.safe_load(to_yaml(self.config))))
        keys = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
        return [key for key in keys if key.split(".")[0] not in _FREE]


@dataclass(frozen=True)
class Cell:
    """A place in the grid, and the run that fills it. Places whose configurations are the same share one run."""

    row: str
    method: str
    seed: int
    job: Job


@dataclass(frozen=True)
class Plan:
    """Everything that a grid runs, resolved."""

    grid: Grid
    sft: tuple[Job, ...]  # one a seed
    cells: tuple[Cell, ...]  # seed by seed, so that whole seeds are done first

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The cells' runs, each once."""
        return tuple({cell.job.name: cell.job for cell in self.cells}.values())

    def cell(self, row: str, method: str, seed: int) -> Cell:
        return next(c for c in self.cells if (c.row, c.method, c.seed) == (row, method, seed))

    def same_as(self, cell: Cell) -> str | None:
        """The row whose run this cell shares; None where it has its own."""
        first = next(c for c in self.cells if c.job is cell.job)
        return first.row if first.row != cell.row else None


def read_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """The grid of a file, with `key.path=value` over it.

    Raises:
        ConfigError: file, key and the mend.
    """
    values = read_yaml(path)
    for override in overrides:
        set_path(values, override)
    try:
        return Grid.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, Grid, path)) from None


def plan(grid: Grid, path: Path) -> Plan:
    """Every run of the grid, its configuration resolved.

    Args:
        path: of the grid, for errors.

    Raises:
        ConfigError: what is wrong in which cell; of all cells of the first seed that has errors.
    """
    files = {stage: read_yaml(spec.config) for stage, spec in (("sft", grid.sft), ("policy", grid.policy))}
    sft: list[Job] = []
    cells: list[Cell] = []
    for seed in grid.seeds:
        stage_1 = _job(
            *("sft", f"sft-seed{seed}", seed, path, f"sft, seed {seed}"),
            *(files["sft"], grid.sft.settings, _run(grid.root, f"sft-seed{seed}", seed)),
        )
        sft.append(stage_1)
        cells += _cells_of_seed(grid, path, files["policy"], stage_1)
    return Plan(grid, tuple(sft), tuple(cells))


def _cells_of_seed(grid: Grid, path: Path, file: Settings, sft: Job) -> Iterator[Cell]:
    own: dict[str, Job] = {}  # by what their configurations say
    problems: list[str] = []
    for row, spec in grid.rows.items():
        for method, settings in grid.methods.items():
            name = f"{row}-{method}-seed{sft.seed}"
            fixed = _run(grid.root / "cells", name, sft.seed) | {
                "model": {"name_or_path": str(sft.directory / "model")}
            }
            parts = (grid.policy.settings, settings.settings, spec.settings, spec.methods.get(method, {}), fixed)
            try:
                job = _job("agrpo", name, sft.seed, path, f"rows.{row}, {method}, seed {sft.seed}", file, *parts)
                _require_same_test(sft.config, job.config, path)
            except ConfigError as error:
                problems += [line for line in str(error).splitlines() if line not in problems]
                continue
            yield Cell(row, method, sft.seed, own.setdefault(_identity(job.config), job))
    if problems:
        raise ConfigError("\n".join(problems))


def _run(directory: Path, name: str, seed: int) -> Settings:
    return {"seed": seed, "run": {"dir": str(directory), "name": name}}


def _job(stage: str, name: str, seed: int, path: Path, where: str, *layers: Settings) -> Job:
    values = reduce(merge, layers)
    config = resolve(stage, values, Path(f"{path} ({where})"), models_exist=False)
    if "…redacted…" in to_yaml(config):
        raise ConfigError(
            f"{path} ({where}): holds a secret, which would stand in the cells' files; name an environment variable"
            " that holds it instead"
        )
    return Job(name, stage, seed, values, config)


def _require_same_test(sft: SFTConfig, policy: PolicyConfig, path: Path) -> None:
    """Wins over the SFT model are counted prompt by prompt."""
    if policy.evaluation.test is None:
        raise ConfigError(f"{path}: policy: evaluation.test: is what the cells are measured on; give it")
    if sft.evaluation.test != policy.evaluation.test:
        raise ConfigError(
            f"{path}: sft and policy have different evaluation.test; wins are counted on the same prompts"
        )


def _identity(config: StageConfig) -> str:
    return str(sorted(_leaves(config.model_dump(mode="json", by_alias=True, exclude={"run"}))))


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, values

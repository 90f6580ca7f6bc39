"""What `agrpo eval` and `agrpo compare` share: their command line, and a model measured as it says."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from agrpo.config import EnvironmentConfig, RewardSpec, RolloutConfig, SamplingConfig
from agrpo.data.records import PromptRow, Records
from agrpo.evaluation.benchmarks import BENCHMARKS, Benchmark, find_benchmark, read_benchmark, task_of
from agrpo.evaluation.runs import stage_directory
from agrpo.types import InputError
from agrpo.yaml_input import read_value

if TYPE_CHECKING:
    from agrpo.evaluation.measure import Grading

RESUME_LATER = 75
_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".gz")
_ACCURACY = "reward_models.rules.accuracy"
MakeGrading = Callable[[list[RewardSpec], str | None], "Grading"]


def add_data(options: argparse.ArgumentParser) -> None:
    data = options.add_argument_group("data")
    data.add_argument("--benchmark", metavar="NAME", help=", ".join([*BENCHMARKS, "reasoning_gym:TASK"]))
    data.add_argument("--data", metavar="SOURCE", help="a file, reasoning_gym:TASK, python:MODULE:FUNCTION or a Hub id")
    data.add_argument("--split", help="of the data (default: test)")
    data.add_argument(
        "--parameters", metavar="YAML", default="{}", help="of the source, such as '{size: 200, seed: 7}'"
    )
    data.add_argument("--prompt-column", metavar="C", help="default: prompt, or the benchmark's")
    data.add_argument("--answer-column", metavar="C", help="what the accuracy rule reads (default: solution)")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    data.add_argument("--skip-bad-rows", action="store_true", help="count and tell rows that cannot be used")
    data.add_argument("--template", metavar="TEXT", help="{prompt} stands for the row's prompt")
    data.add_argument("--chat", action=argparse.BooleanOptionalAction, help="string prompts as a user's turn")
    data.add_argument("--system", metavar="TEXT", help="a system turn before it")
    sampling = options.add_argument_group("sampling")
    sampling.add_argument("--samples", type=int, default=8, metavar="K", help="of a prompt; 0 for greedy alone")
    sampling.add_argument("--no-greedy", action="store_true", help="samples alone")
    sampling.add_argument("--temperature", type=float, default=1.0)
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--top-k", type=int, default=0, help="0 keeps all")
    sampling.add_argument(
        "--max-tokens", type=int, metavar="N", help="of a completion (default: the benchmark's, 2048)"
    )
    sampling.add_argument("--max-prompt-tokens", type=int, default=4096, metavar="N")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion")
    sampling.add_argument(
        "--environment",
        metavar="TARGET",
        help="what answers between turns: an import path, or YAML with its parameters",
    )
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    sampling.add_argument("--backend", choices=("native", "vllm"), default="native")
    sampling.add_argument("--max-sequences", type=int, default=256, help="completions that decode together")
    options.add_argument("--again", action="store_true", help="start over instead of resuming")


def add_grading(options: argparse.ArgumentParser) -> None:
    grading = options.add_argument_group("grading")
    grading.add_argument(
        "--reward", action="append", metavar="TARGET", help="an import path, or YAML of a rewards entry"
    )
    grading.add_argument("--pass-at", type=float, default=1.0, metavar="R", help="passes from this weighted reward on")
    grading.add_argument("--vote", metavar="PATH", help="import path of what reads an answer for maj@k; none for none")
    grading.add_argument("--run-code", action="store_true", help="consent to running programs that the model wrote")
    grading.add_argument("--k", metavar="LIST", help="of pass@k, such as 1,4,8 (default: powers of two)")


def exit_code(main: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """Run a command: 2 and one message for bad input, 75 where a signal ended it and the same command goes on."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return main(arguments) or 0
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept; run the same command again to go on", file=sys.stderr)
        return RESUME_LATER
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def sample_sizes(options: argparse.Namespace) -> list[int] | None:
    """The k of pass@k that --k lists."""
    if options.k is None:
        return None
    try:
        sizes = [int(size) for size in options.k.split(",")]
    except ValueError:
        raise InputError(f"--k: {options.k!r} is not a list of numbers such as 1,4,8") from None
    for size in sizes:
        if not 1 <= size <= options.samples:
            raise InputError(f"--k: {size} is not between 1 and --samples {options.samples}")
    return sizes


def benchmark_of(options: argparse.Namespace) -> Benchmark:
    """The benchmark that the options name, or a record of the user's data."""
    source = options.data or ""
    if options.benchmark and options.benchmark.startswith("reasoning_gym:"):
        benchmark = task_of(options.benchmark)
    elif options.benchmark:
        benchmark = find_benchmark(options.benchmark)
    elif not source:
        raise InputError("nothing to measure on: give --benchmark NAME, --data SOURCE, or both (a local copy)")
    elif source.startswith("reasoning_gym:"):
        benchmark = task_of(source)
    else:
        name = Path(source).name.partition(".")[0] if Path(source).exists() else source
        benchmark = Benchmark("".join(c if c.isalnum() else "-" for c in name), source, chat=False)
    columns = dict(benchmark.columns)
    for ours, theirs in (("prompt", options.prompt_column), ("solution", options.answer_column)):
        if theirs is not None:
            columns[ours] = theirs
    return replace(benchmark, columns=columns)


def rows_of(options: argparse.Namespace, benchmark: Benchmark) -> Records[PromptRow]:
    """The prompts, at most `limit`; the benchmark's own source, or what --data says."""
    source = options.data
    path = Path(source) if source and (Path(source).exists() or Path(source).suffix in _ENDINGS) else None
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit: {options.limit} is not a number of rows")
    own = source is None or source == benchmark.source
    rows = read_benchmark(
        benchmark,
        path=path,
        source=None if own or path else source,
        split=options.split,
        parameters=read_value(options.parameters, "--parameters", dict),
        chat=options.chat,
        template=options.template,
        system=options.system,
        skip_bad_rows=options.skip_bad_rows,
    )
    return rows if options.limit is None else replace(rows, items=rows.items[: options.limit])


def specs_of(options: argparse.Namespace, benchmark: Benchmark | None = None) -> list[RewardSpec]:
    """The rewards that --reward names, or the benchmark's grader."""
    asked = options.reward or [benchmark.reward]
    values = []
    for text in asked:
        value = read_value(text, "--reward", str, dict)
        value = {"target": value} if isinstance(value, str) else value
        if benchmark is not None and value.get("target") == benchmark.reward:
            value = {**benchmark.parameters_of_reward, **value}
        if str(value.get("target", "")).rpartition(".")[2] == "code" and options.run_code:
            value = {"enabled": True, **value}
        values.append(value)
    try:
        return [RewardSpec.model_validate(value) for value in values]
    except ValidationError as error:
        raise InputError(f"--reward: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def environment_of(options: argparse.Namespace) -> EnvironmentConfig | None:
    """What --environment names."""
    if options.environment is None:
        return None
    value = read_value(options.environment, "--environment", str, dict)
    try:
        return EnvironmentConfig.model_validate({"target": value} if isinstance(value, str) else value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"--environment: {where} {problem['msg'].removeprefix('Value error, ')}".strip()) from None


def rollout_of(options: argparse.Namespace) -> RolloutConfig:
    try:
        return RolloutConfig(backend=options.backend, max_sequences=options.max_sequences)
    except ValidationError as error:
        raise InputError(f"--backend: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def how_of(options: argparse.Namespace, benchmark: Benchmark) -> dict[str, Any]:
    """The fields of `measure.How`."""
    if options.samples < 0 or (options.samples == 0 and options.no_greedy):
        raise InputError(f"--samples: {options.samples}: there would be nothing to measure")
    if not options.temperature > 0:
        raise InputError(f"--temperature: {options.temperature} is not above 0; --samples 0 measures greedy alone")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed: {options.seed} is not in [0, 2³²)")
    try:
        RolloutConfig(max_sequences=options.max_sequences)
        sampling = SamplingConfig(
            max_prompt_length=options.max_prompt_tokens,
            max_completion_length=options.max_tokens or benchmark.max_completion_length,
            top_k=options.top_k,
            top_p=options.top_p,
            stop=options.stop,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}") from None
    if options.backend == "vllm" and sampling.stop:
        raise InputError("--stop: vLLM is given no tokenizer here; use --backend native")
    return dict(
        samples=options.samples,
        greedy=not options.no_greedy,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_prompt_length=options.max_prompt_tokens,
        max_completion_length=sampling.max_completion_length,
        stop=tuple(options.stop),
        pass_at=options.pass_at,
        seed=options.seed,
        dtype=options.dtype,
    )


def out_of(model: str, benchmark: Benchmark) -> Path:
    """Beside a run's model, else under evaluations/; the settings' digest keeps evaluations apart."""
    stage = stage_directory(model)
    where = stage / "evaluations" if stage is not None else Path("evaluations") / Path(model).name
    return where / f"{benchmark.name}-{{identity}}"


def evaluate(
    options: argparse.Namespace, model: str, out: Path | None, make_grading: MakeGrading | None
) -> tuple[Benchmark, Records[PromptRow], list[dict[str, Any]]]:
    """Measure a model; what can be wrong quickly is found before anything heavy loads.

    Args:
        make_grading: the rewards, and what reads votes, from their names; None keeps completions without grades.
    """
    benchmark = benchmark_of(options)
    how_values, rollout, environment = how_of(options, benchmark), rollout_of(options), environment_of(options)
    specs = [] if make_grading is None else specs_of(options, benchmark)
    data = rows_of(options, benchmark)
    vote = None if make_grading is None else vote_of(options, benchmark, data)
    if any(spec.target == _ACCURACY for spec in specs) and "solution" not in data[0].columns:
        there = ", ".join(data[0].columns) or "none but the prompt"
        raise InputError(f"--answer-column: say which column has the answers; there are {there}; or grade by --reward")
    from agrpo.engine import distributed
    from agrpo.evaluation.measure import Grading, How, measure

    if "RANK" in os.environ:
        distributed.start()

    def note(text: str) -> None:
        if distributed.rank() == 0:
            print(text, file=sys.stderr, flush=True)

    note(f"{benchmark.name}: {data.summary()}")
    grading = Grading(None, None) if make_grading is None else make_grading(specs, vote)
    out = out or out_of(model, benchmark)
    how = How(**how_values)
    rows = measure(model, data, grading, how, rollout, out, note, environment=environment, again=options.again)
    return benchmark, data, rows


def vote_of(options: argparse.Namespace, benchmark: Benchmark, data: Records[PromptRow]) -> str | None:
    """What reads answers for maj@k: as asked, else the benchmark's; none where rows have no solution to read like."""
    if options.vote is not None:
        return None if options.vote == "none" else options.vote
    return benchmark.vote if not options.reward or "solution" in data[0].columns else None

"""Published benchmarks as small records, and the rows of any file as prompts with what grades them."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agrpo.data.records import SKIP_HINT, DataError, PromptRow, Records, prompts
from agrpo.data.sources import load_rows
from agrpo.evaluation.livecodebench import cases_of

Row = Mapping[str, Any]
_BOXED = "{prompt}\n\nReason step by step, and put the final answer in \\boxed{}."
_LETTERS = "ABCD"
_EVALUATION_SEED = 1_000_003  # of procedural tasks, where none is given: the data sections' default is 0


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are, what a model is asked, and what grades its answer.

    `columns` maps our names to the data's, as in a data section: `prompt`, and what the reward reads (`solution`,
    `tests`, `entry`). `prepare` makes such columns of a row that does not have them.
    """

    name: str
    source: str | None = None
    split: str = "test"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # of the data's columns, those that `prepare` reads
    prepare: Callable[[Row], Row] = dict
    template: str | None = None  # {prompt} stands for the row's prompt; None: the prompt as it is
    chat: bool = True  # ask as a user's turn
    reward: str = "reward_models.rules.accuracy"
    parameters_of_reward: Mapping[str, Any] = field(default_factory=dict)
    vote: str | None = "reward_models.rules.answers.vote"  # reads the answer that maj@k counts
    max_completion_length: int = 2048


def _with_choices(row: Row) -> Row:
    """GPQA's four answers as A to D, in an order that the question alone decides."""
    answers = [row["Correct Answer"], *(row[f"Incorrect Answer {n}"] for n in (1, 2, 3))]
    order = [0, 1, 2, 3]
    random.Random(row["Question"]).shuffle(order)
    listed = "\n".join(f"{letter}) {answers[i].strip()}" for letter, i in zip(_LETTERS, order, strict=True))
    return {"prompt": f"{row['Question'].strip()}\n\n{listed}", "solution": _LETTERS[order.index(0)]}


def _with_tests(row: Row) -> Row:
    """LiveCodeBench's problem, what it wants of a program, and its tests."""
    starter = (row.get("starter_code") or "").strip()
    wanted = (
        f"Complete this class, in one ```python block:\n\n```python\n{starter}\n```"
        if starter
        else "Write a program that reads standard input and writes standard output, in one ```python block."
    )
    return {"prompt": f"{row['question_content'].strip()}\n\n{wanted}", "tests": cases_of(row)}


_MATHS = partial(Benchmark, template=_BOXED, max_completion_length=4096)
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _MATHS(
            "gsm8k",
            "openai/gsm8k",
            parameters={"name": "main"},
            columns={"prompt": "question", "solution": "answer"},
            max_completion_length=1024,
        ),
        _MATHS("math500", "HuggingFaceH4/MATH-500", columns={"prompt": "problem", "solution": "answer"}),
        _MATHS(
            "aime2024",
            "HuggingFaceH4/aime_2024",
            split="train",
            columns={"prompt": "problem", "solution": "answer"},
            max_completion_length=16384,
        ),
        _MATHS("amc2023", "math-ai/amc23", columns={"prompt": "question", "solution": "answer"}),
        Benchmark(
            "gpqa_diamond",
            "Idavidrein/gpqa",  # gated: accept its terms on the Hub, and set HF_TOKEN
            split="train",
            parameters={"name": "gpqa_diamond"},
            needs=("Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))),
            prepare=_with_choices,
            template="{prompt}\n\nReason step by step, and end with the letter of the answer in \\boxed{}.",
            max_completion_length=4096,
        ),
        Benchmark(
            "livecodebench",
            "json",  # its own loader is a script, which datasets no longer runs; this is release 6, its last file
            split="train",
            parameters={"data_files": "hf://datasets/livecodebench/code_generation_lite/test6.jsonl"},
            needs=("question_content", "public_test_cases", "private_test_cases"),
            prepare=_with_tests,
            reward="reward_models.rules.code",
            parameters_of_reward={"all_or_nothing": True},
            vote=None,
            max_completion_length=8192,
        ),
    )
}


def task_of(source: str) -> Benchmark:
    """A procedural task of reasoning-gym, `reasoning_gym:<task>`, graded by its own verifier."""
    return Benchmark(
        source.replace(":", "-"),
        source,
        parameters={"seed": _EVALUATION_SEED},
        columns={"prompt": "question"},
        chat=False,
        reward="reward_models.rules.reasoning_gym",
        vote="reward_models.rules.procedural.vote",
    )


def find_benchmark(name: str) -> Benchmark:
    """Raises DataError for a name that is none, with the nearest."""
    key = name.lower().replace("-", "").replace("_", "")
    known = {known.replace("_", ""): known for known in BENCHMARKS}
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        mend = f"did you mean {known[near[0]]}?" if near else f"there are {', '.join(BENCHMARKS)}"
        raise DataError(f"--benchmark {name}: no such benchmark; {mend}")
    return BENCHMARKS[known[key]]


def read_benchmark(
    benchmark: Benchmark,
    *,
    path: Path | None = None,
    source: str | None = None,
    split: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    chat: bool | None = None,
    template: str | None = None,
    system: str | None = None,
    skip_bad_rows: bool = False,
) -> Records[PromptRow]:
    """The rows as prompts, their other columns for the rewards.

    Args:
        path, source: instead of the benchmark's own source: a local file with the same columns, or another source.
        chat, template: instead of the benchmark's own.
        system: words of a system turn before the user's; needs chat.

    Raises:
        DataError: says file, row and what is wrong; a missing column with those that are there.
    """
    own = source is None and path is None
    given = dict(parameters or {})
    rows = load_rows(
        source=benchmark.source if own else source,
        path=path,
        split=split or benchmark.split,
        parameters={**(benchmark.parameters if own else {}), **given} if path is None else given,
        on_bad_row="skip" if skip_bad_rows else "error",
    )
    asked_in_turns = benchmark.chat if chat is None else chat
    if system is not None and not asked_in_turns:
        raise DataError("--system: is a turn of a conversation: give --chat too")
    shape = benchmark.template if template is None else template
    if shape is not None and "{prompt}" not in shape:
        raise DataError("--template: has no {prompt}, where the row's prompt would stand")
    items, skipped = [], list(rows.skipped)
    for location, row in rows:
        try:
            values = _values(benchmark, location, row)
        except DataError as error:
            if not skip_bad_rows:
                raise
            skipped.append(str(error))
            continue
        items.append((location, {**values, "prompt": _asked(values["prompt"], shape, asked_in_turns, system)}))
    try:
        return prompts(Records(tuple(items), tuple(skipped)), {}, "skip" if skip_bad_rows else "error")
    except DataError as error:
        raise DataError(str(error).removesuffix(SKIP_HINT).rstrip()) from None


def _values(benchmark: Benchmark, location: str, row: Row) -> dict[str, Any]:
    for wanted in (*benchmark.columns.values(), *benchmark.needs):
        if wanted not in row:
            near = difflib.get_close_matches(wanted, list(row), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"{location}: has no column {wanted!r}, it has {', '.join(row)}{hint}")
    mapped = {key: value for key, value in row.items() if key not in benchmark.columns.values()}
    mapped |= {ours: row[theirs] for ours, theirs in benchmark.columns.items()}
    if "prompt" not in mapped and benchmark.prepare is dict:
        raise DataError(f"{location}: has no column 'prompt', it has {', '.join(row)}; say which with --prompt-column")
    try:
        return {**mapped, **benchmark.prepare(mapped)}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{location}: {error}") from None


def _asked(prompt: Any, template: str | None, chat: bool, system: str | None) -> Any:
    """The prompt in its template and turns; what is no text stays, for the reader to refuse with its place."""
    if not isinstance(prompt, str):
        turns = isinstance(prompt, list) and system is not None
        return [{"role": "system", "content": system}, *prompt] if turns else prompt
    if not prompt.strip():
        return prompt
    text = prompt if template is None else template.replace("{prompt}", prompt)
    if not chat:
        return text
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def short_columns(columns: Row) -> dict[str, Any]:
    """The columns that fit beside a result: numbers and short texts, to group the results by."""
    plain = {key: value for key, value in columns.items() if isinstance(value, str | int | float | bool)}
    return {key: value for key, value in plain.items() if len(json.dumps(value)) <= 200}

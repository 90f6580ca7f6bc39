"""Preference data that others published, brought into the form that stage 2 reads: `agrpo preferences --convert`.

    agrpo preferences --convert gsm8k model_solutions.jsonl data/gsm8k-graded
    agrpo preferences --convert hh pairs.jsonl.gz data/hh --held-out 0.1

What is not usable is left out and counted, or refused by file and row. A hash of a prompt's opening, not its place in
the file, decides between train.jsonl and test.jsonl: the two share no prompt, however often the conversion is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agrpo.data.records import DataError, Rows, normalised
from agrpo.data.sources import load_rows

Write = Callable[[Path, Iterable[str]], None]  # replaces a file whole or not at all
SHOWN = 20  # bad rows that are named one by one
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class Conversion:
    """Rows of stage 2, each with the place that it comes from, and what did not become one."""

    groups: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    bad: list[str] = field(default_factory=list)  # what is wrong with which row


def convert(rows: Rows, form: str) -> Conversion:
    """All rows of a published form, "gsm8k" or "hh". Bad rows are collected, never raised."""
    made = Conversion(bad=list(rows.skipped))
    seen: set[str] = set()
    for location, row in rows:
        try:
            group = FORMS[form](location, row, made.left_out)
        except DataError as error:
            made.bad.append(str(error))
            continue
        said = json.dumps(group, sort_keys=True)
        if group is not None and said in seen:
            made.left_out["rows that repeat an earlier one"] += 1
        elif group is not None:
            seen.add(said)
            made.groups.append((location, group))
    return made


def graded_solutions(location: str, row: Mapping[str, Any], left_out: Counter[str]) -> dict[str, Any] | None:
    """GSM8K's model_solutions.jsonl: every column of {solution, is_correct} is a completion, level 1 if right, else 0.

    Equal texts become one. A question whose solutions are all right, or all wrong, gives no group: None.
    """
    question = _text(location, row, "question")
    _, mark, answer = _text(location, row, "ground_truth").rpartition("A:")
    if not mark or not answer.strip():
        raise DataError(f"{location}: ground_truth: does not end in 'A: …'; give the answer there")
    graded = {key: value for key, value in row.items() if isinstance(value, Mapping)}
    if not graded:
        mend = "a column such as 175b_verification holds {solution, is_correct}"
        raise DataError(f"{location}: no graded solution in {', '.join(row)}; {mend}")
    levels: dict[str, int] = {}
    for key, value in graded.items():
        solution = _text(f"{location}: {key}", value, "solution")
        right = value.get("is_correct")
        if not isinstance(right, bool):
            raise DataError(f"{location}: {key}: is_correct: is {right!r}; give true or false")
        if levels.setdefault(solution, int(right)) != right:
            raise DataError(f"{location}: {key}: solution: is graded right and wrong in one row; keep one grade")
    if len(levels) < len(graded):
        left_out["solutions that repeat another one of their question"] += len(graded) - len(levels)
    if len(set(levels.values())) < 2:
        left_out[f"questions with {'right' if any(levels.values()) else 'wrong'} solutions only"] += 1
        return None
    return {
        "prompt": question,
        "completions": list(levels),
        "levels": list(levels.values()),
        "solution": answer.strip(),
    }


def transcripts(location: str, row: Mapping[str, Any], left_out: Counter[str]) -> dict[str, Any]:
    """Anthropic's HH: two transcripts that differ in the assistant's last turn become a prompt and two answers."""
    chosen, rejected = (_turns(f"{location}: {key}", _text(location, row, key)) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{location}: rejected: is identical to chosen; give two different answers")
    if chosen[:-1] != rejected[:-1]:
        raise DataError(f"{location}: rejected: differs from chosen before the last turn; let only the last one differ")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _turns(place: str, transcript: str) -> list[dict[str, str]]:
    """The turns of a transcript. Two in a row of one speaker become one: chat templates want them to alternate."""
    before, *parts = _TURN.split(transcript)
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            content = f"{turns.pop()['content']}\n\n{content}".strip()
        turns.append({"role": role, "content": content})
    if before.strip() or not turns or turns[0]["role"] != "user":
        raise DataError(f"{place}: does not begin with '\\n\\nHuman:'; give the whole transcript")
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{place}: ends with the human's turn; end it with the assistant's")
    empty = [number for number, turn in enumerate(turns, 1) if not turn["content"]]
    if empty:
        raise DataError(f"{place}: turn {empty[0]} is empty; fill it")
    return turns


def _text(place: str, row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise DataError(
            f"{place}: no key {key!r}; it has {', '.join(map(str, row)) or 'none'}; is this the right form?"
        )
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        what = "empty" if isinstance(value, str) else f"{type(value).__name__}, not a string"
        raise DataError(f"{place}: {key}: is {what}; fill it")
    return value


FORMS: dict[str, Callable[[str, Mapping[str, Any], Counter[str]], dict[str, Any] | None]] = {
    "gsm8k": graded_solutions,
    "hh": transcripts,
}


def split(group: Mapping[str, Any], held_out: float) -> str:
    """Either "test", for a share `held_out` of the openings, or "train". What follows one opening is on one side."""
    prompt = group["prompt"]
    opening = prompt if isinstance(prompt, str) else prompt[0]["content"]
    digest = hashlib.sha256(normalised(opening).encode("utf-8", "surrogatepass")).digest()
    return "test" if int.from_bytes(digest[:8], "big") < held_out * 2**64 else "train"


def main(arguments: list[str], write: Write) -> int:
    parser = argparse.ArgumentParser(
        prog="agrpo preferences", description="Published preference data, in the form that stage 2 reads."
    )
    parser.add_argument("--convert", choices=FORMS, required=True, dest="form", help="the form of IN")
    parser.add_argument("source", type=Path, metavar="IN", help="a file, or a folder of files")
    parser.add_argument("folder", type=Path, metavar="OUT", help="the folder for train.jsonl and test.jsonl")
    parser.add_argument("--held-out", type=_share, default=0.1, metavar="SHARE", help="of the prompts, for test.jsonl")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="stop, or leave it out")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args(arguments)
    try:
        made, parts = _read(options)
        options.folder.mkdir(parents=True, exist_ok=True)
        for name, groups in parts.items():
            write(options.folder / f"{name}.jsonl", (json.dumps(group) + "\n" for group in groups))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = {name: len(groups) for name, groups in parts.items()}
    if options.json:
        print(json.dumps(counts | {"bad": len(made.bad), "left_out": made.left_out}))
        return 0
    for name, count in counts.items():
        print(f"{options.folder / name}.jsonl: {count} groups")
    for reason, count in made.left_out.items():
        print(f"left out: {count} {reason}")
    if made.bad:
        print(f"left out: {len(made.bad)} bad rows")
    return 0


def _read(options: argparse.Namespace) -> tuple[Conversion, dict[str, list[dict[str, Any]]]]:
    """The conversion of IN, its bad rows told, and the groups of each split, none of which is empty."""
    made = convert(load_rows(path=options.source, on_bad_row="skip"), options.form)
    for message in made.bad[:SHOWN]:
        print(f"bad row: {message}", file=sys.stderr)
    if len(made.bad) > SHOWN:
        print(f"bad row: {len(made.bad) - SHOWN} more", file=sys.stderr)
    if made.bad and options.on_bad_row == "error":
        mend = "mend them, or leave them out with --on-bad-row skip"
        raise DataError(f"{options.source}: {len(made.bad)} bad rows; {mend}")
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for _, group in made.groups:
        parts[split(group, options.held_out)].append(group)
    for name, groups in parts.items():
        if not groups:
            raise DataError(f"{options.source}: of {len(made.groups)} groups none is for {name}; change --held-out")
    return made, parts


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return share

"""From a data section to records and tokens, with a line for the log on whatever was left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from agrpo.config import DataConfig, world_size
from agrpo.data.records import DataError, PromptRow, Records, Rows, demonstrations, in_turns, preference_groups, prompts
from agrpo.data.sources import load_rows
from agrpo.data.tokens import drop_long, encode_completion, encode_prompt
from agrpo.types import Demonstration, PreferenceGroup, Prompt

T = TypeVar("T")
Note = Callable[[str], None]
Tokens = list[int]


def _read(config: DataConfig, convert: Callable[..., Records[T]], what: str, note: Note) -> Records[T]:
    rows: Rows = load_rows(
        source=config.source,
        path=config.path,
        split=config.split,
        parameters=config.parameters,
        revision=config.revision,
        on_bad_row=config.on_bad_row,
    )
    records = in_turns(convert(rows, config.columns, config.on_bad_row), config.chat, config.system)
    note(f"{what}: {config.source or config.path}, {config.split}: {records.summary()}")
    return records


def read_demonstrations(config: DataConfig, note: Note) -> Records[Demonstration]:
    return _read(config, demonstrations, "demonstrations", note)


def read_preference_groups(config: DataConfig, note: Note) -> Records[PreferenceGroup]:
    return _read(config, preference_groups, "preference groups", note)


def read_prompts(config: DataConfig, note: Note) -> Records[PromptRow]:
    return _read(config, prompts, "prompts", note)


def require_batch(count: int, batch: int, what: str, key: str) -> None:
    """Raises DataError when there are fewer rows than one batch takes."""
    if count < batch:
        raise DataError(f"{key}: {batch} is more than the {count} {what} of the data; lower it or bring more data")


def encode_prompts(
    rows: Sequence[PromptRow | Demonstration], tokenizer: PreTrainedTokenizerBase, limit: int, note: Note
) -> list[Prompt]:
    """Tokenised prompts of at most `limit` tokens; longer ones are left out and counted. `slot` is the row's place."""
    texts = [row.text if isinstance(row, PromptRow) else row.prompt for row in rows]
    ids = [encode_prompt(tokenizer, text) for text in texts]
    made = [
        Prompt(t, tuple(i), slot, row.columns) for slot, (t, i, row) in enumerate(zip(texts, ids, rows, strict=True))
    ]
    kept, report = drop_long(made, [len(i) for i in ids], limit, "prompts")
    note(report)
    require_batch(len(kept), world_size(), "prompts", "NPROC")
    return [Prompt(p.text, p.ids, slot, p.columns) for slot, p in enumerate(kept)]


def encode_groups(
    rows: Sequence[Demonstration | PreferenceGroup], tokenizer: PreTrainedTokenizerBase, limit: int, note: Note
) -> tuple[list[Demonstration | PreferenceGroup], list[Tokens], list[list[Tokens]]]:
    """Rows that fit, their prompts' tokens, and each one's completions' tokens (one of a demonstration).

    A row whose prompt and longest completion exceed `limit` tokens together is left out and counted.
    """
    prompt_ids = [encode_prompt(tokenizer, row.prompt) for row in rows]
    completions = [[encode_completion(tokenizer, text, row.prompt) for text in _completions(row)] for row in rows]
    lengths = [len(p) + max(map(len, c)) for p, c in zip(prompt_ids, completions, strict=True)]
    what = "demonstrations" if rows and isinstance(rows[0], Demonstration) else "preference groups"
    kept, report = drop_long(list(range(len(rows))), lengths, limit, what)
    note(report)
    require_batch(len(kept), world_size(), what, "NPROC")
    return [rows[i] for i in kept], [prompt_ids[i] for i in kept], [completions[i] for i in kept]


def _completions(row: Demonstration | PreferenceGroup) -> Sequence[str]:
    return [row.completion] if isinstance(row, Demonstration) else row.completions


def texts_of(rows: Sequence[Demonstration]) -> list[str]:
    """Every text of the demonstrations: what a tokenizer of one's own is trained on."""
    texts = []
    for row in rows:
        texts += [row.prompt] if isinstance(row.prompt, str) else [turn["content"] for turn in row.prompt]
        texts.append(row.completion)
    return texts

"""From a data section to records and tokens, with a line for the log on whatever was left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from agrpo.config import DataConfig, world_size
from agrpo.data.records import DataError, PromptRow, Records, Rows, demonstrations, in_turns, preference_groups, prompts
from agrpo.data.sources import load_rows
from agrpo.data.tokens import Turns, drop_long, encode_completion, encode_prompt, encode_turns
from agrpo.types import Demonstration, PreferenceGroup, Prompt

T = TypeVar("T")
C = TypeVar("C")
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
    rows: Sequence[PreferenceGroup], tokenizer: PreTrainedTokenizerBase, limit: int, note: Note
) -> tuple[list[PreferenceGroup], list[Tokens], list[list[Tokens]]]:
    """Rows that fit, their prompts' tokens, and each one's completions' tokens.

    A row whose prompt and longest completion exceed `limit` tokens together is left out and counted.
    """
    prompt_ids = [encode_prompt(tokenizer, row.prompt) for row in rows]
    completions = [[encode_completion(tokenizer, text, row.prompt) for text in row.completions] for row in rows]
    lengths = [len(p) + max(map(len, c)) for p, c in zip(prompt_ids, completions, strict=True)]
    return _that_fit(rows, prompt_ids, completions, lengths, limit, "preference groups", note)


def encode_demonstrations(
    rows: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, limit: int, note: Note
) -> tuple[list[Demonstration], list[Tokens], list[list[Turns]]]:
    """Rows that fit, their prompts' tokens, and the completion of each, alone in its list.

    A row of several turns whose earlier ones the chat template rewrites stands there once for each turn
    (`encode_turns`). One that exceeds `limit` tokens is left out and counted.
    """
    found, cut = [], 0
    for row in rows:
        if isinstance(row.completion, str):
            own = Turns(tuple(encode_completion(tokenizer, row.completion, row.prompt)))
            found.append((row, encode_prompt(tokenizer, row.prompt), [own]))
            continue
        parts = encode_turns(tokenizer, row.prompt, row.completion)
        found += [(row, prompt, [turns]) for prompt, turns in parts]
        cut += len(parts) > 1
    if cut:
        note(f"{cut} conversations are learnt turn by turn: the chat template rewrites their earlier turns")
    rows, prompts, completions = (list(column) for column in zip(*found, strict=True))
    lengths = [len(p) + len(c.ids) + len(c.heard) for p, (c,) in zip(prompts, completions, strict=True)]
    return _that_fit(rows, prompts, completions, lengths, limit, "demonstrations", note)


def _that_fit(
    rows: Sequence[T],
    prompts: list[Tokens],
    completions: list[list[C]],
    lengths: list[int],
    limit: int,
    what: str,
    note: Note,
) -> tuple[list[T], list[Tokens], list[list[C]]]:
    kept, report = drop_long(list(range(len(rows))), lengths, limit, what)
    note(report)
    require_batch(len(kept), world_size(), what, "NPROC")
    return [rows[i] for i in kept], [prompts[i] for i in kept], [completions[i] for i in kept]


def texts_of(rows: Sequence[Demonstration]) -> list[str]:
    """Every text of the demonstrations: what a tokenizer of one's own is trained on."""
    texts = []
    for row in rows:
        for part in (row.prompt, row.completion):
            texts += [part] if isinstance(part, str) else [turn["content"] for turn in part]
    return texts

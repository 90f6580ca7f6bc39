"""Every column convention becomes one schema: demonstrations, prompts, preference groups.

TRL's columns are read as they are, plain strings or conversations; `columns` maps others on (our name: theirs).
A row that cannot be used is an error that says where it is and how to mend it, or, with `skip`, is counted and told.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Generic, Literal, TypeVar

from agrpo.types import Conversation, Demonstration, InputError, PreferenceGroup, Text

T = TypeVar("T")
OnBadRow = Literal["error", "skip"]
ROLES = ("system", "developer", "user", "assistant", "tool")
EXAMPLES = 3  # rows that a note names
SKIP_HINT = "(or leave such rows out with data.on_bad_row: skip)"
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's words for roles
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the turns of Anthropic's HH transcripts


class DataError(InputError):
    """Data that cannot be used: the message says file, row, key, what is wrong and the mend."""


@dataclass(frozen=True)
class Records(Sequence[T], Generic[T]):
    """Usable rows in the order of the data, and what was left out of them or stands there twice."""

    items: tuple[T, ...]
    skipped: tuple[str, ...] = ()  # why, one message a row
    duplicates: tuple[str, ...] = ()  # which row says the same as which earlier one; they stay
    places: tuple[str, ...] = ()  # where each item stands, such as "pairs.jsonl:17"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def summary(self) -> str:
        """One line for the log: "1200 rows, 3 skipped (first: …), 12 duplicates (first: …)"."""
        parts = [f"{len(self)} rows"]
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped (first: {self.skipped[0]})")
        if self.duplicates:
            parts.append(f"{len(self.duplicates)} duplicates (first: {'; '.join(self.duplicates[:EXAMPLES])})")
        return ", ".join(parts)


Rows = Records[tuple[str, dict[str, Any]]]  # (location such as "pairs.jsonl:17", row)


@dataclass(frozen=True)
class PromptRow:
    """A prompt as the data has it; a step's `types.Prompt` is made from it once tokens and slot are known."""

    text: Text
    columns: Mapping[str, Any]  # the row's other columns, handed to the rewards by name


def demonstrations(rows: Rows, columns: Mapping[str, str], on_bad_row: OnBadRow = "error") -> Records[Demonstration]:
    """Rows with `messages`, `prompt` + `completion`, or `text`, looked for in this order.

    Of `messages` every turn of the assistant is to be imitated, but for one that nobody's turn comes before; the
    completion begins with the first of them. Of `text` everything is. A column that is mapped to `system` is the system
    turn before it.

    Raises:
        DataError: a row is unusable and on_bad_row is error, or no row is usable.
    """
    return _convert(rows, columns, on_bad_row, _demonstration, lambda d: [d.prompt, d.completion])


def prompts(rows: Rows, columns: Mapping[str, str], on_bad_row: OnBadRow = "error") -> Records[PromptRow]:
    """Rows with `prompt`, or `messages`; all other columns are kept for the rewards. Raises as `demonstrations` does.

    Of `messages` the last turn, the assistant's, becomes the column `solution` where there is none.
    """
    return _convert(rows, columns, on_bad_row, _prompt_row, lambda p: p.text)


def preference_groups(
    rows: Rows, columns: Mapping[str, str], on_bad_row: OnBadRow = "error"
) -> Records[PreferenceGroup]:
    """Rows with `chosen` + `rejected`, or ranked groups: `prompt` + `completions` + `levels`.

    A missing `prompt` is the beginning that chosen and rejected share: all turns but the last of conversations, up to
    the last "\\n\\nAssistant:" of HH transcripts, whole words of other strings. The confidence of a pair comes from
    `confidence`, or from `votes_chosen` and `votes_rejected`. Raises as `demonstrations` does.
    """
    return _convert(rows, columns, on_bad_row, _preference, lambda g: [g.prompt, g.completions, g.levels])


def in_turns(records: Records[T], chat: bool, system: str | None) -> Records[T]:
    """The records with conversations for prompts: with `chat` a string becomes a user's turn.

    Args:
        system: what a system turn before it says; a conversation that begins with one keeps its own.

    Raises:
        DataError: there is no prompt, as of demonstrations of plain text.
    """
    if not chat and system is None:
        return records
    made = []
    for record, place in zip(records, records.places, strict=True):
        name = "text" if isinstance(record, PromptRow) else "prompt"
        prompt = getattr(record, name)
        if not prompt:
            raise DataError(f"{place}: there is no prompt to make a turn of; leave out data.chat and data.system")
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if system is not None and isinstance(prompt, str):
            raise DataError(f"{place}: prompt: is a string; data.system needs a conversation: set data.chat: true")
        if system is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
        made.append(replace(record, **{name: prompt}))
    return replace(records, items=tuple(made))


def leaked(train: Records[Any], test: Records[Any]) -> tuple[str, ...]:
    """The rows of `test` whose prompt stands in `train` too, each as "test.jsonl:3, as train.jsonl:9".

    Two prompts are the same if they differ in white space and case only; a string is the same as a conversation of
    that one user turn. Demonstrations of plain text have no prompt and do not count.
    """
    known: dict[str, str] = {}
    for record, place in zip(train, train.places, strict=True):
        known.setdefault(_prompt_key(record), place)
    keys = [_prompt_key(record) for record in test]
    return tuple(
        f"{place}, as {known[key]}" for key, place in zip(keys, test.places, strict=True) if key and key in known
    )


def leak_notes(name: str, train: Records[Any], test: Records[Any]) -> list[str]:
    """For the log: one line where test prompts stand in the training data, none where they do not."""
    rows = leaked(train, test)
    if not rows:
        return []
    examples = "; ".join(rows[:EXAMPLES])
    return [f"{name}: {len(rows)} of {len(test)} prompts stand in the training data (first: {examples}); remove them"]


def normalised(text: str) -> str:
    """The text by which prompts are compared: without case, and with single spaces for all white space."""
    return " ".join(text.split()).casefold()


def _prompt_key(record: Demonstration | PromptRow | PreferenceGroup) -> str:
    prompt = record.text if isinstance(record, PromptRow) else record.prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [(turn["role"], normalised(turn["content"])) for turn in turns]
    return json.dumps(said) if any(content for _, content in said) else ""


def vote_confidence(votes_chosen: int, votes_rejected: int) -> float:
    """|2p − 1| with p the probability that most annotators would prefer the chosen one, given a sample of their votes.

    Under a uniform prior the share of all annotators who prefer it is Beta(1 + a, 1 + b), so p = P(share > ½) =
    P(Binomial(a + b + 1, ½) ≤ a). One vote against none gives ½, not certainty; equal votes give 0.
    """
    n, term, below = votes_chosen + votes_rejected + 1, 1, 0
    for k in range(votes_chosen + 1):
        below += term
        term = term * (n - k) // (k + 1)
    return abs(2 * below - 2**n) / 2**n  # integers to the end, so that many votes do not overflow


def _convert(
    rows: Rows,
    columns: Mapping[str, str],
    on_bad_row: OnBadRow,
    make: Callable[[_Row], T],
    identity: Callable[[T], Any],
) -> Records[T]:
    items: list[T] = []
    places: list[str] = []
    skipped = list(rows.skipped)
    duplicates: list[str] = []
    first: dict[str, str] = {}  # what a row says, and where it is said first
    for location, values in rows:
        try:
            record = make(_Row(location, values, columns))
        except DataError as error:
            if on_bad_row == "error":
                raise DataError(f"{error} {SKIP_HINT}") from None
            skipped.append(str(error))
            continue
        items.append(record)
        places.append(location)
        said = json.dumps(identity(record), sort_keys=True)
        if said in first:
            duplicates.append(f"{location} says the same as {first[said]}")
        first.setdefault(said, location)
    if not items:
        raise DataError(f"none of {len(skipped)} rows is usable; the first: {skipped[0] if skipped else 'no rows'}")
    return Records(tuple(items), tuple(skipped), tuple(duplicates), tuple(places))


class _Row:
    """A row under our names, which knows where it stands and so can say what is wrong with it."""

    def __init__(self, location: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.location, self.columns = location, columns
        self.values = {key: value for key, value in values.items() if key not in columns.values()}
        for ours, theirs in columns.items():
            if theirs not in values:
                raise DataError(f"{location}: {_missing(theirs, values)}; correct data.columns: {{{ours}: {theirs}}}")
            self.values[ours] = values[theirs]

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def given(self, key: str) -> bool:
        """Has it an optional value? A CSV leaves a cell empty where others have null."""
        return self.has(key) and self.values[key] != ""

    def others(self, *used: str) -> dict[str, Any]:
        return {key: value for key, value in self.values.items() if key not in used}

    def fault(self, key: str, problem: str, mend: str) -> DataError:
        return DataError(f"{self.location}: {self.columns.get(key, key)}: {problem}; {mend}")

    def required(self, key: str) -> Any:
        if key not in self.values:
            mend = f"rename it or set data.columns: {{{key}: its name}}"
            raise DataError(f"{self.location}: {_missing(key, self.values)}; {mend}")
        if self.values[key] is None:
            raise self.fault(key, "is null", "fill it")
        return self.values[key]

    def text(self, key: str) -> Text:
        """The string or the conversation under `key`, not blank."""
        return self.as_text(key, self.required(key))

    def as_text(self, key: str, value: Any) -> Text:
        if isinstance(value, list | tuple):
            return self._conversation(key, value)
        if not isinstance(value, str):
            mend = "give a string or a list of {role, content} messages"
            raise self.fault(key, f"is {_kind(value)} ({_short(value)})", mend)
        if not value.strip():
            raise self.fault(key, "is empty", "fill it")
        return value

    def after_system(self, turns: Conversation) -> Conversation:
        """The turns behind what the column mapped to `system` says, where one is."""
        if "system" not in self.columns:
            return turns
        said = self.required("system")
        if not isinstance(said, str):
            raise self.fault("system", f"is {_kind(said)} ({_short(said)})", "give a string")
        return [{"role": "system", "content": said}, *turns] if said.strip() else turns

    def completion(self, key: str, value: Any) -> str:
        """What the assistant says: a string, or a conversation of that one turn."""
        text = self.as_text(key, value)
        if not isinstance(text, str):
            if [turn["role"] for turn in text] != ["assistant"]:
                roles = ", ".join(turn["role"] for turn in text)
                raise self.fault(
                    key, f"has the turns {roles}", "give one assistant turn; what comes before is the prompt"
                )
            text = text[0]["content"]
        if not text.strip():
            raise self.fault(key, "is empty", "fill it")
        return text

    def answer(self, key: str, value: Any) -> Text:
        """What the assistant says: a string, or turns that begin and end with the assistant's."""
        turns = value if isinstance(value, list | tuple) and len(value) > 1 else None
        if turns is None:
            return self.completion(key, value)
        turns = self._conversation(key, turns)
        for place, turn in (("begins", turns[0]), ("ends", turns[-1])):
            if turn["role"] != "assistant":
                mend = "give turns from the assistant's first to its last; what comes before is the prompt"
                raise self.fault(key, f"{place} with the turn of the {turn['role']}", mend)
        for number, turn in enumerate(turns, 1):
            if turn["role"] == "assistant" and not turn["content"].strip():
                raise self.fault(key, f"message {number}, the assistant's, is empty", "fill it")
        return tuple(turns)

    def number(self, key: str, value: Any) -> float:
        """A finite number. A string that holds one counts, since a CSV has nothing else."""
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.fault(key, f"is {_kind(value)} ({_short(value)})", "give a finite number")
        return number

    def whole(self, key: str, value: Any) -> int:
        number = self.number(key, value)
        if number != int(number):
            raise self.fault(key, f"is {number}", "give a whole number")
        return int(number)

    def fraction(self, key: str, value: Any) -> float:
        number = self.number(key, value)
        if not 0 <= number <= 1:
            raise self.fault(
                key, f"is {number}, outside [0, 1]", "give a confidence between 0 (a guess) and 1 (certain)"
            )
        return number

    def sequence(self, key: str) -> Sequence[Any]:
        value = self.required(key)
        if not isinstance(value, list | tuple):
            raise self.fault(key, f"is {_kind(value)} ({_short(value)})", "give a list")
        return value

    def _conversation(self, key: str, turns: Sequence[Any]) -> Conversation:
        if not turns:
            raise self.fault(key, "is an empty conversation", "give at least one {role, content} message")
        conversation = []
        for number, turn in enumerate(turns, 1):
            if not isinstance(turn, Mapping):
                raise self.fault(
                    key, f"message {number} is {_kind(turn)} ({_short(turn)})", "give {role, content} objects"
                )
            if "from" in turn and "role" not in turn:
                said = _SPEAKERS.get(turn["from"], turn["from"])
                turn = {"role": said, "content": turn.get("value")}
            for name in ("role", "content"):
                if not isinstance(turn.get(name), str):
                    there = ", ".join(map(str, turn))
                    problem = f"message {number} has no {name} that is a string; it has {there}"
                    raise self.fault(key, problem, f"write it as {{role: one of {'/'.join(ROLES)}, content: text}}")
            if turn["role"] not in ROLES:
                raise self.fault(
                    key, f"message {number} has the role {turn['role']!r}", f"use one of {', '.join(ROLES)}"
                )
            conversation.append(
                {name: value for name, value in turn.items() if value is not None}
            )  # Parquet fills in nulls
        return conversation


def _demonstration(row: _Row) -> Demonstration:
    if row.has("messages"):
        turns = _messages(row)
        spoken = [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]
        first = spoken[0] if spoken else len(turns) - 1
        prompt = _as_prompt(row, "messages", turns[:first])
        return Demonstration(prompt, row.answer("messages", turns[first:]), row.others("messages"))
    if "text" in row.values and not row.has("completion"):
        return Demonstration("", row.completion("text", row.required("text")), row.others("text"))
    if not row.has("completion") and not row.has("prompt"):
        known = "messages, prompt + completion, or text"
        raise DataError(
            f"{row.location}: {_missing('messages', row.values, 'text', 'prompt', 'completion')}; "
            f"a demonstration needs {known}: set data.columns: {{prompt: its name, completion: its name}}"
        )
    prompt, said = _prompt(row), row.required("completion")
    completion = row.answer("completion", said)
    if isinstance(prompt, str) and not isinstance(said, str):
        prompt = [{"role": "user", "content": prompt}]
    return Demonstration(prompt, completion, row.others("prompt", "completion"))


def _messages(row: _Row) -> Conversation:
    turns = row.text("messages")
    if isinstance(turns, str):
        raise row.fault("messages", "is a string", "give a list of {role, content} messages, or name the column text")
    if turns[-1]["role"] != "assistant":
        problem = f"ends with the turn of the {turns[-1]['role']}"
        raise row.fault("messages", problem, "end it with the assistant's turn, which is the completion")
    return turns


def _prompt_row(row: _Row) -> PromptRow:
    if row.has("prompt") or not row.has("messages"):
        return PromptRow(_prompt(row), row.others("prompt"))
    turns = _messages(row)
    solution = row.completion("messages", turns[-1:])
    return PromptRow(_as_prompt(row, "messages", turns[:-1]), {"solution": solution, **row.others("messages")})


def _prompt(row: _Row) -> Text:
    return _as_prompt(row, "prompt", row.text("prompt"))


def _as_prompt(row: _Row, key: str, text: Text) -> Text:
    if isinstance(text, str):
        return row.after_system([{"role": "user", "content": text}]) if "system" in row.columns else text
    if not text:
        raise row.fault(key, "has no turn before the assistant's", "begin with the user's turn")
    if text[-1]["role"] == "assistant":
        raise row.fault(key, "has a prompt that ends with the assistant's turn", "end the prompt with the user's turn")
    if not text[-1]["content"].strip():
        raise row.fault(key, f"has an empty {text[-1]['role']} turn at the prompt's end", "fill it")
    return row.after_system(text)


def _preference(row: _Row) -> PreferenceGroup:
    if row.has("completions"):
        return _ranked(row)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    prompt = _prompt(row) if row.has("prompt") else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise row.fault(
            "rejected", "and chosen are a string and a conversation", "make both strings or both conversations"
        )
    if isinstance(chosen, str):
        if prompt is None and chosen != rejected:
            prompt, chosen, rejected = _shared_text(row, chosen, rejected)
            prompt = _as_prompt(row, "prompt", prompt)
    else:
        prompt, chosen, rejected = _shared_turns(row, prompt, chosen, rejected)
    if chosen == rejected:
        raise row.fault("rejected", "is identical to chosen", "give two different answers")
    return PreferenceGroup(
        prompt=prompt,
        completions=(chosen, rejected),
        levels=(1, 0),
        confidences=_pair_confidence(row),
        margin=_margin(row),
        columns=row.others("prompt", "chosen", "rejected", "margin", "confidence", "votes_chosen", "votes_rejected"),
    )


def _shared_text(row: _Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of two strings that repeat the prompt. Space between goes to the completion."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = "".join(pair[0] for pair in alike)
    if _ASSISTANT in shared and _HUMAN in shared:
        prompt = shared[: shared.rindex(_ASSISTANT) + len(_ASSISTANT)]
    else:
        end = max((i for i, character in enumerate(shared) if character.isspace()), default=0)
        prompt = shared[:end].rstrip()
    if not prompt:
        raise row.fault("prompt", "is missing, and chosen and rejected do not begin alike", "add a prompt column")
    completions = chosen[len(prompt) :], rejected[len(prompt) :]
    for key, completion in zip(("chosen", "rejected"), completions, strict=True):
        if not completion.strip():
            raise row.fault(key, "has nothing after the prompt that it shares with the other", "add the answer")
        if _HUMAN in completion and _ASSISTANT in prompt:
            raise row.fault(key, "differs before the last assistant turn", "let only the last turn differ")
    return prompt, *completions


def _shared_turns(
    row: _Row, prompt: Text | None, chosen: Conversation, rejected: Conversation
) -> tuple[Conversation, str, str]:
    """Prompt, chosen and rejected of two conversations, which may repeat the prompt's turns."""
    history = list(chosen[:-1])
    if list(rejected[:-1]) != history:
        raise row.fault(
            "rejected", "differs from chosen before the last turn", "let only the assistant's last turn differ"
        )
    said = row.completion("chosen", chosen[-1:]), row.completion("rejected", rejected[-1:])
    if not history:
        if prompt is None:
            raise row.fault("prompt", "is missing, and chosen holds only the assistant's turn", "add a prompt column")
        return ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), *said
    repeated = (
        any(prompt.strip() in m["content"] for m in history) if isinstance(prompt, str) else prompt in (None, history)
    )
    if not repeated:
        raise row.fault(
            "prompt", "is not what chosen's turns begin with", "leave the prompt out, or leave its turns out of chosen"
        )
    return _as_prompt(row, "chosen", history), *said


def _pair_confidence(row: _Row) -> tuple[float, ...]:
    if row.given("confidence"):
        return (row.fraction("confidence", row.values["confidence"]),) * 2
    if not row.given("votes_chosen") and not row.given("votes_rejected"):
        return ()
    votes = [row.whole(key, row.required(key)) for key in ("votes_chosen", "votes_rejected")]
    if min(votes) < 0:
        raise row.fault("votes_chosen", f"and votes_rejected are {votes}", "votes are counted from 0")
    if votes[0] < votes[1]:
        raise row.fault("votes_chosen", f"has {votes[0]} votes against {votes[1]}", "swap chosen and rejected")
    return (vote_confidence(*votes),) * 2


def _margin(row: _Row) -> float | None:
    if not row.given("margin"):
        return None
    margin = row.number("margin", row.values["margin"])
    if margin < 0:
        raise row.fault("margin", f"is {margin}: the rejected one scored higher", "swap chosen and rejected")
    return margin


def _ranked(row: _Row) -> PreferenceGroup:
    completions = tuple(row.completion("completions", one) for one in row.sequence("completions"))
    levels = tuple(row.whole("levels", level) for level in row.sequence("levels"))
    if len(completions) < 2:
        raise row.fault("completions", f"has {len(completions)}", "a group needs at least 2 to compare")
    if len(levels) != len(completions):
        raise row.fault("levels", f"has {len(levels)} values for {len(completions)} completions", "give each one level")
    if len(set(levels)) == 1:
        raise row.fault("levels", f"are all {levels[0]}", "a group needs two levels to learn from: leave it out")
    level_of = dict(zip(completions, levels, strict=True))
    for completion, level in zip(completions, levels, strict=True):
        if level_of[completion] != level:
            problem = f"has {_short(completion)} at levels {level} and {level_of[completion]}"
            raise row.fault("completions", problem, "give equal completions equal levels")
    confidences = _of_each(row, "confidences", row.fraction, len(completions))
    means = _of_each(row, "means", row.number, len(completions))
    deviations = _of_each(row, "deviations", row.number, len(completions))
    if bool(means) != bool(deviations) or min(deviations, default=0.0) < 0:
        raise row.fault("deviations", "do not go with means", "give each a mean and a deviation of 0 or more")
    prompt = _prompt(row)
    if isinstance(prompt, str) and not isinstance(row.values["completions"][0], str):
        prompt = [{"role": "user", "content": prompt}]
    others = row.others("prompt", "completions", "levels", "confidences", "means", "deviations")
    return PreferenceGroup(prompt, completions, levels, confidences, None, others, means, deviations)


def _of_each(row: _Row, key: str, read: Callable[[str, Any], float], count: int) -> tuple[float, ...]:
    """An optional list of one number for each completion; () where the row has none."""
    if not row.given(key):
        return ()
    values = tuple(read(key, value) for value in row.sequence(key))
    if len(values) != count:
        problem = f"has {len(values)} values for {count} completions"
        raise row.fault(key, problem, "give each completion one value, or leave the column out")
    return values


def _missing(key: str, values: Iterable[str], *alternatives: str) -> str:
    """What to say of a key that is not there: the keys that are, and the nearest of them."""
    keys = [str(name) for name in values]
    near = next((near[0] for name in (key, *alternatives) if (near := difflib.get_close_matches(name, keys, 1))), None)
    there = f"the row has {', '.join(keys)}" if keys else "the row is empty"
    return f"no key {key!r}; {there}" + (f"; did you mean {near!r}?" if near else "")


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object", list: "a list"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"

"""A conversation with one model or with two: what has been said, the commands, and what is shown."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from agrpo.chat.settings import ChatSettings
from agrpo.types import InputError, Text

HELP = """/reset              begin anew
/system TEXT        begin anew, with a system turn
/set NAME=VALUE     temperature, top_p, top_k, max_tokens, samples, seed; /set alone shows them
/data NAME=VALUE    a column for the rewards, such as solution=42
/pick N             go on from the N-th answer of the last turn (it is the first otherwise)
/history            what has been said
/quit               so does the end of the input; Ctrl-C stops an answer
"""


class Speaks(Protocol):
    """What `chat.speaker.Speaker` does."""

    name: str

    def answer(
        self, prompt: Text, settings: ChatSettings, turn: int, show: Callable[[Sequence[str]], None]
    ) -> list[Any]: ...


class Screen(Protocol):
    """Where answers appear: so many of each of the models with these titles, shown as they grow, then judged."""

    def say(self, text: str) -> None: ...
    def begin(self, titles: Sequence[str], count: int) -> None: ...
    def show(self, place: int, texts: Sequence[str]) -> None: ...
    def judged(self, place: int, notes: Sequence[str]) -> None: ...
    def end(self) -> None: ...


Judge = Callable[[Text, Sequence[Any], dict[str, str]], list[str]]  # (prompt, answers, columns) → a note on each


class Conversation:
    """Reads lines and answers them.

    Args:
        speakers: one model, or two that are compared: both hear every line, and each its own answers.
        turns: speak through the chat template, with what was said before; else each line is a prompt of its own.
        judge: says of each answer what the rewards say; None without rewards.
    """

    def __init__(
        self,
        speakers: Sequence[Speaks],
        screen: Screen,
        settings: ChatSettings,
        *,
        turns: bool = True,
        system: str | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.speakers, self.screen, self.settings, self.turns, self.judge = speakers, screen, settings, turns, judge
        self.columns: dict[str, str] = {}
        self._reset(system)

    def run(self, lines: Iterable[str]) -> None:
        """Answer every line until the input ends or /quit."""
        for line in lines:
            text = line.strip()
            try:
                if text == "/quit":
                    return
                if text.startswith("/"):
                    self._command(*text[1:].partition(" ")[::2])
                elif text:
                    self._answer(text)
            except InputError as error:
                self.screen.say(f"error: {error}")
            except KeyboardInterrupt:
                self.screen.say("stopped; nothing of this turn is kept")

    def _command(self, name: str, rest: str) -> None:
        rest = rest.strip()
        if name == "reset":
            self._reset(self.system)
            self.screen.say("a new conversation")
        elif name == "system":
            if not self.turns:
                raise InputError("/system: this model is asked in plain prompts; --chat gives it turns")
            self._reset(rest or None)
            self.screen.say("a new conversation, with this system turn" if rest else "a new conversation")
        elif name == "set":
            self.settings = self.settings.with_setting(rest) if rest else self.settings
            self.screen.say(self.settings.in_words())
        elif name == "data":
            key, equals, value = (part.strip() for part in rest.partition("="))
            if not equals or not key:
                raise InputError("/data: write name=value, such as /data solution=42")
            self.columns[key] = value
            self.screen.say("  ".join(f"{key}={value}" for key, value in self.columns.items()))
        elif name == "pick":
            self._pick(rest)
        elif name == "history":
            for turn in self.histories[0]:
                self.screen.say(f"{turn['role']}: {turn['content']}")
        elif name == "help":
            self.screen.say(HELP.rstrip())
        else:
            raise InputError(f"/{name}: no such command; /help lists them")

    def _reset(self, system: str | None) -> None:
        self.system, self.turn = system, 0
        start = [{"role": "system", "content": system}] if system is not None else []
        self.histories: list[list[dict[str, str]]] = [list(start) for _ in self.speakers]
        self._last: list[list[Any]] = [[] for _ in self.speakers]

    def _answer(self, text: str) -> None:
        asked = [{"role": "user", "content": text}]
        several, found = len(self.speakers) > 1, []
        self.screen.begin([speaker.name if several else "" for speaker in self.speakers], self.settings.samples)
        try:
            with _stopped_between_tokens() as check:
                for place, speaker in enumerate(self.speakers):
                    prompt: Text = [*self.histories[place], *asked] if self.turns else text
                    show = partial(self._show, place, check)
                    answers = speaker.answer(prompt, self.settings, self.turn, show)
                    notes = self.judge(prompt, answers, self.columns) if self.judge is not None else []
                    self.screen.judged(place, notes)
                    found.append(answers)
        finally:
            self.screen.end()
        self._last, self.turn = found, self.turn + 1
        if self.turns:
            for history, answers in zip(self.histories, found, strict=True):
                history += [*asked, {"role": "assistant", "content": answers[0].text}]

    def _show(self, place: int, check: Callable[[], None], texts: Sequence[str]) -> None:
        check()
        self.screen.show(place, texts)

    def _pick(self, rest: str) -> None:
        count = len(self._last[0])
        if not rest.isdigit() or not 1 <= int(rest) <= count:
            raise InputError(f"/pick: the last turn has {count} answers" + (f", 1 to {count}" if count else ""))
        if not self.turns:
            raise InputError("/pick: plain prompts have no history to go on from; --chat gives turns")
        for history, answers in zip(self.histories, self._last, strict=True):
            history[-1] = {"role": "assistant", "content": answers[int(rest) - 1].text}
        self.screen.say(f"going on from answer {rest}")


@contextmanager
def _stopped_between_tokens() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the next check, so that no answer is left half drawn; a second one does not wait."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)

"""Where answers appear: lines of text on a pipe, panels side by side in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from agrpo.reporting.metrics import printable


class Lines:
    """Plain text. One answer is written as it comes; of several, each when all are there."""

    def __init__(self, out: TextIO) -> None:
        self.out, self._encoding = out, out.encoding or "utf-8"

    def say(self, text: str) -> None:
        print(printable(text, self._encoding), file=self.out, flush=True)

    def watch(self, title: str, count: int) -> Callable[[Sequence[str]], None]:
        self._texts: Sequence[str] = [""] * count
        self._written = 0
        if title:
            self.say(f"[{title}]")

        def show(texts: Sequence[str]) -> None:
            self._texts = texts
            if count == 1 and len(texts[0]) > self._written:
                self.out.write(printable(texts[0][self._written :], self._encoding))
                self.out.flush()
                self._written = len(texts[0])

        return show

    def done(self, notes: Sequence[str]) -> None:
        if len(self._texts) == 1:
            self.say("")
            if notes:
                self.say(f"({notes[0]})")
            return
        for number, text in enumerate(self._texts, 1):
            note = f"  ({notes[number - 1]})" if notes else ""
            self.say(f"{number}│ {text}{note}")


class Panels:
    """A terminal: the answers side by side, growing as they are drawn."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console()

    def say(self, text: str) -> None:
        self.console.print(printable(text, "utf-8"), markup=False, highlight=False)

    def watch(self, title: str, count: int) -> Callable[[Sequence[str]], None]:
        from rich.live import Live

        if title:
            self.console.rule(printable(title, "utf-8"))
        self._texts: Sequence[str] = [""] * count
        self._live = Live(self._columns([]), console=self.console, refresh_per_second=12, vertical_overflow="visible")
        self._live.start()

        def show(texts: Sequence[str]) -> None:
            self._texts = texts
            self._live.update(self._columns([]))

        return show

    def done(self, notes: Sequence[str]) -> None:
        self._live.update(self._columns(notes))
        self._live.stop()

    def _columns(self, notes: Sequence[str]) -> object:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(expand=True)
        for _ in self._texts:
            grid.add_column(ratio=1)
        labels = [*notes, *[""] * (len(self._texts) - len(notes))]
        several = len(self._texts) > 1
        grid.add_row(
            *(
                Panel(Text(printable(text, "utf-8")), title=str(n) if several else None, subtitle=label or None)
                for n, (text, label) in enumerate(zip(self._texts, labels, strict=True), 1)
            )
        )
        return grid


def screen() -> Lines | Panels:
    """Panels where a person sits before a terminal, lines where the output is a pipe or a file."""
    return Panels() if sys.stdin.isatty() and sys.stdout.isatty() else Lines(sys.stdout)

"""Where answers appear: lines of text on a pipe, panels side by side in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from agrpo.reporting.metrics import printable

if TYPE_CHECKING:
    from rich.console import Console

NARROWEST = 36  # columns of a panel; where it would be narrower, panels go below each other


class Lines:
    """Plain text. One answer is written as it comes; of several, each when all are there."""

    def __init__(self, out: TextIO) -> None:
        self.out, self._encoding = out, out.encoding or "utf-8"

    def say(self, text: str) -> None:
        print(printable(text, self._encoding), file=self.out, flush=True)

    def begin(self, titles: Sequence[str], count: int) -> None:
        self._titles, self._count, self._place, self._begun = titles, count, -1, False

    def show(self, place: int, texts: Sequence[str]) -> None:
        if place != self._place:
            self._place, self._written = place, 0
            if self._titles[place]:
                self.say(f"[{self._titles[place]}]")
        self._texts, self._begun = texts, True
        if self._count == 1 and len(texts[0]) > self._written:
            self.out.write(printable(texts[0][self._written :], self._encoding))
            self.out.flush()
            self._written = len(texts[0])

    def judged(self, place: int, notes: Sequence[str]) -> None:
        self._begun = False
        if self._count == 1:
            self.say("")
            if notes:
                self.say(f"({notes[0]})")
            return
        for number, text in enumerate(self._texts, 1):
            note = f"  ({notes[number - 1]})" if notes else ""
            self.say(f"{number}│ {text}{note}")

    def end(self) -> None:
        if self._begun and self._count == 1:  # stopped in the midst of a line
            self.say("")


class Panels:
    """A terminal: the answers side by side, growing as they are drawn; whole once they are all there."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console()

    def say(self, text: str) -> None:
        self.console.print(printable(text, "utf-8"), markup=False, highlight=False)

    def begin(self, titles: Sequence[str], count: int) -> None:
        from rich.live import Live

        self._titles = titles
        self._texts: list[Sequence[str]] = [[""] * count for _ in titles]
        self._notes: list[Sequence[str]] = [[""] * count for _ in titles]
        self._live = Live(self._grid(), console=self.console, auto_refresh=False, transient=True)
        self._live.start()
        self._with_echo = _without_echo()

    def show(self, place: int, texts: Sequence[str]) -> None:
        self._texts[place] = texts
        self._live.update(self._grid(), refresh=True)

    def judged(self, place: int, notes: Sequence[str]) -> None:
        self._notes[place] = notes or self._notes[place]
        self._live.update(self._grid(), refresh=True)

    def end(self) -> None:
        self._live.stop()
        self._with_echo()
        self.console.print(self._grid(whole=True))

    def _grid(self, *, whole: bool = False) -> object:
        """The panels: of several models one beside the other, sample by sample; else a model's samples.

        Args:
            whole: all of every text; else its last lines, as many as the terminal shows of all panels.
        """
        from rich.table import Table

        count, models = len(self._texts[0]), len(self._titles)
        cells = [(place, n) for n in range(count) for place in range(models)]
        columns = max(1, min(models if models > 1 else count, self.console.width // NARROWEST))
        rows = -(-len(cells) // columns)
        width = self.console.width // columns - 4
        most = None if whole else max(1, self.console.height // rows - 4)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1, overflow="fold")
        for start in range(0, len(cells), columns):
            grid.add_row(*(self._panel(place, n, width, most) for place, n in cells[start : start + columns]))
        return grid

    def _panel(self, place: int, n: int, width: int, most: int | None) -> object:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        several = len(self._texts[place]) > 1
        title = " ".join(filter(None, [_end_of(self._titles[place], width - 6), str(n + 1) if several else ""]))
        text = Text(printable(self._texts[place][n], "utf-8"), overflow="fold")
        if most is not None:
            text = Text("\n", overflow="fold").join(list(text.wrap(self.console, width))[-most:])
        note = self._notes[place][n]
        body = Group(text, Text(printable(note, "utf-8"), style="dim", overflow="fold")) if note else text
        return Panel(body, title=Text(printable(title, "utf-8")) if title else None, title_align="left")


def _without_echo() -> Callable[[], None]:
    """What is typed while answers are drawn, a Ctrl-C too, would move the cursor: nothing of it shows until the call
    of what this returns."""
    if not sys.stdin.isatty():
        return lambda: None
    import termios

    before = termios.tcgetattr(sys.stdin)
    hushed = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, hushed)
    return lambda: termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _end_of(name: str, width: int) -> str:
    """A path's end says more than its beginning."""
    return name if len(name) <= width else f"…{name[-(width - 1) :]}"


def screen() -> Lines | Panels:
    """Panels where a person sits before a terminal, lines where the output is a pipe or a file."""
    return Panels() if sys.stdin.isatty() and sys.stdout.isatty() else Lines(sys.stdout)

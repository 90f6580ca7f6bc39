"""Rewards that wait outside this process are asked about completions that have ended while others are still sampled."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from agrpo.types import Reward, Text


@dataclass(frozen=True)
class Rows:
    """What rewards are handed: N completions and what belongs to each."""

    prompts: Sequence[Text]
    completions: Sequence[Text]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]

    def ask(self, reward: Reward, places: Sequence[int]) -> list[Any]:
        """The reward's values of the completions at these places; the lists that it is handed are its own to change.

        Raises:
            ValueError: another number of values.
            Exception: what the reward raised.
        """
        values = list(
            reward(
                prompts=[self.prompts[n] for n in places],
                completions=[self.completions[n] for n in places],
                completion_ids=[list(self.completion_ids[n]) for n in places],
                **{name: [column[n] for n in places] for name, column in self.columns.items()},
            )
        )
        if len(values) != len(places):
            raise ValueError(f"{len(values)} scores for {len(places)} completions")
        return values


class Early:
    """What the waiting rewards of a set have scored of a rollout before it was complete.

    A reward takes part if it has the attribute `while_sampling` (`agrpo.types.Reward`). Its calls follow each other in
    a thread of its own; what has ended during one goes into the next. Nothing of torch or of the process group is
    touched there. What comes out is what one call of all completions gives: where a call fails, nothing of it counts.

    Args:
        rewards: those that take part, by their column.
        prompts, columns: of the rollout's N completions, as rewards are handed them, without `finished`.
    """

    def __init__(
        self, rewards: Mapping[int, Reward], prompts: Sequence[Text], columns: Mapping[str, Sequence[Any]]
    ) -> None:
        count = len(prompts)
        known = {**columns, "finished": [None] * count}
        self._rows = Rows(prompts, [None] * count, [None] * count, known)
        self._ended: set[int] = set()
        self._lanes = {k: _Lane(reward, self._rows) for k, reward in rewards.items()}

    def ended(self, places: list[int], ids: list[list[int]], texts: list[str], finished: list[bool]) -> None:
        """`agrpo.types.Ended`. A completion that ends again, as after a lack of memory, stays what it was first."""
        new = [i for i, n in enumerate(places) if n not in self._ended]
        self._ended.update(places)
        if len(self._ended) == len(self._rows.prompts):
            return  # nothing is sampled any more: the rest is one call
        for i in new:
            n = places[i]
            plain = isinstance(self._rows.prompts[n], str)
            self._rows.completions[n] = texts[i] if plain else [{"role": "assistant", "content": texts[i]}]
            self._rows.completion_ids[n], self._rows.columns["finished"][n] = ids[i], finished[i]
        for lane in self._lanes.values():
            lane.ended([places[i] for i in new])

    def stop(self) -> float:
        """Sampling is over: no call begins any more. The seconds of all calls until now."""
        return sum(lane.stop() for lane in self._lanes.values())

    def values(self, column: int, rows: Rows) -> tuple[list[Any], dict[str, float]] | None:
        """The values of all of a rollout's completions, and the metrics of their calls added up.

        None where the reward takes no part, was not asked, or failed: then it is to be asked about all of them.
        """
        lane = self._lanes.get(column)
        return None if lane is None else lane.values(rows)

    def close(self) -> None:
        """Leave what still runs to itself: the run ends here. After `values` nothing does."""
        for lane in self._lanes.values():
            lane.leave()


class _Lane:
    """One reward's calls, one after the other in a thread that does not keep the process alive."""

    def __init__(self, reward: Reward, rows: Rows) -> None:
        self._reward, self._rows = reward, rows
        self._units = units(reward.while_sampling, rows.prompts)
        self._unit_of = {n: u for u, unit in enumerate(self._units) for n in unit}
        self._missing = [len(unit) for unit in self._units]  # completions that go on
        self._ready: SimpleQueue[list[int]] = SimpleQueue()  # units whose completions have all ended
        self._thread: threading.Thread | None = None
        self._stopped = self._failed = False
        self._spans: list[list[float]] = []  # when calls began, and ended if they have
        self._scored: dict[int, list[Any]] = {}  # unit → values
        self._metrics: Counter[str] = Counter()

    def ended(self, places: Iterable[int]) -> None:
        complete = []
        for n in places:
            unit = self._unit_of[n]
            self._missing[unit] -= 1
            if not self._missing[unit]:
                complete.append(unit)
        if not complete:
            return
        self._ready.put(complete)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="early-reward", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            asked = self._ready.get()
            while not self._ready.empty():
                asked += self._ready.get()
            if self._stopped:
                return
            try:
                self._call(sorted(asked))
            except BaseException:  # the call of all completions meets it again, where it can be told
                self._failed = True
                return

    def _call(self, asked: list[int]) -> None:
        span = [perf_counter()]
        self._spans.append(span)
        try:
            values = iter(self._rows.ask(self._reward, [n for u in asked for n in self._units[u]]))
        finally:
            span.append(perf_counter())
        self._metrics.update(getattr(self._reward, "metrics", {}))
        for unit in asked:
            self._scored[unit] = [next(values) for _ in self._units[unit]]

    def stop(self) -> float:
        now = perf_counter()
        self._stopped = True
        self._ready.put([])
        return sum(min([now, *span[1:]]) - span[0] for span in list(self._spans))

    def values(self, rows: Rows) -> tuple[list[Any], dict[str, float]] | None:
        if self._thread is None:
            return None
        self._thread.join()
        if self._failed:
            return None
        found = {
            n: v
            for u, scored in self._scored.items()
            if self._same(u, rows)
            for n, v in zip(self._units[u], scored, strict=True)
        }
        rest = [n for n in range(len(rows.prompts)) if n not in found]
        try:
            if rest and found:
                found |= dict(zip(rest, rows.ask(self._reward, rest), strict=True))
                self._metrics.update(getattr(self._reward, "metrics", {}))
        except Exception:  # as above
            return None
        return ([found[n] for n in range(len(rows.prompts))], dict(self._metrics)) if found else None

    def _same(self, unit: int, rows: Rows) -> bool:
        """Are the completions that were scored those that came out? After a lack of memory they need not be."""
        mine, its = self._rows, rows
        return all(
            mine.completions[n] == its.completions[n]
            and mine.completion_ids[n] == its.completion_ids[n]
            and mine.columns["finished"][n] == its.columns["finished"][n]
            for n in self._units[unit]
        )

    def leave(self) -> None:
        self._stopped = True
        self._ready.put([])
        if self._thread is not None and self._thread.is_alive() and hasattr(self._reward, "cancel"):
            self._reward.cancel()


def units(while_sampling: Literal["prompt"] | int, prompts: Sequence[Text]) -> list[list[int]]:
    """Which completions a reward must see in one call: those of equal prompts, or so many that follow each other."""
    if while_sampling != "prompt":
        return [list(range(n, min(n + while_sampling, len(prompts)))) for n in range(0, len(prompts), while_sampling)]
    of: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        of.setdefault(prompt if isinstance(prompt, str) else json.dumps(prompt, default=str), []).append(n)
    return list(of.values())

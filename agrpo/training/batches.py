"""Micro-batches by token budget, and the layout of a slice of groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from agrpo.algorithms.segments import places_of
from agrpo.data.tokens import Turns
from agrpo.engine import distributed
from agrpo.engine.layout import Layout, build_layout
from agrpo.types import Rollout


def micro_batches(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Cut items, in order, into as few runs of at most `budget` tokens as can be, and of these the largest least.

    An item above the budget stands alone.
    """
    batches = _runs(costs, budget)
    least, most = max(costs, default=0), budget
    while least < most:  # a smaller budget that takes as many runs holds less at once
        middle = (least + most) // 2
        tried = _runs(costs, middle)
        if len(tried) == len(batches):
            batches, most = tried, middle
        else:
            least = middle + 1
    return batches


def _runs(costs: Sequence[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for item, cost in enumerate(costs):
        if not batches or cost > room:
            batches.append([])
            room = budget
        batches[-1].append(item)
        room -= cost
    return batches


def in_step(batches: Sequence[list[int]]) -> Iterator[tuple[int, bool, bool]]:
    """(index of the batch, counts, last), with as many rounds on every rank: ZeRO needs all ranks in each backward.

    A rank that has run out repeats its last batch with counts=False, for a loss of weight 0.
    """
    rounds = distributed.max_over_ranks(len(batches))
    for i in range(rounds):
        yield min(i, len(batches) - 1), i < len(batches), i == rounds - 1


class Sequences:
    """Groups of completions behind their prompts, ready to be laid out slice by slice.

    Args:
        prompts: P token sequences.
        group: (N,) non-decreasing; lengths: (N,); tokens: (C,).
        heard: (E,) what is read between them, and gaps: (C,) how much of it before each; empty: nothing.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        group: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        heard: Tensor | None = None,
        gaps: Tensor | None = None,
    ) -> None:
        self.prompts, self.group, self.lengths, self.tokens = prompts, group, lengths, tokens
        none = torch.zeros(0, dtype=torch.long)
        self.heard, self.gaps = (none if part is None else part for part in (heard, gaps))
        spans = lengths
        if len(self.gaps):
            spans = lengths.index_add(0, torch.arange(len(lengths)).repeat_interleave(lengths), self.gaps)
        of_prompts = torch.tensor([len(p) for p in prompts], dtype=torch.long)
        self.costs = of_prompts.index_add(0, group, spans).tolist()  # tokens of each group

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int] | Turns]]) -> Sequences:
        """From lists: completions[p] are those of prompt p."""
        flat = [c for of_prompt in completions for c in of_prompt]
        group = torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(c) for c in completions]))
        turns = [c if isinstance(c, Turns) else Turns(tuple(c)) for c in flat]
        lengths = torch.tensor([len(c.ids) for c in turns], dtype=torch.long)
        tokens = torch.tensor([t for c in turns for t in c.ids], dtype=torch.long)
        heard = torch.tensor([t for c in turns for t in c.heard], dtype=torch.long)
        gaps = [gap for c in turns for gap in c.gaps or (0,) * len(c.ids)] if len(heard) else []
        return cls(prompts, group, lengths, tokens, heard, torch.tensor(gaps, dtype=torch.long))

    @classmethod
    def of_rollout(cls, rollout: Rollout) -> Sequences:
        return cls(
            [p.ids for p in rollout.prompts],
            rollout.group,
            rollout.lengths,
            rollout.tokens,
            rollout.heard,
            rollout.gaps,
        )

    def members(self, groups: Sequence[int]) -> Tensor:
        """(n,) completions of these groups, in order."""
        return torch.isin(self.group, torch.tensor(groups)).nonzero()[:, 0]

    def token_places(self, members: Tensor) -> Tensor:
        """(c,) places of the members' tokens on the flat completion axis (C,)."""
        return places_of(self.lengths, members)

    def layout(self, groups: Sequence[int]) -> Layout:
        """The layout of some groups, given in increasing order."""
        members = self.members(groups)
        renumber = torch.searchsorted(torch.tensor(groups), self.group[members])
        places = self.token_places(members)
        return build_layout(
            [self.prompts[g] for g in groups],
            renumber,
            self.lengths[members],
            self.tokens[places],
            *((self.heard[places_of(self.gaps, places)], self.gaps[places]) if len(self.gaps) else ()),
        )

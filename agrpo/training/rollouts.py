"""Rollouts taken apart and put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agrpo.algorithms.segments import places_of
from agrpo.types import Prompt, Rollout

_TENSORS = ("group", "lengths", "tokens", "logp", "finished", "heard", "gaps", "outcomes")


def take(rollout: Rollout, which: Tensor) -> Rollout:
    """Some completions of a rollout, or all of them in another order; `which` must keep groups in order."""
    tokens = places_of(rollout.lengths, which)
    answered = len(rollout.gaps) > 0
    return Rollout(
        prompts=rollout.prompts,
        group=rollout.group[which],
        lengths=rollout.lengths[which],
        tokens=rollout.tokens[tokens],
        logp=rollout.logp[tokens],
        finished=rollout.finished[which],
        texts=tuple(rollout.texts[n] for n in which.tolist()),
        weight_version=rollout.weight_version,
        heard=rollout.heard[places_of(rollout.gaps, tokens)] if answered else rollout.heard,
        gaps=rollout.gaps[tokens] if answered else rollout.gaps,
        turns=tuple(rollout.turns[n] for n in which.tolist()) if answered else (),
        outcomes=rollout.outcomes[which] if answered else rollout.outcomes,
    )


def join(rollouts: Sequence[Rollout]) -> tuple[Rollout, Tensor]:
    """One rollout of several by the same weights: prompts by slot, a prompt's completions together.

    Returns:
        The rollout, and (N,) the place of each of its completions in the rollouts one after the other.
    """
    prompts = {p.slot: p for rollout in rollouts for p in rollout.prompts}
    slots = sorted(prompts)
    slot = torch.cat([torch.tensor([p.slot for p in r.prompts], dtype=torch.long)[r.group] for r in rollouts])  # (N,)
    group = torch.searchsorted(torch.tensor(slots), slot)
    order = group.argsort(stable=True)
    together = Rollout(
        prompts=tuple(prompts[s] for s in slots),
        group=group,
        lengths=torch.cat([r.lengths for r in rollouts]),
        tokens=torch.cat([r.tokens for r in rollouts]),
        logp=torch.cat([r.logp for r in rollouts]),
        finished=torch.cat([r.finished for r in rollouts]),
        texts=tuple(text for r in rollouts for text in r.texts),
        weight_version=rollouts[0].weight_version,
        **{name: torch.cat([getattr(r, name) for r in rollouts]) for name in ("heard", "gaps", "outcomes")},
        turns=tuple(turns for r in rollouts for turns in r.turns),
    )
    return take(together, order), order


def without_silent_prompts(rollout: Rollout) -> Rollout:
    """The same completions, and only the prompts that have some."""
    used, group = rollout.group.unique(return_inverse=True)
    return Rollout(**{**vars(rollout), "prompts": tuple(rollout.prompts[p] for p in used.tolist()), "group": group})


def rollout_state(rollout: Rollout) -> dict[str, Any]:
    """A rollout for a checkpoint: tensors and JSON values. The rows' other columns, for rewards, are left out."""
    return {
        "prompts": [{"text": p.text, "ids": list(p.ids), "slot": p.slot} for p in rollout.prompts],
        "texts": list(rollout.texts),
        "turns": [list(turns) for turns in rollout.turns],
        "weight_version": rollout.weight_version,
        **{name: getattr(rollout, name) for name in _TENSORS},
    }


def rollout_from_state(state: Mapping[str, Any]) -> Rollout:
    """The rollout of `rollout_state`; its prompts have no other columns."""
    return Rollout(
        prompts=tuple(Prompt(p["text"], tuple(p["ids"]), p["slot"], {}) for p in state["prompts"]),
        texts=tuple(state["texts"]),
        turns=tuple(state["turns"]),
        weight_version=state["weight_version"],
        **{name: state[name] for name in _TENSORS},
    )

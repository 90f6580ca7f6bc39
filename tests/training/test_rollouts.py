"""Rollouts taken apart and put together, against plain lists of completions."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo.training.rollouts import join, rollout_from_state, rollout_state, take, without_silent_prompts
from agrpo.types import Prompt, Rollout

# Prompts as (slot, lengths of its completions); slots are distinct and in no order.
groups = st.lists(
    st.tuples(st.integers(0, 30), st.lists(st.integers(1, 4), max_size=4)),
    min_size=1,
    max_size=5,
    unique_by=lambda g: g[0],
)


def rollout_of(groups, first=0, answered=False):
    """Completions whose every token says whose it is: slot, number of the sample and place.

    With `answered`, t % 3 tokens stand before a token t, and say whose they are too.
    """
    own = [(p, slot, n, length) for p, (slot, sizes) in enumerate(groups) for n, length in enumerate(sizes, first)]
    tokens = torch.tensor(
        [slot * 1000 + n * 10 + t for _, slot, n, length in own for t in range(length)], dtype=torch.long
    )
    gaps = tokens % 3
    heard = {
        "gaps": gaps,
        "heard": -tokens.repeat_interleave(gaps),
        "turns": tuple(({"role": "assistant", "content": f"{slot}.{n}"},) for _, slot, n, _ in own),
        "outcomes": torch.tensor([slot / (n + 1) for _, slot, n, _ in own]),
    }
    return Rollout(
        **heard if answered else {},
        prompts=tuple(Prompt(f"p{slot}", (slot,), slot, {"slot": slot}) for slot, _ in groups),
        group=torch.tensor([p for p, *_ in own], dtype=torch.long),
        lengths=torch.tensor([length for *_, length in own], dtype=torch.long),
        tokens=tokens,
        logp=-tokens / 7,
        finished=torch.tensor([length % 2 == 0 for *_, length in own], dtype=torch.bool),
        texts=tuple(f"{slot}.{n}" for _, slot, n, _ in own),
        weight_version=5,
    )


def completions_of(rollout):
    """One (prompt, text, tokens, log-probabilities, finished) for each completion."""
    lengths = rollout.lengths.tolist()
    assert sum(lengths) == len(rollout.tokens) == len(rollout.logp)
    parts = (rollout.tokens.split(lengths), rollout.logp.split(lengths))
    found = [
        (rollout.prompts[p], text, tokens.tolist(), logp.tolist(), done)
        for p, text, tokens, logp, done in zip(
            rollout.group.tolist(), rollout.texts, *parts, rollout.finished.tolist(), strict=True
        )
    ]
    if rollout.turns:
        before = iter(rollout.heard.split(rollout.gaps.tolist()))
        for (_, text, tokens, *_), turns, outcome in zip(found, rollout.turns, rollout.outcomes.tolist(), strict=True):
            slot, n = map(int, text.split("."))
            assert turns == ({"role": "assistant", "content": text},) and abs(outcome - slot / (n + 1)) < 1e-6
            for token in tokens:
                assert next(before).tolist() == [-token] * (token % 3)
        assert next(before, None) is None
    return found


@settings(max_examples=60, deadline=None)
@given(groups, st.data(), st.booleans())
def test_take_takes_whole_completions(groups, data, answered):
    rollout = rollout_of(groups, answered=answered)
    everything = completions_of(rollout)
    chosen = data.draw(st.lists(st.integers(0, len(everything) - 1), unique=True)) if everything else []
    taken = take(rollout, torch.tensor(chosen, dtype=torch.long))
    assert completions_of(taken) == [everything[n] for n in chosen]
    assert taken.prompts == rollout.prompts and taken.weight_version == 5


@settings(max_examples=60, deadline=None)
@given(groups, groups, st.booleans())
def test_join_sorts_prompts_by_slot_and_keeps_the_samples_of_each_in_order(one, other, answered):
    parts = [
        rollout_of(one, 0, answered),
        rollout_of(other, 4, answered),
    ]  # prompts of both have their later samples in the second
    joined, places = join(parts)
    one_after_the_other = [completion for part in parts for completion in completions_of(part)]
    assert completions_of(joined) == sorted(one_after_the_other, key=lambda completion: completion[0].slot)
    assert completions_of(joined) == [one_after_the_other[place] for place in places.tolist()]
    slots = [prompt.slot for prompt in joined.prompts]
    assert slots == sorted({slot for slot, _ in one + other})
    assert joined.group.tolist() == sorted(joined.group.tolist()) and joined.weight_version == 5


@settings(max_examples=40, deadline=None)
@given(groups, st.booleans())
def test_a_rollout_comes_back_from_a_checkpoint(groups, answered):
    rollout = rollout_of(groups, answered=answered)
    back = rollout_from_state(rollout_state(rollout))
    bare = Rollout(**{**vars(rollout), "prompts": tuple(replace(p, columns={}) for p in rollout.prompts)})
    assert [list(turns) for turns in back.turns] == [list(turns) for turns in rollout.turns]
    assert completions_of(replace(back, turns=rollout.turns)) == completions_of(bare)


@settings(max_examples=40, deadline=None)
@given(groups)
def test_prompts_without_completions_go_and_nothing_else(groups):
    rollout = rollout_of(groups)
    left = without_silent_prompts(rollout)
    assert completions_of(left) == completions_of(rollout)
    assert [prompt.slot for prompt in left.prompts] == [slot for slot, sizes in groups if sizes]

"""Lines that share their prompts' keys, beside lines that each have their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES

from agrpo.engine.backends.caches import FlatCache, SharedCache
from agrpo.engine.backends.decoder import FusedDecoder
from agrpo.engine.modules import Policy

_LINES = 6
_PROMPTS = [(5, 2, 7), (9,), (3, 3, 3, 3, 8), (4, 4), (11,) * 9]
_MOST = 40  # more than what a cache grows by at a time


@pytest.fixture(scope="module", params=["llama-tied", "qwen3-untied"])
def lm(request):
    torch.manual_seed(0)
    return Policy(FAMILIES[request.param]().eval()).lm


events = st.lists(
    st.tuples(st.sampled_from(["step", "step", "join", "keep"]), st.integers(0, 2**32 - 1)), min_size=3, max_size=14
)


@settings(max_examples=25, deadline=None)
@given(first=st.lists(st.integers(0, 4), min_size=_LINES, max_size=_LINES), events=events)
@torch.no_grad()
def test_shared_prompts_are_the_prompts_of_every_line(lm, first, events):
    """Whatever is asked in which order: lines that step, end, are dropped or begin anew behind another prompt."""
    caches = [kind(_LINES, 9, _MOST, torch.device("cpu")) for kind in (FlatCache, SharedCache)]
    decoders = (None, FusedDecoder(lm, _LINES))
    ids = [_PROMPTS[p] for p in first]
    mine, others = (cache.join(lm, ids, torch.arange(_LINES)) for cache in caches)
    torch.testing.assert_close(mine, others)
    length = torch.zeros(_LINES, dtype=torch.long)
    running = torch.ones(_LINES, dtype=torch.bool)
    for kind, seed in events:
        generator = torch.Generator().manual_seed(seed)
        ends = torch.rand(len(running), generator=generator) < 0.3
        if kind == "keep" and bool((running & ~ends).any()):
            places = (running & ~ends).nonzero()[:, 0]
            for cache in caches:
                cache.keep(places)
            running, length = running[places], length[places]
        elif kind == "join" and bool(ends.any()):
            places = ends.nonzero()[:, 0]
            ids = [_PROMPTS[int(p)] for p in torch.randint(0, 5, (len(places),), generator=generator)]
            torch.testing.assert_close(*(cache.join(lm, ids, places) for cache in caches))
            running[places], length[places] = True, 0
        elif kind == "step":
            for _ in range(int(torch.randint(1, 14, (), generator=generator))):
                if int(length.max()) == _MOST:
                    break
                token = torch.randint(0, 97, (len(running),), generator=generator)
                mine, others = (
                    cache.step(lm, token, running, decoder) for cache, decoder in zip(caches, decoders, strict=True)
                )
                torch.testing.assert_close(mine[running], others[running], atol=1e-5, rtol=1e-5)
                length += 1
            if bool((running & ~ends).any()):
                running &= ~ends


@torch.no_grad()
def test_a_prompt_stands_once_for_its_lines_and_goes_with_the_last_of_them(lm):
    cache = SharedCache(_LINES, 9, _MOST, torch.device("cpu"))
    cache.join(lm, [_PROMPTS[p] for p in (0, 0, 0, 1, 1, 2)], torch.arange(_LINES))
    assert cache.prompt_keys[0].shape[0] == 3
    cache.keep(torch.tensor([1, 5]))
    assert cache.prompt_keys[0].shape[0] == 2
    cache.join(lm, [_PROMPTS[4]], torch.tensor([0]))
    assert [of_layer.shape[0] for of_layer in cache.prompt_values] == [2] * len(cache.prompt_values)

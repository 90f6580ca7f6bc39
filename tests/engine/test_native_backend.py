"""The native sampler against transformers' generate, and its random streams."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FALLBACKS, FAMILIES, ragged, tokenizer
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from agrpo.engine.backends.native import NativeBackend, Sampling
from agrpo.engine.backends.sampling import keep_likely, uniforms
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy
from agrpo.types import Prompt


def sampler(family, stop=(1,), max_sequences=256):
    torch.manual_seed(0)
    policy = Policy({**FAMILIES, **FALLBACKS}[family]().eval())
    torch.nn.init.normal_(policy.head, std=0.3)  # sharp enough that greedy has no near ties
    flat = policy.fallback_reason is None
    backend = NativeBackend(policy.lm, flat=flat, tokenizer=tokenizer(), stop=stop, max_sequences=max_sequences)
    return policy, backend


def prompts_of(ids, slots=None):
    return [
        Prompt(text="", ids=tuple(i), slot=s, columns={}) for s, i in zip(slots or range(len(ids)), ids, strict=True)
    ]


@pytest.mark.parametrize("family", [*FAMILIES, *FALLBACKS])
def test_greedy_equals_transformers_generate_token_by_token(family):
    policy, backend = sampler(family)
    ids = ragged(5, prompts=(3, 17, 1, 30), groups=((1,),))[0]
    rollout = backend.generate(prompts_of(ids), [1] * 4, Sampling(24, greedy=True), (0, 0))
    plain = {**FAMILIES, **FALLBACKS}[family]().eval()
    plain.load_state_dict(policy.lm.state_dict())
    for prompt, completion in zip(ids, rollout.tokens.split(rollout.lengths.tolist()), strict=True):
        expected = plain.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=1, pad_token_id=0
        )[0, len(prompt) :]
        assert completion.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama-untied", "qwen2-tied", "gpt2"])
def test_a_completion_depends_only_on_its_own_key_and_prompt(family):
    _, backend = sampler(family, stop=range(1, 12))  # many stop tokens: rows finish at different times
    ids = ragged(5, prompts=(3, 17, 1, 30), groups=((1,),))[0]
    together = backend.generate(prompts_of(ids), [6] * 4, Sampling(30, temperature=3.0), (7, 3))
    texts = together.tokens.split(together.lengths.tolist())
    assert len({tuple(t.tolist()) for t in texts}) > 12
    alone = backend.generate(prompts_of(ids)[2:3], [6], Sampling(30, temperature=3.0), (7, 3))
    for one, other in zip(alone.tokens.split(alone.lengths.tolist()), texts[12:18], strict=True):
        assert one.tolist() == other.tolist()
    backend.max_sequences = 5  # other batches, groups torn apart
    torn = backend.generate(prompts_of(ids), [6] * 4, Sampling(30, temperature=3.0), (7, 3))
    assert torn.tokens.tolist() == together.tokens.tolist()
    another = backend.generate(prompts_of(ids), [6] * 4, Sampling(30, temperature=3.0), (7, 4))
    assert another.tokens.tolist() != together.tokens.tolist()


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-untied", "gpt2"])
def test_sampled_logprobs_are_those_of_the_training_forward(family):
    policy, backend = sampler(family, stop=range(1, 12))
    ids = ragged(6, prompts=(3, 17, 1), groups=((1,),))[0]
    rollout = backend.generate(prompts_of(ids), [5, 1, 3], Sampling(20, temperature=0.8), (0, 0))
    logp, _ = policy(build_layout(ids, rollout.group, rollout.lengths, rollout.tokens), 0.8)
    assert (logp - rollout.logp).abs().max() < 1e-4
    ended = torch.stack([t[-1] for t in rollout.tokens.split(rollout.lengths.tolist())])
    assert (torch.isin(ended, backend.stop) == rollout.finished).all()
    assert (rollout.lengths[~rollout.finished] == 20).all()


FILTERS = [
    {},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 12, "top_p": 0.95, "min_p": 0.1},
    {"top_k": 1},
    {"top_k": 500, "top_p": 1e-6},
]


def warped(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution that transformers' own generate samples from, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return warpers(None, logits).softmax(-1)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_are_those_of_transformers(filters):
    logits = torch.randn(200, 97, generator=torch.Generator().manual_seed(4)) * 3
    for temperature in (0.7, 1.3):
        p = keep_likely((logits / temperature).softmax(1), **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters})
        torch.testing.assert_close(p / p.sum(1, keepdim=True), warped(logits, temperature, **filters))


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=30),
    st.integers(0, 40),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 0.99]),
)
def test_filters_keep_the_likeliest_and_ties_together(logits, top_k, top_p, min_p):
    z = torch.tensor([logits], dtype=torch.float64)
    kept = keep_likely(z.softmax(1), top_k, top_p, min_p)[0] > 0
    assert kept[z[0] == z.max()].all()
    least = z[0][kept].min()
    assert torch.equal(kept, z[0] >= least)


def follows(tokens, p):
    """Pearson's chi-square test of token counts at the level 0.001; tokens expected less than 5 times count as one."""
    seen, expected = torch.bincount(tokens, minlength=len(p)), p.double() * len(tokens)
    rare = expected < 5
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] == 0:
        assert seen[-1] == 0
        seen, expected = seen[:-1], expected[:-1]
    if len(expected) == 1:
        return True
    chi_square = ((seen - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), chi_square / 2) > 1e-3


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_models_samples_follow_its_filtered_distribution(filters):
    policy, backend = sampler("qwen2-tied", stop=(), max_sequences=10_000)
    temperature, n, ids = 1.3, 20_000, [5, 2, 71]
    rollout = backend.generate(prompts_of([ids]), [n], Sampling(1, temperature, **filters), (0, 0))
    plain = FAMILIES["qwen2-tied"]().eval()
    plain.load_state_dict(policy.lm.state_dict())
    logits = plain(torch.tensor([ids])).logits[:, -1].detach()
    p = warped(logits, temperature, **filters)[0]
    assert follows(rollout.tokens, p)
    torch.testing.assert_close(rollout.logp, (logits[0] / temperature).log_softmax(0)[rollout.tokens])


def test_streams_are_distinct_and_reproducible():
    keys = [(slot, sample) for slot in range(20) for sample in range(5)]
    numbers = uniforms((3, 9), keys, 8)
    assert len({tuple(row.tolist()) for row in numbers}) == 100
    assert torch.equal(uniforms((3, 9), keys[40:41], 8)[0], numbers[40])
    assert not torch.equal(uniforms((9, 3), keys, 8), numbers)
    assert abs(float(numbers.mean()) - 0.5) < 0.05

"""The native sampler against transformers' generate, and its random streams."""

import collections

import pytest
import torch
from tiny import FALLBACKS, FAMILIES, ragged, tokenizer

from agrpo.engine.backends.native import NativeBackend, Sampling
from agrpo.engine.backends.sampling import draw, uniforms
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


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_draws_follow_the_distribution(top_p):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -9.0]])
    temperature = 1.3
    p = (logits[0] / temperature).softmax(0)
    if top_p < 1:
        p = torch.where(p >= p.sort(descending=True).values[1], p, 0)  # 0.53 + 0.25 is the first sum over 0.6
        p = p / p.sum()
    n = 20_000
    token, logp = draw(logits.expand(n, -1), uniforms((0, 0), [(0, 0)], n)[0], temperature, top_p)
    seen = collections.Counter(token.tolist())
    chi_square = sum((seen[i] - n * q) ** 2 / (n * q) for i, q in enumerate(p.tolist()) if q > 0)
    assert chi_square < 20  # 4 degrees of freedom: p < 0.001 beyond 18.5
    assert all(seen[i] == 0 for i, q in enumerate(p.tolist()) if q == 0)
    torch.testing.assert_close(logp, (logits[0] / temperature).log_softmax(0)[token])


def test_streams_are_distinct_and_reproducible():
    keys = [(slot, sample) for slot in range(20) for sample in range(5)]
    numbers = uniforms((3, 9), keys, 8)
    assert len({tuple(row.tolist()) for row in numbers}) == 100
    assert torch.equal(uniforms((3, 9), keys[40:41], 8)[0], numbers[40])
    assert not torch.equal(uniforms((9, 3), keys, 8), numbers)
    assert abs(float(numbers.mean()) - 0.5) < 0.05

"""The native sampler against transformers' generate, and its random streams."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FALLBACKS, FAMILIES, ragged, tokenizer, warped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agrpo.engine.backends.native import NativeBackend, Sampling
from agrpo.engine.backends.sampling import keep_likely, uniforms
from agrpo.engine.backends.stopping import StopStrings
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


@pytest.mark.parametrize("family", ["llama-untied", "qwen2-tied", "qwen3-tied", "gpt2", "mistral-window"])
def test_a_completion_depends_only_on_its_own_key_and_prompt(family):
    _, backend = sampler(family, stop=range(1, 12))  # many stop tokens: rows finish at different times
    ids = ragged(5, prompts=(3, 17, 1, 30), groups=((1,),))[0]
    # Under this key no uniform number falls within rounding (1e-7) of a boundary between two tokens; (7, 3) has one.
    together = backend.generate(prompts_of(ids), [6] * 4, Sampling(30, temperature=3.0), (7, 5))
    texts = together.tokens.split(together.lengths.tolist())
    assert len({tuple(t.tolist()) for t in texts}) > 12
    alone = backend.generate(prompts_of(ids)[2:3], [6], Sampling(30, temperature=3.0), (7, 5))
    for one, other in zip(alone.tokens.split(alone.lengths.tolist()), texts[12:18], strict=True):
        assert one.tolist() == other.tolist()
    for backend.max_sequences in (1, 3, 5, 1000):  # other batches, groups torn apart, lines refilled at other times
        torn = backend.generate(prompts_of(ids), [6] * 4, Sampling(30, temperature=3.0), (7, 5))
        assert torn.tokens.tolist() == together.tokens.tolist()
        assert torn.texts == together.texts
        assert torn.finished.tolist() == together.finished.tolist()
        assert (torn.logp - together.logp).abs().max() < 1e-5
    another = backend.generate(prompts_of(ids), [6] * 4, Sampling(30, temperature=3.0), (7, 4))
    assert another.tokens.tolist() != together.tokens.tolist()


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-untied", "qwen3-tied", "gpt2"])
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


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_completions_are_told_of_as_they_end_each_once_and_as_they_come_out(family):
    _, backend = sampler(family, stop=range(1, 12), max_sequences=5)
    prompts = prompts_of(ragged(5, prompts=(3, 17, 1), groups=((1,),))[0])
    told, read = {}, []

    def ended(places, ids, texts, finished):
        assert not told.keys() & set(places)
        told.update(zip(places, zip(ids, texts, finished, strict=True), strict=True))
        read.append(set(places))

    for sampling in (Sampling(20, temperature=3.0), Sampling(20, temperature=3.0, stop=("t5",)), Sampling(1)):
        rollout = backend.generate(prompts, [4, 1, 6], sampling, (7, 5), ended=ended)
        ids = [t.tolist() for t in rollout.tokens.split(rollout.lengths.tolist())]
        assert [told[n] for n in range(11)] == list(zip(ids, rollout.texts, rollout.finished.tolist(), strict=True))
        assert len(told) == 11 and len(read) > 1
        plain = backend.generate(prompts, [4, 1, 6], sampling, (7, 5))
        assert plain.tokens.tolist() == rollout.tokens.tolist() and plain.texts == rollout.texts
        told.clear(), read.clear()
    assert len(backend.generate(prompts, [0, 0, 0], Sampling(4), (7, 5), ended=ended).lengths) == 0 and not told


def test_waiting_completions_take_the_lines_of_those_that_ended():
    _, backend = sampler("llama-tied", stop=range(1, 12), max_sequences=4)
    steps = []
    embed = backend.lm.get_input_embeddings()
    embed.register_forward_pre_hook(lambda module, inputs: steps.append(len(inputs[0])))
    rollout = backend.generate(prompts_of([[5, 2], [9]]), [20, 20], Sampling(60, temperature=3.0), (0, 0))
    decoding = steps[1:]
    assert max(decoding) == 4
    in_batches = sum(int(lengths.max()) for lengths in rollout.lengths.split(4))
    assert len(decoding) < 0.75 * in_batches  # one batch after another waits for the longest of each
    assert len(decoding) >= len(rollout.tokens) / 4


@pytest.mark.parametrize("max_sequences", [3, 1000])
@pytest.mark.parametrize("family", ["llama-untied", "gpt2"])
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(family, max_sequences):
    _, backend = sampler(family, stop=(), max_sequences=max_sequences)
    prompts, sampling = prompts_of([[5, 2], [9], [30, 31]]), Sampling(40, temperature=3.0)
    free = backend.generate(prompts, [8] * 3, sampling, (0, 0))
    strings = ("t5t1", "7t", "t33")  # parts of tokens and of several
    cut = backend.generate(prompts, [8] * 3, dataclasses.replace(sampling, stop=strings), (0, 0))
    lengths = set()
    for n, (whole, ended) in enumerate(
        zip(free.tokens.split(free.lengths.tolist()), cut.tokens.split(cut.lengths.tolist()), strict=True)
    ):
        texts = [backend.tokenizer.decode(whole[: t + 1], skip_special_tokens=True) for t in range(len(whole))]
        first = next((t + 1 for t, text in enumerate(texts) if any(s in text for s in strings)), None)
        assert ended.tolist() == whole[:first].tolist()
        assert bool(cut.finished[n]) == (first is not None)
        assert cut.texts[n] == texts[len(ended) - 1]
        lengths.add(first)
    assert len(lengths) > 5


def byte_tokenizer():
    """A token for each byte, "##" as one more, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "##"])}, [("#", "#")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


BYTES = byte_tokenizer()


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="ab#é語😀 ", min_size=20, max_size=60),
    st.lists(st.text(alphabet="ab#é語😀 ", min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 9),
)
def test_stop_strings_are_found_where_the_whole_text_first_has_them(text, strings, every):
    tokenizer = BYTES
    tokens = []
    for place, token in enumerate(tokenizer(text)["input_ids"]):
        tokens += [token] if place % every else [tokenizer.eos_token_id, token]  # special tokens are no text
    found = StopStrings(tokenizer, strings, 1)
    for t, token in enumerate(tokens):
        so_far = tokenizer.decode(tokens[: t + 1], skip_special_tokens=True)
        expected = any(string in so_far for string in strings)
        assert found.ended([0], [token]) == [expected]
        if expected:
            break


def test_streams_are_distinct_and_reproducible():
    keys = [(slot, sample) for slot in range(20) for sample in range(5)]
    numbers = uniforms((3, 9), keys, 8)
    assert len({tuple(row.tolist()) for row in numbers}) == 100
    assert torch.equal(uniforms((3, 9), keys[40:41], 8)[0], numbers[40])
    assert not torch.equal(uniforms((9, 3), keys, 8), numbers)
    assert abs(float(numbers.mean()) - 0.5) < 0.05

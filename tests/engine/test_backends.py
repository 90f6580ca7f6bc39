"""What every rollout backend must do, whatever its insides: one suite, run through the engine.

A backend is a function that makes an engine around a language model; another one joins by one more line in BACKENDS,
and in STALE, which makes its weights those of a moment ago for ever. Heads are 32 wide, the least vLLM's CPU build has.
"""

import copy
import functools
import gc
import importlib.util

import pytest
import torch
from rollout_servers import serving
from tiny import FAMILIES, HEADS_OF_32, engine_of, follows, ragged, warped
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from agrpo.config import LoraConfig, ModelConfig, RolloutConfig
from agrpo.engine import zero
from agrpo.engine.backends import remote
from agrpo.engine.backends.deepspeed import DeepspeedBackend, why_not_sound
from agrpo.engine.backends.native import Sampling
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import causal_lm, whole_weights
from agrpo.models import make_trainable
from agrpo.types import Prompt


def on_vllm(lm, max_sequences=16, **options):
    rollout = RolloutConfig(backend="vllm", max_sequences=max_sequences)
    return engine_of(lm, rollout=rollout, longest=64, **options)


def on_servers(lm, max_sequences=4, **options):
    urls = [serving(lm, max_sequences)[0] for _ in range(2)]
    return engine_of(lm, rollout=RolloutConfig(backend="server", servers={"urls": urls}), **options)


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: bash scripts/setup.sh --vllm"
)


def by_kernels(lm, max_sequences=4, **options):
    """An engine that generates by DeepSpeed's kernels, where they are sound."""
    against = why_not_sound(lm, options.get("zero_stage", 0), zero.kernel_layers())
    if against:
        pytest.skip("deepspeed: " + "; ".join(against))
    return engine_of(lm, rollout=RolloutConfig(backend="deepspeed", max_sequences=max_sequences), **options)


def through_deepspeed(lm, max_sequences=4, **options):
    """An engine that generates through DeepSpeed's rollout interface, whose kernels are transformers' here."""

    def note(words):
        assert "min_p" in words, words  # which it lacks: native samples then, and at nothing else

    engine = engine_of(lm, max_sequences=max_sequences, **options)
    kernels = zero.KernelRollout(engine._engine, engine.tokenizer)
    engine._backend = DeepspeedBackend(engine.whole_policy, kernels=kernels, native=engine._backend, note=note)
    return engine


BACKENDS = {
    "native": functools.partial(engine_of, max_sequences=4),  # fewer than the completions: lines are refilled
    "native-fallback": functools.partial(engine_of, max_sequences=4, flat=False),
    "vllm": on_vllm,
    "server": on_servers,
    "deepspeed": by_kernels,
    "deepspeed-interface": through_deepspeed,
}


def keep_native(engine, monkeypatch):
    engine._backend.lm = copy.deepcopy(engine._backend.lm)


def keep_vllm(engine, monkeypatch):
    monkeypatch.setattr(engine._backend, "_take_weights", lambda: None)


def keep_server(engine, monkeypatch):
    old = [(name, weight.clone()) for name, weight in whole_weights(engine.whole_policy)]
    monkeypatch.setattr(remote, "whole_weights", lambda policy: iter(old))


def keep_kernels(engine, monkeypatch):
    """What DeepSpeed generates from, and the self-test that would see it."""
    backend, own = engine._backend, dict(engine.module.named_parameters())
    old, kernels = weights(engine), backend.kernels

    def stale(*asked, **how):
        now = weights(engine)
        put(old)
        try:
            return kernels(*asked, **how)
        finally:
            put(now)

    @torch.no_grad()
    def put(values):
        for name, parameter in own.items():
            parameter.copy_(values[name])

    monkeypatch.setattr(backend, "kernels", stale)
    monkeypatch.setattr(backend, "self_test", lambda: None)


STALE = {
    "native": keep_native,
    "native-fallback": keep_native,
    "vllm": keep_vllm,
    "server": keep_server,
    "deepspeed": keep_kernels,
    "deepspeed-interface": keep_kernels,
}
HEADS = ["llama-tied", "llama-untied", "qwen3-tied"]
# Some prompts hold the end token and the pad token, which are one and the same here.
PROMPTS = [
    Prompt(text="", ids=tuple(ids), slot=slot, columns={})
    for slot, ids in enumerate([[1, 7, 1, 1], *ragged(9)[0], [0, 0, 3], [1]])
]
GREEDY = Sampling(12, greedy=True)


def model(family):
    torch.manual_seed(0)
    lm = FAMILIES[family](**HEADS_OF_32, **({"head_dim": 32} if family.startswith("qwen3") else {}))
    for weight in (p for p in lm.parameters() if p.ndim == 2):
        torch.nn.init.normal_(weight, std=0.18)  # greedy has no near ties, and tied heads do not merely repeat
    return lm


def with_lora(family):
    return make_trainable(model(family), ModelConfig(name_or_path="x", lora=LoraConfig(rank=4, alpha=8.0)))


@pytest.fixture(params=[pytest.param(name, marks=needs_vllm if name == "vllm" else ()) for name in BACKENDS])
def name(request):
    return request.param


@pytest.fixture
def backend(name):
    return functools.partial(BACKENDS[name], pad="t1")


def train(engine, steps=1, rate=1e-2, between=lambda: None):
    """Steps of two micro-batches each, and something between the two."""
    for _ in range(steps):
        for seed, last in ((1, False), (2, True)):
            engine.backward(-engine.forward(build_layout(*ragged(seed)))[0].mean() / 2, last)
            if not last:
                between()
        engine.step(rate)


def weights(engine):
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def plain_model(engine):
    """Unmodified transformers with the engine's present weights, adapters merged into them."""
    lm = copy.deepcopy(engine.whole_policy.lm)
    lm = lm.merge_and_unload() if hasattr(lm, "merge_and_unload") else lm
    plain = type(causal_lm(lm))(copy.deepcopy(lm.config))
    plain.config._attn_implementation = "eager"
    plain.load_state_dict(lm.state_dict())
    return plain.eval()


def require_greedy_tokens(engine):
    """The engine's greedy completions are those of transformers' generate with the weights as they are now."""
    rollout = engine.generate(PROMPTS, [1] * len(PROMPTS), GREEDY, (0, 0))
    assert rollout.weight_version == engine.weight_version
    plain = plain_model(engine)
    for prompt, tokens in zip(PROMPTS, rollout.tokens.split(rollout.lengths.tolist()), strict=True):
        ids = torch.tensor([prompt.ids])
        options = {"attention_mask": torch.ones_like(ids), "eos_token_id": 1, "pad_token_id": 1}
        expected = plain.generate(ids, max_new_tokens=12, do_sample=False, **options)
        assert tokens.tolist() == expected[0, len(prompt.ids) :].tolist()
    return rollout


def require_training_logprobs(engine):
    """The sampler's log-probabilities are those of the training forward at the same temperature."""
    rollout = engine.generate(PROMPTS, [3] * len(PROMPTS), Sampling(20, temperature=0.8), (0, 0))
    layout = build_layout([p.ids for p in PROMPTS], rollout.group, rollout.lengths, rollout.tokens)
    assert (engine.evaluate(layout, 0.8)[0] - rollout.logp).abs().max() < 1e-4


@pytest.mark.parametrize("make", [model, with_lora])
@pytest.mark.parametrize("family", HEADS)
def test_generation_follows_every_weight_step(backend, family, make):
    engine = backend(make(family))
    before = require_greedy_tokens(engine)
    require_training_logprobs(engine)
    train(engine, 3 if make is with_lora else 1, rate=0.03)  # a large step; every prompt has been seen before
    after = require_greedy_tokens(engine)
    require_training_logprobs(engine)
    assert after.tokens.tolist() != before.tokens.tolist()


def test_a_stale_backend_does_not_pass(name, backend, monkeypatch):
    engine = backend(model("llama-untied"))
    require_greedy_tokens(engine)
    STALE[name](engine, monkeypatch)
    require_greedy_tokens(engine)
    train(engine, rate=0.03)
    with pytest.raises(AssertionError):
        require_greedy_tokens(engine)
    if not name.startswith("deepspeed"):  # its interface tells none: they are the training forward's, whoever sampled
        with pytest.raises(AssertionError):
            require_training_logprobs(engine)


@pytest.mark.parametrize("make", [model, with_lora])
def test_a_rollout_changes_no_parameter_no_gradient_and_no_step(backend, make):
    engine, straight = backend(make("llama-tied")), backend(make("llama-tied"))

    def rollout():
        before = weights(engine)
        gradients = {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}
        engine.generate(PROMPTS, [2] * len(PROMPTS), Sampling(12), (0, 0))
        assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
        after = {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}
        assert gradients and gradients.keys() == after.keys()
        assert all(torch.equal(value, gradients[name]) for name, value in after.items())

    train(engine, 2, between=rollout)
    train(straight, 2)
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(engine).items())
    assert engine.module.training


def test_fifty_switches_leave_no_memory_behind(backend):
    engine = backend(model("llama-tied"))

    def held():
        gc.collect()
        return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)

    def switch():
        engine.generate(PROMPTS, [1] * len(PROMPTS), Sampling(6), (0, 0))
        engine.train_mode()

    for _ in range(2):
        switch()
    before = held()
    for _ in range(50):
        switch()
    assert held() <= before
    leaked = torch.zeros(1000)  # and the measure sees what stays
    assert held() == before + leaked.nbytes


def by_vllm(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution that vLLM samples from: the filters of transformers, min_p first."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return warpers(None, logits).softmax(-1)


FILTERS = [
    {},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 12, "top_p": 0.95, "min_p": 0.1},
    {"top_k": 1},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_samples_follow_the_filtered_distribution(name, backend, filters):
    engine = backend(model("qwen2-tied"), max_sequences=5000)
    ids, temperature = (5, 2, 71), 1.3
    prompts = [Prompt(text="", ids=ids, slot=slot, columns={}) for slot in range(10)]
    rollout = engine.generate(prompts, [2000] * 10, Sampling(1, temperature, **filters), (0, 0))
    logits = plain_model(engine)(torch.tensor([ids])).logits[:, -1].detach()
    p = (by_vllm if name == "vllm" else warped)(logits, temperature, **filters)[0]
    assert follows(rollout.tokens, p)
    before = (logits[0] / temperature).log_softmax(0)
    expected = (p.log() if name == "vllm" else before)[rollout.tokens]  # vLLM tells those after the filters
    torch.testing.assert_close(rollout.logp, expected, atol=2e-5, rtol=0)
    if not filters:
        assert not follows(rollout.tokens, (logits[0] / 1.2).softmax(0))  # the test has power

"""DeepSpeed's Hybrid Engine: what speaks against its kernels, and that what is wrong with them is found.

The kernels run on CUDA alone. What they would be called through, DeepSpeed's rollout interface, runs here too: without
kernels it generates by transformers, from the engine's own weights.
"""

import pytest
import torch
from stage_runs import LENGTH_REWARD, rows, run_several, tiny_policy
from tiny import FALLBACKS, FAMILIES, engine_of, ragged
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from agrpo.config import LoraConfig, ModelConfig, RolloutConfig
from agrpo.engine import zero
from agrpo.engine.backends.deepspeed import DeepspeedBackend, why_not_sound
from agrpo.engine.backends.native import Sampling
from agrpo.engine.layout import build_layout
from agrpo.models import make_trainable
from agrpo.types import Prompt

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
MODELS = {
    **FAMILIES,
    **FALLBACKS,
    "llama-all-heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=4)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)),
    "gpt-neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]])
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)),
}
PROMPTS = [Prompt(text="", ids=tuple(ids), slot=slot, columns={}) for slot, ids in enumerate(ragged(9)[0])]
CACHE, GROUPED = "keep a cache of their own", "damages the weights of models with grouped-query"


@pytest.mark.parametrize(
    ("kind", "named", "not_named"),
    [
        ("llama-all-heads", CACHE, "grouped"),
        ("llama-tied", GROUPED, "no kernels for"),
        ("gpt2", CACHE, "grouped"),
        ("opt", CACHE, "grouped"),
        ("gptj", CACHE, "grouped"),
        ("gpt-neo", CACHE, "grouped"),
        ("gpt-neox", CACHE, "grouped"),
        ("bloom", CACHE, "grouped"),
        ("qwen2-tied", "no kernels for qwen2", CACHE),
        ("qwen3-untied", "no kernels for qwen3", GROUPED),
        ("mistral-window", "no kernels for mistral", GROUPED),
    ],
)
def test_the_probe_names_what_is_wrong_with_each_kind_of_model(kind, named, not_named):
    found = why_not_sound(MODELS[kind](), 2, zero.kernel_layers(), cuda=True)
    assert any(named in reason for reason in found)
    assert not any(not_named in reason for reason in found)
    assert not any("CUDA" in reason or "LoRA" in reason or "ZeRO" in reason for reason in found)


def test_the_probe_names_the_machine_lora_and_zero_3():
    lm = MODELS["llama-all-heads"]()
    layers = zero.kernel_layers()
    before = set(why_not_sound(lm, 2, layers, cuda=True))
    assert set(why_not_sound(lm, 2, layers, cuda=False)) - before == {"its kernels need CUDA: on a CPU there are none"}
    assert set(why_not_sound(lm, 3, layers, cuda=True)) - before == {
        "with ZeRO-3 it generates gibberish (open reports)"
    }
    adapted = make_trainable(lm, ModelConfig(name_or_path="x", lora=LoraConfig(rank=2)))
    assert set(why_not_sound(adapted, 2, layers, cuda=True)) - before == {"it does not see LoRA's adapters"}


def test_the_probe_lets_a_layer_pass_whose_contract_is_that_of_the_kernels():
    """A decoder as transformers had them: no cache object. Nothing of today's families has one."""

    class OldLayer(torch.nn.Module):
        def forward(self, hidden_states, layer_past=None):
            return (hidden_states,)

    lm = MODELS["llama-all-heads"]()
    lm.model.layers = torch.nn.ModuleList([OldLayer()])
    assert why_not_sound(lm, 2, {OldLayer}, cuda=True) == []


def test_an_engine_falls_back_with_the_reason_said_once_and_generates_as_native():
    said = []
    lm = sharp("llama-tied")
    engine = engine_of(lm, rollout=RolloutConfig(backend="deepspeed", max_sequences=4), note=said.append)
    native = engine_of(sharp("llama-tied"), max_sequences=4)
    for step in range(2):
        own, expected = (e.generate(PROMPTS, [2] * 3, Sampling(8), (0, step)) for e in (engine, native))
        assert torch.equal(own.tokens, expected.tokens) and torch.equal(own.logp, expected.logp)
        assert own.weight_version == step
        train(engine), train(native)
    (words,) = said
    assert words.startswith("rollout.backend: deepspeed is not sound here: ")
    assert GROUPED in words and words.endswith("native generates from the same engine")


def test_a_run_says_the_reason_in_its_log_and_learns_what_native_learns(tmp_path):
    model = f"model.name_or_path={tiny_policy(tmp_path / 'start')}"
    common = [model, "evaluation.data=null", "evaluation.test=null", "training.max_steps=2", LENGTH_REWARD]
    names = ("native", "deepspeed")
    done = run_several([("agrpo", tmp_path / name, [*common, f"rollout.backend={name}"]) for name in names])
    assert done.returncode == 0, done.stderr[-3000:]
    native, own = ([untimed(row) for row in rows(tmp_path / name / "agrpo" / "metrics.jsonl")] for name in names)
    assert own == native and len(own) == 2
    log = (tmp_path / "deepspeed" / "agrpo" / "log.txt").read_text()
    assert log.count("rollout.backend: deepspeed is not sound here: ") == 1 and "no kernels for qwen2" in log
    assert "deepspeed" not in (tmp_path / "native" / "agrpo" / "log.txt").read_text()


def untimed(row):
    return {key: value for key, value in row.items() if not key.startswith(("time", "throughput", "memory"))}


# DeepSpeed's rollout interface


def sharp(kind):
    torch.manual_seed(0)
    lm = MODELS[kind]()
    for weight in (p for p in lm.parameters() if p.ndim == 2):
        torch.nn.init.normal_(weight, std=0.25)
    return lm


def train(engine, rate=0.03):
    engine.backward(-engine.forward(build_layout(*ragged(1)))[0].mean(), True)
    engine.step(rate)


def through_rollout(engine, weights_of=None):
    """The backend of an engine behind DeepSpeed's interface, and what it says. `weights_of`: another engine's."""
    said = []
    kernels = zero.KernelRollout((weights_of or engine)._engine, engine.tokenizer)
    backend = DeepspeedBackend(engine.whole_policy, kernels=kernels, native=engine._backend, note=said.append)
    engine._backend = backend
    return backend, said


@pytest.mark.parametrize("kind", ["llama-untied", "qwen3-tied", "gpt2"])
def test_deepspeeds_rollout_generates_from_the_engines_weights_after_every_step(kind):
    engine = engine_of(sharp(kind), max_sequences=4, pad="t1")
    backend, said = through_rollout(engine)
    before = []
    for step in range(3):
        greedy = engine.generate(PROMPTS, [1] * 3, Sampling(8, greedy=True), (0, step))
        expected = backend.native.generate(PROMPTS, [1] * 3, Sampling(8, greedy=True), (0, step))
        for field in ("tokens", "lengths", "finished", "group"):
            assert torch.equal(getattr(greedy, field), getattr(expected, field)), field
        assert greedy.texts == expected.texts and greedy.weight_version == step
        torch.testing.assert_close(greedy.logp, expected.logp, atol=1e-4, rtol=0)
        assert greedy.tokens.tolist() not in before
        before.append(greedy.tokens.tolist())
        train(engine)
    assert backend.kernels is not None and said == []


def test_the_same_call_of_deepspeeds_rollout_draws_the_same_and_leaves_the_global_stream_alone():
    engine = engine_of(sharp("llama-untied"), max_sequences=4)
    through_rollout(engine)
    state = torch.get_rng_state()
    keys = [((7, 3), 0), ((7, 3), 0), ((7, 4), 0), ((7, 3), 3)]
    drawn = [engine.generate(PROMPTS, [3, 0, 2], Sampling(8), key, first) for key, first in keys]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert len({tuple(one.tokens.tolist()) for one in drawn}) == 3
    assert drawn[0].group.tolist() == [0, 0, 0, 2, 2]


def test_what_deepspeeds_interface_lacks_is_sampled_by_native_and_said_once():
    engine = engine_of(sharp("llama-untied"), max_sequences=4)
    backend, said = through_rollout(engine)
    for how in (Sampling(8, min_p=0.2), Sampling(8, stop=("t7",))):
        own = engine.generate(PROMPTS, [2] * 3, how, (0, 0))
        assert torch.equal(own.tokens, backend.native.generate(PROMPTS, [2] * 3, how, (0, 0)).tokens)
    assert said == ["rollout.backend: deepspeed has neither min_p nor stop strings: native samples where they are set"]


def test_stale_weights_fail_the_self_test_and_native_takes_over():
    engine = engine_of(sharp("llama-untied"), max_sequences=4)
    stale = engine_of(sharp("llama-untied"), flat=False)  # what DeepSpeed asks is a plain model
    backend, said = through_rollout(engine, weights_of=stale)
    engine.generation_mode()
    assert backend.kernels is not None  # the same weights still
    train(engine)
    own = engine.generate(PROMPTS, [2] * 3, Sampling(8), (0, 0))
    assert backend.kernels is None
    assert "its self-test failed: a greedy token is" in said[0] and "(weight version 1)" in said[0]
    assert torch.equal(own.tokens, backend.native.generate(PROMPTS, [2] * 3, Sampling(8), (0, 0)).tokens)
    engine.generate(PROMPTS, [2] * 3, Sampling(8), (0, 1))
    assert len(said) == 1


def test_damaged_tokens_and_kernels_that_do_not_run_fail_the_self_test():
    engine = engine_of(sharp("llama-untied"), max_sequences=4)
    backend, _ = through_rollout(engine)
    assert backend.self_test() is None
    whole = backend.kernels

    def one_wrong(ids, mask, length, **how):
        tokens = whole(ids, mask, length, **how)
        tokens[2, 3] = (tokens[2, 3] + 1) % 97
        return tokens

    def without_its_mask(ids, mask, length, **how):
        return whole(ids, torch.ones_like(mask), length, **how)

    def broken(ids, mask, length, **how):
        raise RuntimeError("no such kernel")

    for damaged, words in (
        (one_wrong, "its self-test failed"),
        (without_its_mask, "its self-test failed"),
        (broken, "its kernels do not run here: RuntimeError: no such kernel"),
    ):
        backend.kernels = damaged
        assert words in backend.self_test()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="DeepSpeed's kernels need CUDA")
def test_on_a_gpu_the_kernels_pass_their_self_test_or_are_given_up_with_a_reason():
    said = []
    lm = sharp("llama-all-heads")
    engine = engine_of(lm, rollout=RolloutConfig(backend="deepspeed", max_sequences=4), note=said.append)
    engine.generate(PROMPTS, [2] * 3, Sampling(8), (0, 0))
    assert (engine._backend.kernels is None) == bool(said)

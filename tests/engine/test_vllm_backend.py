"""vLLM in process: it samples from the weights that training has just left, and says so when it does not."""

import importlib.util
import json

import pytest
import torch
from rollout_servers import server_process
from stage_runs import LENGTH_REWARD, launch, rows, run_tiny, tiny, tiny_policy
from tiny import FAMILIES, HEADS_OF_32, engine_of, ragged

from agrpo.config import LoraConfig, ModelConfig, PolicyConfig, RolloutConfig
from agrpo.engine.backends.checking import SamplerMismatch
from agrpo.engine.backends.native import Sampling
from agrpo.engine.backends.stopping import StopStrings
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import whole_weights
from agrpo.models import make_trainable, merged_weights

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed: bash scripts/setup.sh --vllm")
GREEDY = Sampling(12, greedy=True)
CLOSE = 2e-5  # nats; measured in float32: at most 5.2e-6


def prompts():
    from agrpo.types import Prompt

    return [Prompt(text="", ids=tuple(ids), slot=slot, columns={}) for slot, ids in enumerate(ragged(9)[0])]


def model(family):
    """Sharp enough that greedy has no near ties; a tied head favours the token just read, and would soon be sure."""
    torch.manual_seed(0)
    lm = FAMILIES[family](**HEADS_OF_32)
    torch.nn.init.normal_(lm.get_output_embeddings().weight, std=0.1 if family.endswith("-tied") else 0.3)
    return lm


def engine(lm, zero_stage=0, dtype="float32"):
    return engine_of(lm, zero_stage, dtype, rollout=RolloutConfig(backend="vllm", max_sequences=16), longest=64)


def train(engine, rate=0.05):
    layout = build_layout(*ragged(1))
    engine.backward(-engine.forward(layout)[0].mean(), True)
    engine.step(rate)


def plain(engine, family):
    """Unmodified transformers with the engine's weights as they are now, adapters merged."""
    lm = FAMILIES[family](**HEADS_OF_32)
    engine.generation_mode()  # at ZeRO-3 this gathers them
    lm.load_state_dict(dict(merged_weights(engine.whole_policy.lm)))
    return lm.eval()


@torch.no_grad()
def by_transformers(lm, rollout, temperature=1.0):
    """(C,) log-probabilities of a rollout's tokens."""
    found = []
    for p, tokens in zip(rollout.group.tolist(), rollout.tokens.split(rollout.lengths.tolist()), strict=True):
        ids = torch.tensor([[*rollout.prompts[p].ids, *tokens.tolist()]])
        log_p = (lm(ids).logits[0, -len(tokens) - 1 : -1] / temperature).log_softmax(-1)
        found.append(log_p.gather(1, tokens[:, None])[:, 0])
    return torch.cat(found)


VARIANTS = [("llama-tied", 0, False), ("qwen2-untied", 2, False), ("qwen2-tied", 3, True), ("llama-untied", 0, True)]


@needs_vllm
@pytest.mark.parametrize(("family", "zero_stage", "lora"), VARIANTS)
def test_it_follows_every_step_also_for_prompts_it_has_seen(family, zero_stage, lora):
    lm = model(family)
    if lora:
        lm = make_trainable(lm, ModelConfig(name_or_path="x", lora=LoraConfig(rank=4, alpha=8.0)))
    it = engine(lm, zero_stage)
    for step in range(3):
        greedy = it.generate(prompts(), [1] * 3, GREEDY, (0, step))
        sampled = it.generate(prompts(), [4, 1, 2], Sampling(12, temperature=2.0), (0, step))
        assert greedy.weight_version == sampled.weight_version == step
        oracle = plain(it, family)
        for prompt, own in zip(prompts(), greedy.tokens.split(greedy.lengths.tolist()), strict=True):
            ids = torch.tensor([prompt.ids])
            options = {"attention_mask": torch.ones_like(ids), "eos_token_id": 1, "pad_token_id": 0}
            expected = oracle.generate(ids, max_new_tokens=12, do_sample=False, **options)
            assert own.tolist() == expected[0, len(prompt.ids) :].tolist()
        assert sampled.group.tolist() == [0, 0, 0, 0, 1, 2, 2]
        for rollout, temperature in ((greedy, 1.0), (sampled, 2.0)):
            torch.testing.assert_close(rollout.logp, by_transformers(oracle, rollout, temperature), atol=CLOSE, rtol=0)
            for one, finished in zip(rollout.tokens.split(rollout.lengths.tolist()), rollout.finished, strict=True):
                assert (one[-1] == 1) == finished and (one[:-1] != 1).all() and len(one) <= 12
                assert finished or len(one) == 12
        before = by_transformers(oracle, sampled, 2.0)
        train(it)
        assert (by_transformers(plain(it, family), sampled, 2.0) - before).abs().max() > 1000 * CLOSE


@needs_vllm
@pytest.mark.parametrize("stale", ["weights", "prefix cache", "head"])
def test_a_stale_engine_fails_the_check(monkeypatch, stale):
    from agrpo.engine.backends import vllm

    it = engine(model("llama-tied"))
    backend = it._backend
    before = it.generate(prompts(), [2] * 3, Sampling(12), (0, 0))
    assert backend.check(before, Sampling(12)) < 1e-5
    train(it)
    if stale == "weights":
        monkeypatch.setattr(backend, "_take_weights", lambda: None)
    elif stale == "prefix cache":
        monkeypatch.setattr(backend._llm, "reset_prefix_cache", lambda: None)
    else:
        monkeypatch.setattr(vllm, "_repack_head", lambda model: None)
    # The prompts are longer than a block of the cache, so that a second reading finds the first one's.
    long = [type(p)(p.text, p.ids * 12, p.slot, p.columns) for p in prompts()[:1]]
    if stale == "prefix cache":
        monkeypatch.undo()
        it.generate(long, [2], Sampling(4), (0, 0))
        train(it)
        monkeypatch.setattr(backend._llm, "reset_prefix_cache", lambda: None)
    rollout = it.generate(long, [2], Sampling(4), (0, 1))
    with pytest.raises(SamplerMismatch, match=r"nats a token from the training forward's.*rollout.backend=native"):
        backend.check(rollout, Sampling(4))


@needs_vllm
def test_the_first_rollout_is_checked_whatever_did_not_arrive(monkeypatch):
    from agrpo.engine.backends import vllm

    def without_a_layer(policy):
        return ((name, w) for name, w in whole_weights(policy) if not name.endswith("layers.1.mlp.up_proj.weight"))

    monkeypatch.setattr(vllm, "whole_weights", without_a_layer)
    it = engine(model("qwen2-untied"))
    with pytest.raises(SamplerMismatch):
        it.generate(prompts(), [2] * 3, Sampling(12), (0, 0))


KEYS = [((7, 3), 0), ((7, 3), 0), ((7, 4), 0), ((7, 3), 3)]


@needs_vllm
def test_the_same_call_draws_the_same_and_leaves_the_global_stream_alone():
    it = engine(model("llama-untied"))
    state = torch.get_rng_state()
    draw = [it.generate(prompts(), [3] * 3, Sampling(12), key, first).tokens.tolist() for key, first in KEYS]
    assert torch.equal(torch.get_rng_state(), state)
    assert draw[0] == draw[1]
    assert len({tuple(tokens) for tokens in draw}) == 3


@needs_vllm
def test_top_p_is_in_its_log_probabilities_and_passes_the_check():
    it = engine(model("llama-untied"))
    rollout = it.generate(prompts(), [4] * 3, Sampling(12, top_p=0.6), (0, 0))
    gap = rollout.logp - by_transformers(plain(it, "llama-untied"), rollout)
    assert gap.max() > 0.05 and gap.min() > -CLOSE and gap.max() < -torch.tensor(0.6).log() + CLOSE


@needs_vllm
def test_bfloat16_is_within_its_rounding():
    it = engine(model("qwen2-untied"), zero_stage=2, dtype="bfloat16")
    for step in range(2):
        rollout = it.generate(prompts(), [4] * 3, Sampling(12), (0, step))
        assert 1e-4 < it._backend.check(rollout, Sampling(12)) < 0.05
        train(it, 1e-2)


@needs_vllm
@pytest.mark.parametrize("stale", ["from the start", "after a step"])
def test_in_bfloat16_a_stale_engine_fails_the_first_check(monkeypatch, stale):
    it = engine(model("qwen2-untied"), zero_stage=2, dtype="bfloat16")
    if stale == "after a step":
        it.generate(prompts(), [2] * 3, Sampling(12), (0, 0))
        train(it)
    monkeypatch.setattr(it._backend, "_take_weights", lambda: None)
    it._backend._checked = False
    with pytest.raises(SamplerMismatch, match=r"where rounding explains 0\.2"):
        it.generate(prompts(), [2] * 3, Sampling(12), (0, 1))


@needs_vllm
@pytest.mark.parametrize(("nproc", "zero_stage"), [(1, 0), (2, 0), (2, 3)])
def test_stage_3_runs_on_it(tmp_path, nproc, zero_stage):
    model = tiny_policy(tmp_path / "model", **HEADS_OF_32)
    overrides = [f"model.name_or_path={model}", "rollout.backend=vllm", "training.max_steps=3", "evaluation.every=1"]
    overrides += [LENGTH_REWARD, "training.learning_rate=1e-3", f"engine.zero_stage={zero_stage}"]
    run = run_tiny("agrpo", tmp_path / "run", *overrides, nproc=nproc)
    steps = rows(run / "metrics.jsonl")
    assert len(steps) == 3
    for step in steps:
        assert step["agrpo/effective_sample_size"] > 0.999 and step["agrpo/sampler_dropped"] == 0.0
    assert (run / "model" / "model.safetensors").exists()


@needs_vllm
def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path):
    model = tiny_policy(tmp_path / "model", **HEADS_OF_32)

    def run(name):
        reward = {"target": "interrupting_reward.length_until", "flag": str(tmp_path / name / "stop"), "call": 2}
        own = [f"model.name_or_path={model}", f"rewards=[{json.dumps({**reward, 'number': 'SIGTERM'})}]"]
        own += ["training.max_steps=4", "training.learning_rate=1e-3", "evaluation.test=null", "evaluation.data=null"]
        own += ["logging.samples_per_step=16"]
        done = launch("agrpo", *tiny("agrpo", tmp_path / name, *own, "rollout.backend=vllm"))
        return done.returncode, tmp_path / name / "agrpo"

    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "stop").touch()
    (whole, straight), (stopped, _), (resumed, again) = run("straight"), run("stopped"), run("stopped")
    assert (whole, stopped, resumed) == (0, 75, 0)
    for mine, expected in zip(rows(again / "metrics.jsonl"), rows(straight / "metrics.jsonl"), strict=True):
        for key in ("reward", "completions/mean_length", "loss", "grad_norm", "entropy", "kl"):
            assert mine[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-7), (mine["step"], key)
    assert [row["completion"] for row in rows(again / "samples.jsonl")] == [
        row["completion"] for row in rows(straight / "samples.jsonl")
    ]


@needs_vllm
def test_a_stage_samples_on_a_vllm_server_one_step_ahead(tmp_path):
    model = tiny_policy(tmp_path / "model", **HEADS_OF_32)
    with server_process(model, "--backend", "vllm", "--longest", "64") as (url, _):
        own = [f"model.name_or_path={model}", "rollout.backend=server", f"rollout.servers={{urls: ['{url}']}}"]
        own += [
            LENGTH_REWARD,
            "rollout.ahead=1",
            "training.max_steps=3",
            "training.learning_rate=1e-3",
            "evaluation.every=2",
        ]
        run = run_tiny("agrpo", tmp_path / "run", *own)
    steps = rows(run / "metrics.jsonl")
    assert [step["agrpo/staleness"] for step in steps] == [0.0, 2.0, 2.0]
    sizes = [step["agrpo/effective_sample_size"] for step in steps]
    assert sizes[0] > 1 - 1e-6 and all(0.9 < size < 1 - 1e-6 for size in sizes[1:])


@needs_vllm
def test_heads_that_it_has_no_attention_for_are_refused_in_words(tmp_path):
    model = tiny_policy(tmp_path / "model")
    (model / "model.safetensors").unlink()  # before the weights are read
    done = launch("agrpo", *tiny("agrpo", tmp_path / "run", f"model.name_or_path={model}", "rollout.backend=vllm"))
    assert done.returncode == 2, done.stderr[-2000:]
    assert "on a CPU has no attention for heads of 8 (it has 32, 64," in done.stderr
    assert "use rollout.backend=native; or train the model with other heads from stage 1 on" in done.stderr
    assert "model.config.num_attention_heads=1 model.config.num_key_value_heads=1 (heads of 32)" in done.stderr


@needs_vllm
def test_preferences_are_sampled_on_it(tmp_path):
    model = tiny_policy(tmp_path / "model", **HEADS_OF_32)
    arguments = [f"run.dir={tmp_path}", "run.name=run", f"model.name_or_path={model}", "rollout.backend=vllm"]
    config = tmp_path / "preferences.yaml"
    config.write_text(
        "data: {source: 'python:agrpo.data.tasks.chains:problems', parameters: {count: 8}}\n"
        "sampling: {num_generations: 4, max_prompt_length: 16, max_completion_length: 16}\n"
        "rewards: [{target: reward_models.rules.length, scale: 16, tokens: 4}]\n"
    )
    done = launch("preferences", "--config", config, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tmp_path / "run" / "preferences" / "train.jsonl")


@pytest.mark.parametrize("section", ["sampling", "evaluation"])
def test_temperatures_that_vllm_does_not_take_are_refused(monkeypatch, section):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if it were installed
    values = {
        "data": {"source": "python:agrpo.data.tasks.chains:problems"},
        "rewards": [{"target": "reward_models.rules.accuracy"}],
        "training": {"max_steps": 1},
        "rollout": {"backend": "vllm"},
    }
    assert PolicyConfig(**values, **{section: {"temperature": 2.0}}).corrects_sampler
    with pytest.raises(ValueError, match=rf"{section}.temperature: vllm samples at 0.01 to 2, got 3.0"):
        PolicyConfig(**values, **{section: {"temperature": 3.0}})


def test_samplers_that_read_whole_weights_refuse_to_go_layer_by_layer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if it were installed
    values = {
        "data": {"source": "python:agrpo.data.tasks.chains:problems"},
        "rewards": [{"target": "reward_models.rules.accuracy"}],
        "training": {"max_steps": 1},
        "engine": {"zero_stage": 3, "sample_from": "layers"},
    }
    assert PolicyConfig(**values)
    for rollout in ({"backend": "vllm"}, {"backend": "server", "servers": {"urls": ["http://127.0.0.1:1"]}}):
        with pytest.raises(ValueError, match=r"layers is native's way, and (vllm|server) reads whole weights"):
            PolicyConfig(**values, rollout=rollout)


@pytest.mark.skipif(HAS_VLLM, reason="vllm is installed")
def test_where_vllm_is_missing_the_configuration_says_how_to_get_it(tmp_path):
    done = launch("agrpo", *tiny("agrpo", tmp_path / "run", "rollout.backend=vllm"))
    assert done.returncode == 2
    assert "rollout: backend: vllm is not installed; install it: bash scripts/setup.sh --vllm" in done.stderr


@needs_vllm
def test_stop_strings_end_completions_as_they_do_in_the_native_sampler():
    it = engine(model("llama-untied"))
    free = it.generate(prompts(), [4] * 3, Sampling(12, temperature=2.0), (0, 0))
    assert all(free.lengths > 5)
    strings = (*(f"t{t}" for t in free.tokens[free.lengths.cumsum(0) - 5][:3].tolist()), "2t4")  # over two tokens
    rollout = it.generate(prompts(), [4] * 3, Sampling(12, temperature=2.0, stop=strings), (0, 0))
    ends = 0
    for ids, finished in zip(rollout.tokens.split(rollout.lengths.tolist()), rollout.finished.tolist(), strict=True):
        watch = StopStrings(it.tokenizer, strings, 1)
        said = [watch.ended([0], [token])[0] for token in ids.tolist()]
        assert not any(said[:-1]) and finished == (said[-1] or ids[-1] == 1)
        ends += said[-1]
    assert ends >= 3

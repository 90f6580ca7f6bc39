"""The formulas against what a real model, cache, optimiser and process hold."""

import math
import subprocess
import sys

import pytest
import torch
from stage_runs import ROOT, environment
from tiny import SIZES, engine_of, ragged
from transformers import LlamaConfig, LlamaForCausalLM

from agrpo.config import LoraConfig, ModelConfig, load_config
from agrpo.doctor import memory, timing
from agrpo.doctor.estimate import (
    architecture,
    before_loading,
    estimate,
    parts,
    seconds_of_a_step,
    setting,
    shape_of,
    totals,
)
from agrpo.doctor.memory import Batch, Shape
from agrpo.doctor.timing import Speeds
from agrpo.engine.backends.caches import FlatCache
from agrpo.engine.fused import fuse_layers
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy
from agrpo.models import make_trainable

SHAPE = Shape(0, 0, 32, 32, 16, 64, 3, 97)


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


@pytest.mark.parametrize("batch", [Batch(1, 1, 60, 60), Batch(3, 4, 20, 30), Batch(2, 8, 50, 5)], ids=str)
def test_activations_are_what_autograd_saves(batch):
    rows = batch.groups * batch.samples
    group = torch.arange(batch.groups).repeat_interleave(batch.samples)
    tokens = torch.zeros(rows * batch.completion, dtype=torch.long)
    prompts = [(3,) * batch.prompt] * batch.groups
    layout = build_layout(prompts, group, torch.full((rows,), batch.completion), tokens)
    assert len(layout.ids) == batch.tokens and len(layout.targets) == batch.completion_tokens
    lm = model()
    fuse_layers(lm)
    policy, saved = Policy(lm), {}
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point() and tensor.dtype == torch.float32:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(layout)
    measured = sum(size for size, _ in saved.values())
    layer = memory.activations(SHAPE, batch, 4, False) - memory.activations(
        Shape(**{**vars(SHAPE), "layers": SHAPE.layers - 1}), batch, 4, False
    )
    told = memory.activations(SHAPE, batch, 4, False) - layer  # without the backward pass's own
    assert told == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("rows", "limit"), [(5, 7), (12, 40)])
def test_the_key_value_cache_is_what_the_native_backend_allocates(rows, limit):
    policy = Policy(model())
    ids = [((3,) * 11, (4,) * 11)[n % 2] for n in range(rows)]
    cache = FlatCache(rows, 11, limit, torch.device("cpu"))
    with torch.no_grad():
        cache.join(policy.lm, ids, torch.arange(rows))
    held = sum(room.numel() * room.element_size() for room in (*cache.keys, *cache.values))
    assert memory.kv_cache(SHAPE, rows, 11, limit, 4) == held


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_optimiser_state_is_what_deepspeed_holds(zero):
    lm = model()
    count = sum(p.numel() for p in lm.parameters())
    engine = engine_of(lm, zero)
    engine.backward(-engine.forward(build_layout(*ragged(1)))[0].mean(), True)
    engine.step(1e-3)
    optimiser = engine._engine.optimizer
    moments = [v for s in optimiser.state.values() for v in s.values() if torch.is_tensor(v) and v.numel() > 1]
    held = sum(value.numel() * value.element_size() for value in moments)
    assert memory.adam(count, zero, 1) == pytest.approx(held, rel=0.01)  # shards are aligned
    own = getattr(optimiser, "fp32_partitioned_groups_flat" if zero == 3 else "single_partition_of_fp32_groups", [])
    assert memory.master(count, zero, 1) == pytest.approx(sum(4 * x.numel() for x in own), rel=0.01)


def test_shards_of_all_ranks_are_the_whole():
    for formula in (memory.master, memory.adam):
        assert 4 * formula(1000, 2, 4) == formula(1000, 2, 1)
    assert memory.adam(1000, 0, 4) == memory.adam(1000, 0, 1)
    assert memory.gradients(1000, 4, 1, 4) == 4 * memory.gradients(1000, 4, 2, 4)


@pytest.mark.parametrize("how", [{}, {"lora": LoraConfig(rank=4)}, {"trainable_layers": 1}], ids=str)
def test_parameters_are_counted_without_weights(how, tmp_path):
    lm = model()
    lm.save_pretrained(tmp_path)
    config = load_config("sft", ROOT / "configs/quickstart/sft.yaml")
    config = config.model_copy(update={"model": ModelConfig(name_or_path=str(tmp_path), **how)})
    shape = shape_of(config, architecture(config))
    real = make_trainable(lm, config.model)
    assert shape.parameters == sum(p.numel() for p in real.parameters())
    assert shape.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert (shape.query, shape.key, shape.layers, shape.vocabulary) == (32, 16, 3, 97)


@pytest.mark.parametrize(("zero", "checkpointing"), [(0, 0), (0, 1), (2, 0), (3, 0)])
def test_the_total_is_within_30_percent_of_a_real_runs_peak(zero, checkpointing):
    command = [sys.executable, str(ROOT / "tests" / "peak_memory.py"), str(zero), str(checkpointing)]
    env = {**environment(), "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back: what is held, not fragments
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    measured, told = map(int, done.stdout.split()[-2:])
    assert told == pytest.approx(measured, rel=0.3)


def policy_config(tmp_path, *overrides):
    model().save_pretrained(tmp_path)
    path = ROOT / "configs/quickstart/agrpo.yaml"
    return load_config("agrpo", path, [f"model.name_or_path={tmp_path}", *overrides])


def machine(free):
    return {"devices": [], "memory": {"free": free, "total": free}}


def told(config, free=2**40):
    return estimate(config, machine(free), lambda *width: Speeds(flops=1e9, bandwidth=1e9, operation=1e-6))


def test_what_does_not_fit_is_said_with_what_helps_most(tmp_path):
    config = policy_config(tmp_path, "training.micro_batch_tokens=100000", "sampling.max_completion_length=2000")
    found = told(config, free=50_000_000)
    assert not found["fits"] and found["total"] > found["free"]
    saved = [one["saves"] for one in found["helps"]]
    assert saved == sorted(saved, reverse=True) and saved[0] > 0
    assert told(config)["fits"]
    first = found["helps"][0]["setting"]
    assert first in ("engine.activation_checkpointing=true", "training.micro_batch_tokens of one group")


def test_an_estimate_follows_the_configuration(tmp_path):
    plain = parts(setting(*with_architecture(policy_config(tmp_path))))
    three = parts(setting(*with_architecture(policy_config(tmp_path, "engine.zero_stage=3"))))
    assert plain["reference"] == plain["weights"] == three["whole copy of ZeRO-3"] > 0
    free = ["objective.kl=none", "controllers.lambda={kind: fixed, value: 0}"]
    assert parts(setting(*with_architecture(policy_config(tmp_path, *free))))["reference"] == 0
    adapted = parts(setting(*with_architecture(policy_config(tmp_path, "model.lora={rank: 4}"))))
    assert adapted["reference"] == 0 and adapted["Adam's moments"] < plain["Adam's moments"] / 2
    longer = parts(setting(*with_architecture(policy_config(tmp_path, "sampling.max_completion_length=128"))))
    assert longer["key-value cache"] == 2 * plain["key-value cache"]  # 16 + 128 places over 16 + 56


def with_architecture(config):
    return config, architecture(config)


def test_an_update_and_the_sampling_are_not_held_at_once(tmp_path):
    s = setting(*with_architecture(policy_config(tmp_path)))
    found = parts(s)
    assert totals(s)[0] < sum(found.values())
    assert totals(s)[0] >= found["weights"] + found["reference"] + found["key-value cache"]


PUBLISHED = {  # parameters, as the models' pages count them
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_the_published_number_of_parameters(name):
    path = ROOT / "configs/qwen2.5-1.5b-gsm8k/agrpo.yaml"
    config = load_config("agrpo", path, [f"model.name_or_path={name}"])
    assert shape_of(config, architecture(config)).parameters == PUBLISHED[name]


def test_a_stage_that_cannot_fit_says_so(tmp_path, monkeypatch):
    config = policy_config(tmp_path)
    assert before_loading(config) == []
    monkeypatch.setattr("agrpo.doctor.estimate.capacity", lambda: machine(1 << 20))
    (said,) = before_loading(config)
    assert "may not fit" in said and "0.0 GiB are free" in said and "activation_checkpointing" in said
    gpu = {"name": "small", "total": 1 << 20, "free": 1 << 20}
    monkeypatch.setattr("agrpo.doctor.estimate.capacity", lambda: {**machine(2**40), "devices": [gpu]})
    assert len(before_loading(config)) == 1
    nowhere = config.model_copy(update={"model": ModelConfig(name_or_path=str(tmp_path / "gone"))})
    assert before_loading(nowhere) == []  # loading it says what is wrong


def test_time_follows_the_work():
    """Closed forms that any estimate must keep: twice the work or half the speed takes twice as long."""
    shape = Shape(10_000_000, 10_000_000, 256, 256, 128, 1024, 4, 1000)
    fast = Speeds(flops=1e10, bandwidth=1e9, operation=0.0)
    slow = Speeds(flops=5e9, bandwidth=5e8, operation=0.0)
    batch = Batch(2, 4, 20, 30)
    kept = memory.activations(shape, batch, 4, False)
    one = timing.update_seconds(shape, batch, kept, False, fast)
    assert timing.update_seconds(shape, batch, kept, False, slow) == pytest.approx(2 * one)
    more = Batch(4, 4, 20, 30)
    assert timing.update_seconds(shape, more, memory.activations(shape, more, 4, False), False, fast) == pytest.approx(
        2 * one
    )
    assert timing.update_seconds(shape, batch, kept, True, fast) > one
    products = Speeds(flops=1e10, bandwidth=math.inf, operation=0.0)
    forward = timing.forward_seconds(shape, batch, kept, products)
    weights = 2 * (10_000_000 - 256_000) * batch.tokens + 2 * 256_000 * batch.completion_tokens
    assert forward > weights / 1e10 and forward == pytest.approx(weights / 1e10, rel=0.1)  # the rest is attention
    reading = Speeds(flops=math.inf, bandwidth=1e9, operation=0.0)
    token = timing.sampling_seconds(shape, 1, 1, 10, 50, 4, reading) / 50
    assert token == pytest.approx(4 * 10_000_000 / 1e9, rel=0.02)  # one row reads all weights for each token


def test_a_run_is_its_steps(tmp_path):
    config = policy_config(tmp_path, "training.max_steps=7")
    found = told(config)
    assert set(found["seconds"]) == {"sampling", "update"}
    for end in (0, 1):
        assert found["run_seconds"][end] == pytest.approx(7 * sum(both[end] for both in found["seconds"].values()))


def test_the_times_told_are_the_formulas_between_what_real_steps_took_at_least_and_at_most(tmp_path):
    config = policy_config(tmp_path)
    speeds = Speeds(flops=1e9, bandwidth=1e9, operation=1e-6)
    formulas = seconds_of_a_step(setting(*with_architecture(config)), config, speeds)
    for name, (low, high) in told(config)["seconds"].items():
        assert 0 < low < high
        assert (low / formulas[name], high / formulas[name]) == pytest.approx(timing.SLACK[name])

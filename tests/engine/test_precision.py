"""Where state lives and how numbers are kept: NVMe, float16, 4-bit weights under LoRA, one copy of the base."""

import gc
import importlib.util
import subprocess
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from stage_runs import ROOT, command, environment, tiny, tiny_policy
from tiny import FAMILIES, engine_of, ragged
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from agrpo.config import EngineConfig, LoraConfig, ModelConfig, load_config
from agrpo.engine import zero
from agrpo.engine.backends.native import Sampling
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy
from agrpo.models import ModelError, make_trainable, merged_weights, quantise, save_language_model
from agrpo.types import InputError, Prompt
from agrpo.yaml_input import ConfigError

HAS_ASYNC_IO = AsyncIOBuilder().is_compatible(verbose=False)
# Built at first use, which takes minutes: deepspeed.ops.op_builder.AsyncIOBuilder().load()
IS_BUILT = zero.about_offload(EngineConfig(offload="nvme", zero_stage=3, offload_path="x")) == []
HAS_FLOAT16 = get_accelerator().is_fp16_supported()
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
LORA = ModelConfig(name_or_path="x", lora=LoraConfig(rank=4, alpha=8.0))


def model(family="llama-untied"):
    torch.manual_seed(0)
    return FAMILIES[family]()


def train(engine, steps=3, rate=1e-2):
    losses = []
    for _ in range(steps):
        loss = -engine.forward(build_layout(*ragged(1)))[0].mean()
        engine.backward(loss, True)
        engine.step(rate)
        losses.append(loss.item())
    return losses


def weights(engine):
    engine.generation_mode()
    return {name: p.detach().clone() for name, p in engine.whole_module.named_parameters()}


def large():
    """DeepSpeed keeps what is smaller than a MiB in memory."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=256))


@pytest.mark.skipif(not (HAS_ASYNC_IO and IS_BUILT), reason="DeepSpeed's asynchronous I/O has not been built here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_on_nvme_trains_as_state_in_memory(tmp_path, dtype):
    engine = engine_of(large(), 3, dtype, offload="nvme", offload_path=tmp_path)
    straight = engine_of(large(), 3, dtype)
    assert train(engine, rate=1e-3) == pytest.approx(train(straight, rate=1e-3), rel=1e-6)
    expected = weights(straight)
    rounding = 0.0 if dtype == "float32" else 2**-7  # masters that differ by 1e-7 may round to neighbours
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=rounding)
    held = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    count = sum(p.numel() for p in large().parameters())
    assert held >= 12 * 0.99 * count  # the master weights and Adam's two moments, those of the norms' weights excepted
    with pytest.raises(
        InputError, match=r"engine\.offload: nvme cannot resume: start over with checkpoint.resume=false"
    ):
        engine.load_state(str(tmp_path), "engine")


def test_checkpoints_of_state_on_nvme_are_refused(tmp_path):
    values = ["engine.zero_stage=3", "engine.offload=nvme", f"engine.offload_path={tmp_path}"]
    config = ROOT / "configs" / "quickstart" / "sft.yaml"
    assert load_config("sft", config, [*values, "checkpoint.every=0"])
    with pytest.raises(ConfigError, match=r"checkpoint\.every: DeepSpeed does not bring back all"):
        load_config("sft", config, [*values, "checkpoint.every=5"])


def test_nvme_without_asynchronous_io_is_refused_before_the_weights_are_read(tmp_path):
    folder = tiny_policy(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    own = ["engine.zero_stage=3", "engine.offload=nvme", f"engine.offload_path={tmp_path}"]
    done = subprocess.run(
        command("agrpo", *tiny("agrpo", tmp_path / "run", f"model.name_or_path={folder}", *own)),
        env={**environment(), "CC": "/bin/false"},  # DeepSpeed looks for libaio with a program that it compiles
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "engine.offload: nvme needs libaio and a C++ compiler, which DeepSpeed does not find" in done.stderr


def test_the_first_use_of_nvme_says_that_it_compiles_and_what_a_killed_build_has_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    nvme = EngineConfig(offload="nvme", zero_stage=3, offload_path=tmp_path)
    (said,) = zero.about_offload(nvme)
    assert said.endswith("which takes minutes") and zero.about_offload(EngineConfig()) == []
    built, beside = tmp_path / "py311_cpu" / "async_io", tmp_path / "py311_cpu" / "pin_memory"
    for folder in (built, beside):
        folder.mkdir(parents=True)
    for name in ("/opt/other/site-packages/deepspeed", str(Path(deepspeed.__file__).parent)):
        assert zero.about_offload(nvme) == [said]
        (built / "async_io.so").touch()
        (built / "build.ninja").write_text(f"cflags = -I{name}/ops/csrc/aio/py_lib")
    assert zero.about_offload(nvme) == []
    (beside / "lock").touch()
    (waits,) = zero.about_offload(nvme)
    assert f"as {beside / 'lock'} says: if none is left, remove that file" in waits


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"offload": "cpu"}, "offload: cpu needs engine.zero_stage 1, 2 or 3"),
        ({"offload": "nvme", "zero_stage": 2, "offload_path": "x"}, "set engine.zero_stage to 3"),
        ({"offload": "nvme", "zero_stage": 3}, "give both or neither"),
        ({"offload": "cpu", "zero_stage": 3, "offload_path": "x"}, "give both or neither"),
        ({"sample_from": "layers", "zero_stage": 2}, "set engine.zero_stage to 3"),
    ],
)
def test_a_place_that_cannot_be_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(**values)


@pytest.mark.skipif(not HAS_FLOAT16, reason="DeepSpeed does not compute in float16 here")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_float16_follows_float32_and_lowers_its_loss_scale_where_a_step_overflows(zero_stage):
    engine, exact = engine_of(model(), zero_stage, "float16", max_skipped_steps=0), engine_of(model(), zero_stage)
    layout = build_layout(*ragged(1))
    while engine.weight_version == 0:  # the first scale is too large
        before = engine._engine.optimizer.loss_scale
        engine.backward(-engine.forward(layout)[0].mean(), True)
        engine.step(1e-2)
        assert engine.weight_version == 1 or engine._engine.optimizer.loss_scale < before
    train(exact, 1)
    assert train(engine, 3) == pytest.approx(train(exact, 3), abs=0.02)


@pytest.mark.skipif(HAS_FLOAT16, reason="DeepSpeed computes in float16 here")
def test_float16_is_refused_where_deepspeed_does_not_compute_with_it():
    with pytest.raises(InputError, match=r"model\.dtype: float16: DeepSpeed does not compute with it on this cpu"):
        engine_of(model(), 1, "float16")


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_reduction_bucket_is_no_larger_than_the_gradients(zero_stage):
    engine = engine_of(model(), zero_stage)
    count = sum(p.numel() for p in model().parameters())
    config = engine._engine._config.zero_config
    assert config.reduce_bucket_size == config.allgather_bucket_size == count < zero.BUCKET


@pytest.mark.skipif(get_accelerator().device_name() != "cpu", reason="on a GPU they are moved into one buffer")
def test_zero_1_on_a_cpu_leaves_gradients_where_they_are_made():
    engine = engine_of(model(), 1, "bfloat16")
    engine.backward(engine.forward(build_layout(*ragged(1)))[0].mean(), True)
    gradients = [gradient for group in engine._engine.optimizer.averaged_gradients.values() for gradient in group]
    assert len(gradients) == len(list(engine.module.parameters()))
    assert all(gradient.untyped_storage().nbytes() == gradient.nbytes for gradient in gradients)
    engine.step(1e-2)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_an_optimiser_that_steps_group_by_group_steps_as_one(zero_stage, monkeypatch):
    whole = engine_of(model(), zero_stage)
    losses = train(whole)
    monkeypatch.setattr(zero, "_GROUP", 1)
    cut = engine_of(model(), zero_stage)
    assert len(cut._engine.optimizer.param_groups) > 7 * 2 > len(whole._engine.optimizer.param_groups) == 2
    assert train(cut) == pytest.approx(losses, rel=1e-6)  # the norm's parts are added up in another order
    expected = weights(whole)
    for name, value in weights(cut).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_of_parts_is_that_of_the_whole(zero_stage, dtype, monkeypatch):
    monkeypatch.setattr(zero, "_NORM_PART", 7)
    taken = []
    for norm in (zero._norm_by_parts, lambda optimizer: None):
        monkeypatch.setattr(zero, "_norm_by_parts", norm)
        engine = engine_of(model(), zero_stage, dtype)
        engine.backward(-engine.forward(build_layout(*ragged(1)))[0].mean(), True)
        taken.append(engine.step(1e-2))
    assert taken[0] == pytest.approx(taken[1], rel=1e-6)


def held(at_least):
    """Bytes of all large tensors alive, each storage once."""
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.numel() >= at_least]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())


def test_with_lora_the_reference_and_a_second_engine_without_one_hold_the_same_memory():
    large = 1024  # elements: the base's matrices, none of the adapters'

    def with_engine(**how):
        before = held(large)  # DeepSpeed keeps its engines: those made before count here
        engine = engine_of(make_trainable(model(), LORA) if how.pop("lora", True) else model(), **how)
        engine.evaluate(build_layout(*ragged(1)))
        if engine.has_reference:
            engine.reference_logprobs(build_layout(*ragged(1)))
        return held(large) - before

    matrices = sum(p.nbytes for p in model().parameters() if p.numel() >= large)
    with_engine(zero_stage=0)  # an engine of another test may go only when the next one is made
    without, shared = with_engine(zero_stage=0), with_engine(zero_stage=0, with_reference=True)
    assert shared == without
    assert with_engine(zero_stage=0, with_reference=True, lora=False) >= without + matrices  # the measure sees a copy


# 4-bit weights

needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
QLORA = ModelConfig(name_or_path="x", lora=LoraConfig(rank=4, alpha=8.0), quantization="nf4")


def wide():
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=256))


def quantised():
    lm = wide()
    quantise(lm, torch.float32)
    return lm


def dequantised():
    """A plain model with the values that 4 bits have left."""
    plain = wide()
    plain.load_state_dict(dict(merged_weights(quantised())))
    return plain


@needs_bitsandbytes
def test_four_bits_hold_an_eighth_of_the_matrices_and_stay_near_them():
    lm, whole = quantised(), wide()
    packed = [p for name, p in lm.named_parameters() if "_proj" in name]
    exact = {name: p for name, p in whole.named_parameters() if "_proj" in name}
    assert len(packed) == len(exact) and sum(p.nbytes for p in packed) * 8 == sum(p.nbytes for p in exact.values())
    plain = dict(dequantised().named_parameters())
    for name, weight in exact.items():
        error = (plain[name] - weight).norm() / weight.norm()
        assert 0.01 < error < 0.15, name
    assert torch.equal(plain["lm_head.weight"], whole.lm_head.weight)


@needs_bitsandbytes
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_lora_on_four_bits_trains_as_lora_on_the_values_that_they_hold(zero_stage):
    engine = engine_of(make_trainable(quantised(), QLORA), zero_stage, with_reference=True)
    plain = engine_of(make_trainable(dequantised(), LORA), zero_stage, with_reference=True)
    assert engine.reference is None
    layout = build_layout(*ragged(1))
    reference = Policy(dequantised()).eval()(layout)[0].detach()
    assert train(engine) == pytest.approx(train(plain), abs=1e-4)
    torch.testing.assert_close(engine.reference_logprobs(layout), reference, atol=1e-3, rtol=0)
    prompts = [Prompt(text="", ids=tuple(ids), slot=slot, columns={}) for slot, ids in enumerate(ragged(9)[0])]
    rollout = engine.generate(prompts, [2] * 3, Sampling(8), (0, 0))
    layout = build_layout([p.ids for p in prompts], rollout.group, rollout.lengths, rollout.tokens)
    torch.testing.assert_close(engine.evaluate(layout)[0], rollout.logp, atol=1e-4, rtol=0)


@needs_bitsandbytes
def test_rows_that_bitsandbytes_garbles_are_refused():
    with pytest.raises(ModelError, match="q_proj has 32 inputs, not a multiple of 64"):
        quantise(model(), torch.float32)


@needs_bitsandbytes
def test_a_model_tuned_on_four_bits_is_saved_whole_for_plain_transformers(tmp_path):
    from tiny import tokenizer

    engine = engine_of(make_trainable(quantised(), QLORA), 0)
    train(engine)
    save_language_model(engine.whole_policy.lm, tokenizer(), tmp_path)
    layout = build_layout(*ragged(1))
    with torch.no_grad():
        loaded = Policy(AutoModelForCausalLM.from_pretrained(tmp_path)).eval()(layout)[0]
    torch.testing.assert_close(loaded, engine.evaluate(layout)[0], atol=1e-4, rtol=0)


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_where_bitsandbytes_does_not_load_four_bits_are_refused_in_words():
    with pytest.raises(ModelError, match=r"bitsandbytes, which does not load here.*pip install 'agrpo\[qlora\]'"):
        quantise(model(), torch.float32)


def test_four_bits_need_lora():
    with pytest.raises(ValueError, match="4-bit weights cannot learn: set lora"):
        ModelConfig(name_or_path="x", quantization="nf4")

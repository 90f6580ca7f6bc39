"""One engine over ZeRO 0 to 3: it trains as plain torch does, and generates with the weights it has just trained."""

import math

import deepspeed
import peft
import psutil
import pytest
import torch
from tiny import FAMILIES, engine_of, ragged

from agrpo.config import LoraConfig, ModelConfig
from agrpo.engine import distributed, memory
from agrpo.engine.backends.native import Sampling
from agrpo.engine.hybrid import TrainingDiverged
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy
from agrpo.models import make_trainable
from agrpo.types import Prompt

STAGES = [0, 1, 2, 3]
PROMPTS = [Prompt(text="", ids=tuple(ids), slot=slot, columns={}) for slot, ids in enumerate(ragged(9)[0])]
GREEDY = Sampling(12, greedy=True)


def model(family="llama-untied", sharp=True):
    torch.manual_seed(0)
    lm = FAMILIES[family]()
    if sharp:
        torch.nn.init.normal_(lm.get_output_embeddings().weight, std=0.3)  # greedy has no near ties
    return lm


def layouts():
    return [build_layout(*ragged(seed)) for seed in (1, 2)]


def train(engine, steps, rate, factors=(1.0,)):
    """Steps of two micro-batches each; the loss of every step, and the norms."""
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for layout, last in zip(layouts(), (False, True), strict=True):
            loss = -engine.forward(layout)[0].mean() / 2 * factors[step % len(factors)]
            engine.backward(loss, last)
            total += loss.item()
        losses.append(total)
        norms.append(engine.step(rate))
    return losses, norms


def train_plainly(lm, steps, rate, factors=(1.0,), clipping=1.0, weight_decay=0.0):
    """The same by torch and unmodified transformers."""
    decays = [p for p in lm.parameters() if p.ndim >= 2]
    rest = [p for p in lm.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], rate, (0.9, 0.95)
    )
    losses, norms = [], []
    for step in range(steps):
        loss = torch.zeros(())
        for seed in (1, 2):
            prompts, group, lengths, tokens = ragged(seed)
            logps = []
            for p, completion in zip(group.tolist(), tokens.split(lengths.tolist()), strict=True):
                ids = torch.cat([torch.tensor(prompts[p]), completion])
                logp = lm(input_ids=ids[None]).logits[0, len(prompts[p]) - 1 : -1].log_softmax(-1)
                logps.append(logp.gather(1, completion[:, None])[:, 0])
            loss = loss - torch.cat(logps).mean() / 2 * factors[step % len(factors)]
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(lm.parameters(), clipping)))
        optimiser.step()
        optimiser.zero_grad()
    return losses, norms


def weights(engine):
    """What is trained, gathered from wherever ZeRO keeps it."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            found[name.removeprefix("lm.")] = parameter.detach().clone()
    return found


VARIANTS = [*({"zero_stage": stage} for stage in STAGES), {"zero_stage": 2, "offload": "cpu"}]
VARIANTS += [{"zero_stage": stage, "checkpointing": True} for stage in (0, 3)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_training_equals_plain_torch(variant):
    factors = (1.0, 50.0, 1.0)  # the second gradient is clipped far more than the others
    how = {"gradient_clipping": 0.5, "weight_decay": 0.1}
    plain = model()
    expected = train_plainly(plain, 3, 1e-3, factors, clipping=0.5, weight_decay=0.1)
    engine = engine_of(model(), **variant, **how)
    losses, norms = train(engine, 3, 1e-3, factors)
    assert losses == pytest.approx(expected[0], rel=1e-5)
    assert norms == pytest.approx(expected[1], rel=1e-4)
    for name, value in weights(engine).items():
        assert (value - plain.get_parameter(name)).abs().max() < 2e-5, name
    assert engine.weight_version == 3


@pytest.mark.parametrize("zero_stage", STAGES)
def test_generation_follows_the_weights(zero_stage):
    engine = engine_of(model(), zero_stage)
    before = engine.generate(PROMPTS, [1] * 3, GREEDY, (0, 0))
    assert before.weight_version == 0
    train(engine, 1, 0.03)
    after = engine.generate(PROMPTS, [1] * 3, GREEDY, (0, 0))
    assert after.weight_version == 1
    assert after.tokens.tolist() != before.tokens.tolist()

    plain = model()
    plain.load_state_dict(weights(engine))
    for prompt, tokens in zip(PROMPTS, after.tokens.split(after.lengths.tolist()), strict=True):
        ids = torch.tensor([prompt.ids])
        options = {"attention_mask": torch.ones_like(ids), "eos_token_id": 1, "pad_token_id": 0}
        expected = plain.generate(ids, max_new_tokens=12, do_sample=False, **options)
        assert tokens.tolist() == expected[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("fits", [True, False])
def test_zero_3_samples_from_a_whole_copy_only_where_there_is_room_for_one(monkeypatch, fits):
    needed = sum(p.numel() for p in model().parameters()) * 4
    monkeypatch.setattr(distributed, "free_memory", lambda: 2 * needed - (not fits))
    engine = engine_of(model(), 3, persistence=0, sample_from="auto")
    copies = {parameter.numel() > 0 for parameter in engine.whole_module.parameters()}
    assert copies == {fits} and engine._backend.in_step is not fits
    by_name = engine_of(model(), 3, persistence=0, sample_from="whole" if fits else "layers")
    for step in range(2):
        rollouts = [one.generate(PROMPTS, [2] * 3, Sampling(12), (0, step)) for one in (engine, by_name)]
        assert torch.equal(rollouts[0].tokens, rollouts[1].tokens) and torch.equal(rollouts[0].logp, rollouts[1].logp)
        held = {p.ds_status.name for p in engine.module.parameters()}
        assert held == {"NOT_AVAILABLE"} and {p.numel() > 0 for p in engine.whole_module.parameters()} == copies
        train(engine, 1, 0.03), train(by_name, 1, 0.03)
    engine.gather()  # to be saved, it is made whole all the same
    assert all(parameter.numel() > 0 for parameter in engine.whole_module.parameters())


def test_free_memory_counts_what_the_system_would_give_up_for_it():
    if memory.read_text("/sys/fs/cgroup/memory.max").strip().isdigit():
        pytest.skip("this container has a limit of its own")
    assert distributed.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_generating_changes_no_parameter_and_no_training(zero_stage):
    engine, straight = engine_of(model(), zero_stage), engine_of(model(), zero_stage)
    train(engine, 1, 1e-3)
    train(straight, 1, 1e-3)
    before = weights(engine)
    engine.generate(PROMPTS, [3] * 3, Sampling(12), (0, 0))
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    if zero_stage == 3:
        status = {p.ds_status.name for p in engine.module.parameters()}
        assert status == {"NOT_AVAILABLE"}  # still in shards
    assert train(engine, 2, 1e-3) == train(straight, 2, 1e-3)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_accumulates_small_steps_in_float32_and_keeps_the_rotary_frequencies(zero_stage):
    lm = model("qwen2-tied", sharp=False)
    frequencies = {name: value.clone() for name, value in lm.named_buffers()}
    engine = engine_of(lm, zero_stage, "bfloat16", with_reference=True)
    rate, steps = 3e-4, 20  # of weights at 1, where bfloat16 has steps of 0.004: without a float32 master none moves
    train(engine, steps, rate)
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    moved = (weights(engine)["model.norm.weight"].float() - 1).abs().max()
    assert 0.5 * rate * steps < moved < 2 * rate * steps
    for module in (engine.module, engine.whole_module, engine.reference):
        buffers = {name.removeprefix("lm."): value for name, value in module.named_buffers()}
        assert buffers.keys() == frequencies.keys()
        for name, value in buffers.items():
            assert value.dtype == torch.float32 and torch.equal(value, frequencies[name]), name


FAULTS = [{"zero_stage": stage} for stage in STAGES] + [{"zero_stage": s, "dtype": "bfloat16"} for s in (1, 2, 3)]
FAULTS += [{"zero_stage": stage, "offload": "cpu"} for stage in (1, 2, 3)] + [{"zero_stage": 2, "gradient_clipping": 0}]


@pytest.mark.parametrize("variant", FAULTS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_weights_and_optimiser_and_training_goes_on(variant, bad):
    engine, straight = engine_of(model(), **variant), engine_of(model(), **variant)
    train(engine, 2, 1e-3)
    train(straight, 2, 1e-3)
    before = weights(engine)
    _, norms = train(engine, 2, 1e-2, factors=(bad,))
    assert not any(map(math.isfinite, norms))
    assert (engine.weight_version, engine.skipped_steps, engine.skipped_in_a_row) == (2, 2, 2)
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    assert train(engine, 2, 1e-3) == train(straight, 2, 1e-3)  # as if the bad batches had not been: Adam's moments too
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(engine).items())
    assert (engine.weight_version, engine.skipped_steps, engine.skipped_in_a_row) == (4, 2, 0)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_an_infinite_loss_is_skipped_though_its_gradient_is_finite(zero_stage):
    engine = engine_of(model(), zero_stage)
    before = weights(engine)
    engine.backward(-engine.forward(layouts()[0])[0].mean() + math.inf, True)
    assert not math.isfinite(engine.step(1e-3)) and not engine.losses_finite
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    train(engine, 1, 1e-3)
    assert engine.losses_finite and engine.weight_version == 1


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped(zero_stage):
    engine = engine_of(model(), zero_stage)
    before = weights(engine)
    logp = engine.forward(layouts()[0])[0].mean()
    engine.backward(-logp + (logp - logp.detach()).abs().sqrt(), True)  # the square root's slope at 0 is infinite
    assert engine.losses_finite and not math.isfinite(engine.step(1e-3))
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_too_many_skipped_steps_in_a_row_end_the_run(zero_stage):
    engine = engine_of(model(), zero_stage, max_skipped_steps=2)
    train(engine, 3, 1e-3, factors=(math.nan, math.nan, 1.0))
    before = weights(engine)
    with pytest.raises(TrainingDiverged, match=r"weight version 1, and 3 steps in a row.*lower training.learning_rate"):
        train(engine, 3, 1e-3, factors=(math.nan,))
    assert (engine.weight_version, engine.skipped_steps) == (1, 5)
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())


@pytest.mark.parametrize("zero_stage", STAGES)
def test_the_reference_stays_what_it_was(zero_stage):
    engine = engine_of(model(), zero_stage, with_reference=True)
    (layout, _) = layouts()
    with torch.no_grad():
        expected = Policy(model()).eval()(layout, 0.7)[0]
    train(engine, 2, 1e-2)
    torch.testing.assert_close(engine.reference_logprobs(layout, 0.7), expected, atol=1e-5, rtol=0)
    assert (engine.evaluate(layout, 0.7)[0] - expected).abs().mean() > 0.1
    with pytest.raises(RuntimeError, match="without a reference"):
        engine_of(model(), 0).reference_logprobs(layout)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_with_lora_the_reference_is_the_base_model_without_a_copy(zero_stage):
    lora = ModelConfig(name_or_path="x", lora=LoraConfig(rank=4, alpha=8.0))
    lm = make_trainable(model(), lora)
    assert isinstance(lm, peft.PeftModel)
    engine = engine_of(lm, zero_stage, with_reference=True)
    assert engine.has_reference and engine.reference is None
    before = weights(engine)
    (layout, _) = layouts()
    with torch.no_grad():
        base = Policy(model()).eval()(layout)[0]
    torch.testing.assert_close(engine.evaluate(layout)[0], base, atol=1e-5, rtol=0)  # adapters begin at zero
    train(engine, 3, 1e-2)
    torch.testing.assert_close(engine.reference_logprobs(layout), base, atol=1e-5, rtol=0)
    assert (engine.evaluate(layout)[0] - base).abs().mean() > 0.01  # and the adapters are on again
    changed = {name for name, value in weights(engine).items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)

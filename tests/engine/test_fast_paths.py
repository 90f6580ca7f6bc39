"""Every fast path beside the plain one: short attention, the sliced head, fused layers, the decoder."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stage_runs import environment
from tiny import FAMILIES, engine_of, follows, ragged, tokenizer

from agrpo.engine import logprobs, short_attention
from agrpo.engine.backends import sampling
from agrpo.engine.backends.decoder import FusedDecoder, can_fuse
from agrpo.engine.backends.native import NativeBackend, Sampling
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy
from agrpo.types import Prompt

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mask", ["causal", "shared", "own"])
@pytest.mark.parametrize("slab", [1, 400, 10**9])
def test_short_attention_equals_pytorchs(mask, slab, monkeypatch):
    monkeypatch.setattr(short_attention, "_SLAB_SCORES", slab)
    generator = torch.Generator().manual_seed(0)
    keys = 6 if mask == "causal" else 11
    q, k, v = (
        torch.randn(5, *shape, 8, generator=generator, requires_grad=True) for shape in ((6, 4), (keys, 2), (keys, 2))
    )
    seen = None
    if mask != "causal":
        seen = torch.rand(1 if mask == "shared" else 5, 1, 6, keys, generator=generator) > 0.4
        seen[..., 0] = True
    got = short_attention.short_attention(q, k, v, seen, 0.3)
    turned = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(
        *turned, attn_mask=seen, is_causal=seen is None, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    of = torch.randn(got.shape, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), of), torch.autograd.grad(expected, (q, k, v), of), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("tokens_at_once", [16, 4096])
@pytest.mark.parametrize("of", ["logp", "entropy", "both"])
def test_the_sliced_head_equals_a_softmax(tokens_at_once, of, monkeypatch):
    monkeypatch.setattr(logprobs, "_TOKENS", tokens_at_once)
    monkeypatch.setitem(logprobs._SLICE_LOGITS, "cpu", 1)  # slices of 64
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (50, 301))
    y = torch.randint(0, 301, (50,), generator=generator)
    u, v = torch.randn(2, 50, generator=generator)
    got = logprobs.chunked_logprobs(h, w, y, 0.7)
    log_p = (h @ w.t() / 0.7).log_softmax(1)
    expected = log_p.gather(1, y[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    loss = {"logp": lambda a: (u * a[0]).sum(), "entropy": lambda a: (v * a[1]).sum()}
    loss["both"] = lambda a: loss["logp"](a) + loss["entropy"](a)
    torch.testing.assert_close(
        torch.autograd.grad(loss[of](got), (h, w)),
        torch.autograd.grad(loss[of](expected), (h, w)),
        atol=5e-5,
        rtol=1e-4,
    )


def test_the_head_never_holds_tokens_times_vocabulary():
    """Its peak, forward and backward, is far below one float32 (C, V): 512 MiB here."""
    program = (
        "import resource, torch; torch.set_num_threads(1)\n"
        "from agrpo.engine.logprobs import chunked_logprobs\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "h, w = (torch.randn(n, 16, requires_grad=True) for n in (4096, 32768)); y = torch.zeros(4096, dtype=int)\n"
        "chunked_logprobs(h[:8], w, y[:8])[0].sum().backward(); before = peak()\n"
        "logp, entropy = chunked_logprobs(h, w, y); (logp + entropy).sum().backward(); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 2**26


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_decoder_equals_the_model(family):
    torch.manual_seed(0)
    lm = FAMILIES[family]().eval()
    policy = Policy(lm)
    assert can_fuse(lm)
    prompts = [Prompt("", tuple(ids), slot, {}) for slot, ids in enumerate(([5, 2, 7], [9], [3, 3, 3, 3, 8]))]
    made = [
        NativeBackend(
            policy.lm, flat=True, tokenizer=tokenizer(), stop=[1, 2, 3], max_sequences=6, fused=fused
        ).generate(prompts, [4, 3, 2], Sampling(24, temperature=0.8), (7, 3))
        for fused in (False, True)
    ]
    assert made[0].lengths.tolist() == made[1].lengths.tolist()
    assert made[0].tokens.tolist() == made[1].tokens.tolist()
    assert (made[0].logp - made[1].logp).abs().max() < 1e-5
    layout = build_layout([p.ids for p in prompts], made[1].group, made[1].lengths, made[1].tokens)
    with torch.no_grad():
        assert (policy(layout, 0.8)[0] - made[1].logp).abs().max() < 1e-5


def test_packed_bfloat16_decoding_is_as_near_to_float32_as_the_model():
    torch.manual_seed(0)
    exact = FAMILIES["llama-tied"]().eval()
    half = copy.deepcopy(exact).to(torch.bfloat16)
    half.model.rotary_emb = copy.deepcopy(exact.model.rotary_emb)
    prompts = [Prompt("", (5, 2, 7), 0, {})]
    distances = []
    for fused in (False, True):
        backend = NativeBackend(
            Policy(half).lm, flat=True, tokenizer=tokenizer(), stop=[], max_sequences=8, fused=fused
        )
        rollout = backend.generate(prompts, [8], Sampling(24), (0, 0))
        layout = build_layout([(5, 2, 7)], rollout.group, rollout.lengths, rollout.tokens)
        with torch.no_grad():
            distances.append(float((Policy(copy.deepcopy(exact))(layout)[0] - rollout.logp).abs().mean()))
    assert 0 < distances[1] < max(2 * distances[0], 5e-3)


def test_models_with_adapters_are_not_fused():
    from peft import LoraConfig, get_peft_model

    lm = get_peft_model(FAMILIES["llama-tied"](), LoraConfig(r=2, target_modules=["q_proj"]))
    assert not can_fuse(lm.get_base_model())


def test_weights_that_were_updated_are_the_ones_that_decode():
    torch.manual_seed(0)
    lm = FAMILIES["llama-untied"]().eval()
    engine = engine_of(lm)
    prompts = [Prompt("", (5, 2, 7), 0, {})]
    layout = build_layout(*ragged(1))
    for step in range(3):
        rollout = engine.generate(prompts, [4], Sampling(12), (0, step))
        own = build_layout([(5, 2, 7)], rollout.group, rollout.lengths, rollout.tokens)
        assert (engine.evaluate(own)[0] - rollout.logp).abs().max() < 1e-5
        engine.backward(-engine.forward(layout)[0].mean(), True)
        engine.step(1e-2)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_an_engine_with_its_fast_paths_off_learns_the_same(zero):
    """Three optimiser steps: losses within 1e-5, and gradient norms within 1e-4 of each other."""
    told = []
    for fast in (False, True):
        torch.manual_seed(0)
        engine = engine_of(FAMILIES["qwen2-tied"](), zero, with_reference=True, fast=fast)
        layout, numbers = build_layout(*ragged(1)), []
        for _ in range(3):
            logp, entropy = engine.forward(layout)
            loss = -(logp.mean() + 0.1 * entropy.mean())
            engine.backward(loss, True)
            numbers.append((float(loss.detach()), engine.step(1e-2)))
        numbers.append(float(engine.reference_logprobs(layout).mean()))
        told.append(numbers)
    for (loss, norm), (expected, other) in zip(told[0][:3], told[1][:3], strict=True):
        assert abs(loss - expected) < 1e-5
        assert abs(norm - other) < 1e-4 * max(1.0, other)
    assert abs(told[0][3] - told[1][3]) < 1e-5


def test_a_draw_by_blocks_is_the_draw_from_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 700, generator=generator) * 3
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    token, logp = sampling.draw(logits, uniform, 0.8)
    monkeypatch.setattr(sampling, "_BLOCK", 10**6)
    plain, plain_logp = sampling.draw(logits, uniform, 0.8)
    same = token == plain
    assert same.float().mean() > 0.99  # rounding may choose the neighbour
    assert (token - plain).abs().max() <= 1
    torch.testing.assert_close(logp[same], plain_logp[same], atol=1e-5, rtol=1e-5)


def test_draws_by_blocks_follow_the_distribution_and_its_ends():
    generator = torch.Generator().manual_seed(1)
    logits = torch.full((600,), -torch.inf)
    logits[[0, 255, 256, 511, 599]] = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.2])
    uniform = torch.rand(20_000, generator=generator, dtype=torch.float64)
    token, _ = sampling.draw(logits.expand(20_000, -1), uniform)
    assert follows(token, logits.softmax(0))
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert sampling.draw(logits.expand(2, -1), ends)[0].tolist() == [0, 599]


def test_the_decoder_reads_joined_copies():
    lm = FAMILIES["qwen3-tied"]().eval()
    decoder = FusedDecoder(lm, 4)
    with torch.no_grad():
        lm.model.layers[0].self_attn.q_proj.weight.zero_()
    assert decoder.layers[0].qkv(torch.ones(1, 32)).abs().sum() > 0

"""One rank's part of the conformance on several ranks: torchrun … conformance_job.py BACKEND.

Each rank has prompts of its own, of other lengths and numbers, so that the ranks' completions end at different times.
"""

import sys

import torch
from tiny import FAMILIES, HEADS_OF_32, engine_of, ragged

from agrpo.config import LoraConfig, ModelConfig, RolloutConfig
from agrpo.engine import distributed, zero
from agrpo.engine.backends.native import Sampling
from agrpo.engine.layout import build_layout
from agrpo.models import make_trainable, merged_weights
from agrpo.types import Prompt

SHARDS = {"zero_stage": 3, "persistence": 0}
VARIANTS = {
    "native": [
        ("llama-tied", {"zero_stage": 2}, False),
        ("qwen3-untied", {**SHARDS, "sample_from": "whole"}, False),
        ("llama-tied", {**SHARDS, "sample_from": "layers"}, False),
        ("llama-untied", {**SHARDS, "sample_from": "layers"}, True),
        ("qwen2-untied", {**SHARDS, "sample_from": "layers", "flat": False}, False),
    ],
    "vllm": [("llama-tied", {"zero_stage": 2}, False), ("llama-untied", SHARDS, True)],
}
LENGTH = 12


def model(family, backend):
    torch.manual_seed(0)
    lm = FAMILIES[family](**(HEADS_OF_32 if backend == "vllm" else {}))
    std = 0.25 if backend == "native" else 0.1
    for weight in (p for p in lm.parameters() if p.ndim == 2):
        torch.nn.init.normal_(weight, std=std)
    return lm


def own_prompts():
    """Three on rank 0, of 5, 23 and 1 tokens; four on rank 1, one of them of end and pad tokens alone."""
    ids = ragged(9)[0] if distributed.rank() == 0 else [[1, 1], *ragged(4, prompts=(2, 40, 9))[0]]
    return [Prompt("", tuple(one), 10 * distributed.rank() + i, {}) for i, one in enumerate(ids)]


def plain_model(engine, family, backend):
    """Unmodified transformers with the weights as they are now, whole on every rank."""
    with zero.gathered([p for p in engine.module.parameters() if hasattr(p, "ds_id")]):
        weights = {name: weight.detach().clone() for name, weight in merged_weights(engine.module.lm)}
    plain = model(family, backend)
    plain.load_state_dict(weights)
    return plain.eval()


def check(engine, family, backend):
    prompts, rank = own_prompts(), distributed.rank()
    plain = plain_model(engine, family, backend)
    greedy = engine.generate(prompts, [1] * len(prompts), Sampling(LENGTH, greedy=True), (0, 0))
    for prompt, tokens in zip(prompts, greedy.tokens.split(greedy.lengths.tolist()), strict=True):
        ids = torch.tensor([prompt.ids])
        ends = {"attention_mask": torch.ones_like(ids), "eos_token_id": 1, "pad_token_id": 1}
        expected = plain.generate(ids, max_new_tokens=LENGTH, do_sample=False, **ends)[0, len(prompt.ids) :]
        assert tokens.tolist() == expected.tolist(), (rank, prompt.ids)
    # The second rank has the shorter limit and the fewer completions.
    counts = [5, 1, 3] if rank == 0 else [1, 0, 1, 1]
    sampled = engine.generate(prompts, counts, Sampling(20 if rank == 0 else 6, temperature=0.8), (0, 0))
    layout = build_layout([p.ids for p in prompts], sampled.group, sampled.lengths, sampled.tokens)
    assert (engine.evaluate(layout, 0.8)[0] - sampled.logp).abs().max() < 1e-4, rank
    if backend == "native":  # a rank may have nothing to complete at all
        alone = engine.generate(prompts, [2 * rank] * len(prompts), Sampling(8), (0, 1))
        assert len(alone.lengths) == 2 * rank * len(prompts)
    return greedy.tokens.tolist()


def run(backend, family, how, lora):
    lm = model(family, backend)
    if lora:
        lm = make_trainable(lm, ModelConfig(name_or_path="x", lora=LoraConfig(rank=4, alpha=8.0)))
    rollout = RolloutConfig(backend=backend, max_sequences=4)
    engine = engine_of(lm, pad="t1", rollout=rollout, longest=64, **how)
    layout = build_layout(*ragged(distributed.rank()))
    before = check(engine, family, backend)
    if how["zero_stage"] == 3:  # in shards, and again after generation
        assert {p.ds_status.name for p in engine.module.parameters()} == {"NOT_AVAILABLE"}
    for _ in range(3 if lora else 1):
        engine.backward(-engine.forward(layout)[0].mean() / 2, True)
        engine.step(0.03)
    assert check(engine, family, backend) != before
    if how.get("sample_from") == "layers":
        engine.gather()
        if distributed.rank() == 0:
            kept = dict(merged_weights(engine.whole_policy.lm))
        plain = plain_model(engine, family, backend).state_dict()
        assert distributed.rank() or all(torch.equal(kept[name], value) for name, value in plain.items())
    return engine


if __name__ == "__main__":
    alive = [run(sys.argv[1], *variant) for variant in VARIANTS[sys.argv[1]]]  # vLLM's end takes the job's groups along
    print("conformance: all variants passed", flush=True)
    distributed.barrier()

"""Self-tests of the native and the deepspeed backend, in a process of its own: a tiny random model.

    python -m agrpo.doctor.selftest [native|deepspeed]

Prints one JSON object: {"status", "reason"}.
"""

from __future__ import annotations

import copy
import json
import string
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agrpo.config import EngineConfig, RolloutConfig, TokenizerConfig, TrainingConfig
from agrpo.engine.backends.native import NativeBackend, Sampling
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy
from agrpo.models import train_tokenizer
from agrpo.types import Prompt

_PROMPTS = ((5, 6, 7), tuple(range(8, 31)), (4,))
_LENGTH = 12
TOLERANCE = 1e-4  # nats


def native() -> tuple[bool, str]:
    """Greedy completions equal transformers' generate, and their log-probabilities the training forward's."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), [string.printable])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).to(device).eval()
    torch.nn.init.normal_(plain.lm_head.weight, std=0.3)  # no near ties
    policy = Policy(copy.deepcopy(plain))
    stop = tokenizer.eos_token_id
    backend = NativeBackend(policy.lm, flat=True, tokenizer=tokenizer, stop=[stop], max_sequences=8)
    prompts = [Prompt("", ids, slot, {}) for slot, ids in enumerate(_PROMPTS)]
    rollout = backend.generate(prompts, [1] * len(prompts), Sampling(_LENGTH, greedy=True), (0, 0))
    for prompt, tokens in zip(prompts, rollout.tokens.split(rollout.lengths.tolist()), strict=True):
        ids = torch.tensor([prompt.ids], device=device)
        ends = {"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id}
        whole = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_LENGTH, do_sample=False, **ends
        )
        if tokens.tolist() != whole[0, len(prompt.ids) :].tolist():
            return False, "greedy completions are not those of transformers' generate"
    layout = build_layout([p.ids for p in prompts], rollout.group, rollout.lengths, rollout.tokens).to(device)
    with torch.no_grad():
        gap = float((policy(layout)[0].cpu() - rollout.logp).abs().max())
    if gap > TOLERANCE:
        return False, f"log-probabilities are off the training forward's by {gap:.1e} nats, more than {TOLERANCE:g}"
    return True, f"greedy equals transformers' generate; log-probabilities within {gap:.1e} nats, on {device}"


def deepspeed() -> tuple[bool, str]:
    """DeepSpeed's kernels complete greedily as the native sampler does, before a training step and after it."""
    from agrpo.engine.hybrid import HybridEngine

    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), [string.printable])
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    said: list[str] = []
    engine = HybridEngine(
        Policy(lm),
        engine=EngineConfig(),
        training=TrainingConfig(max_steps=1),
        tokenizer=tokenizer,
        stop=[tokenizer.eos_token_id],
        rollout=RolloutConfig(backend="deepspeed"),
        note=said.append,
    )
    tokens = torch.arange(4, 20)
    layout = build_layout([[1, 2, 3]], torch.tensor([0]), torch.tensor([16]), tokens)
    for _ in range(2):
        engine.generation_mode()
        engine.backward(-engine.forward(layout)[0].mean(), True)
        engine.step(0.03)
    return not said, said[0] if said else "greedy completions are the native sampler's, also after a step"


if __name__ == "__main__":
    passed, reason = {"native": native, "deepspeed": deepspeed}[(sys.argv[1:] or ["native"])[0]]()
    print(json.dumps({"status": "pass" if passed else "fail", "reason": reason}))

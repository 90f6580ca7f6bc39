"""The self-test of a generation backend, in a process of its own: a tiny random model, against plain transformers.

    python -m agrpo.doctor.selftest native|vllm

Prints one JSON object: {"status", "reason"}.
"""

from __future__ import annotations

import copy
import json
import string
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agrpo.config import RolloutConfig, TokenizerConfig
from agrpo.engine.backends.build import build_backend
from agrpo.engine.backends.native import Sampling
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy
from agrpo.models import train_tokenizer
from agrpo.types import Prompt

_PROMPTS = ((5, 6, 7), tuple(range(8, 48)), (4,))  # the second is longer than a block of vLLM's cache
_LENGTH = 12
TOLERANCE = 1e-4  # nats


def check(name: str) -> tuple[bool, str]:
    """Greedy completions equal transformers' generate and their log-probabilities the training forward's, before and
    after a large change of all weights."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), [string.printable])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).to(device).eval()
    policy = Policy(copy.deepcopy(plain))
    stop = [tokenizer.eos_token_id]
    rollout = RolloutConfig(backend=name, max_sequences=8)
    backend = build_backend(rollout, policy, tokenizer=tokenizer, stop=stop, longest=64)
    prompts = [Prompt("", ids, slot, {}) for slot, ids in enumerate(_PROMPTS)]
    gaps, said = [], []
    for version in range(2):
        for weight, own in zip(plain.parameters(), policy.lm.parameters(), strict=True):
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.2)  # no near ties
            own.data.copy_(weight.data)
        backend.follow(version)
        done = backend.generate(prompts, [1] * len(prompts), Sampling(_LENGTH, greedy=True), (0, version))
        for prompt, tokens in zip(prompts, done.tokens.split(done.lengths.tolist()), strict=True):
            ids = torch.tensor([prompt.ids], device=device)
            ends = {"eos_token_id": stop[0], "pad_token_id": tokenizer.pad_token_id}
            whole = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=_LENGTH, do_sample=False, **ends
            )
            if tokens.tolist() != whole[0, len(prompt.ids) :].tolist():
                return False, f"greedy completions are not transformers' with weights of version {version}"
        layout = build_layout([p.ids for p in prompts], done.group, done.lengths, done.tokens).to(device)
        with torch.no_grad():
            gaps.append(float((policy(layout)[0].cpu() - done.logp).abs().max()))
        said.append(done.tokens.tolist())
    if max(gaps) > TOLERANCE:
        return False, f"log-probabilities are off the training forward's by {max(gaps):.1e} nats, over {TOLERANCE:g}"
    if said[0] == said[1]:
        return False, "the same completions before and after all weights changed"
    return True, f"greedy equals transformers' generate; log-probabilities within {max(gaps):.1e} nats, on {device}"


if __name__ == "__main__":
    passed, reason = check(sys.argv[1])
    print(json.dumps({"status": "pass" if passed else "fail", "reason": reason}))

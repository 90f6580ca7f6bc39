"""Peak memory of two optimiser steps of a small real run, less what was in use before, and the estimate: two numbers.

Arguments: ZeRO stage, and 1 for activation checkpointing.
"""

import math
import sys

import torch
from tiny import FAMILIES, SIZES, engine_of, ragged
from transformers import LlamaConfig, LlamaForCausalLM

from agrpo.doctor.estimate import Setting, totals
from agrpo.doctor.memory import Batch, Shape
from agrpo.engine.layout import build_layout

H, F, L, V = 256, 1024, 8, 4096
BATCH = Batch(groups=2, samples=4, prompt=64, completion=112)


def status(name):
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def steps(engine, layout):
    for _ in range(2):
        engine.backward(-engine.forward(layout)[0].mean(), True)
        assert math.isfinite(engine.step(1e-4))


zero, checkpointing = int(sys.argv[1]), sys.argv[2] == "1"
steps(
    engine_of(FAMILIES["llama-untied"](), zero, checkpointing=checkpointing), build_layout(*ragged(1))
)  # libraries take what they take
before = status("VmRSS")
sizes = dict(SIZES, hidden_size=H, intermediate_size=F, num_hidden_layers=L, vocab_size=V, max_position_embeddings=512)
lm = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
parameters = sum(p.numel() for p in lm.parameters())
prompts = torch.randint(0, V, (BATCH.groups, BATCH.prompt)).tolist()
rows = BATCH.groups * BATCH.samples
group = torch.arange(BATCH.groups).repeat_interleave(BATCH.samples)
lengths = torch.full((rows,), BATCH.completion)
layout = build_layout(prompts, group, lengths, torch.randint(0, V, (rows * BATCH.completion,)))
steps(engine_of(lm, zero, checkpointing=checkpointing), layout)
peak = status("VmHWM") - before
shape = Shape(parameters, parameters, H, H, H // 2, F, L, V)
common = {"rows": 0, "prompt": 64, "completion": 0, "bytes": 4, "offload": False, "reference": False, "trains": True}
setting = Setting(
    shape=shape, batch=BATCH, zero=zero, checkpointing=checkpointing, world=1, flat=True, cuda=False, **common
)
print(peak, totals(setting)[0])

"""What `agrpo doctor --config` tells of a step's time beside real steps on this machine.

    python scripts/calibrate_doctor.py [--threads 1] [--json FILE]

Each case is a model of random weights and a GRPO step whose completions all have their full length, as the estimate
assumes. `agrpo benchmark step` measures it; the estimate is made for the same configuration, with speeds measured in
the moment before. The smallest and largest quotient are `timing.SLACK`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

_SIZES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "0.2 M": (96, 288, 2, 4, 4, 64),
    "5 M": (256, 768, 6, 8, 4, 2048),
    "30 M": (512, 1536, 8, 8, 4, 8192),
    "135 M": (576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M's
}
_CASES = [  # model, dtype, prompts, completions of each, prompt's and completion's tokens, tokens of a micro-batch
    ("0.2 M", "float32", 32, 8, 12, 56, 16384),
    ("0.2 M", "float32", 4, 4, 12, 56, 16384),
    ("5 M", "float32", 8, 8, 32, 64, 4096),
    ("30 M", "float32", 4, 8, 64, 32, 4096),
    ("30 M", "bfloat16", 4, 8, 64, 32, 4096),
    ("135 M", "bfloat16", 4, 8, 44, 32, 1280),
]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    rows = []
    print(f"{'case':<46}{'sampling: told':>15}{'took':>8}{'×':>6}{'update: told':>15}{'took':>8}{'×':>6}")
    for case in _CASES:
        name, dtype, prompts, group, prompt, completion, _ = case
        row = {"case": f"{name} {dtype}, {prompts} × {group} of {prompt} + {completion} tokens", **compare(case, asked)}
        rows.append(row)
        line = "".join(
            f"{row[part]['told']:>{15}.3f}{row[part]['took']:>8.3f}{row[part]['took'] / row[part]['told']:>6.2f}"
            for part in ("sampling", "update")
        )
        print(f"{row['case']:<46}{line}", flush=True)
    for part in ("sampling", "update"):
        ratios = [row[part]["took"] / row[part]["told"] for row in rows]
        print(f"{part}: took {min(ratios):.2f} to {max(ratios):.2f} times what the formulas tell")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(case: tuple[Any, ...], asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of a case's sampling and update, told and taken."""
    from agrpo.benchmark.ours import configuration
    from agrpo.benchmark.step import measure
    from agrpo.benchmark.work import Work
    from agrpo.doctor.estimate import architecture, seconds_of_a_step, setting
    from agrpo.doctor.machine import speeds

    name, dtype, prompts, group, prompt, completion, micro = case
    with tempfile.TemporaryDirectory() as folder:
        make_model(name, Path(folder))
        work = Work(
            folder, prompts, group, prompt, completion, dtype=dtype, threads=asked.threads, micro_batch_tokens=micro
        )
        config = configuration(work)
        lengths = config.sampling.model_copy(update={"max_prompt_length": prompt})
        config = config.model_copy(update={"sampling": lengths})
        s = setting(config, architecture(config))
        import torch

        torch.set_num_threads(asked.threads)
        told = seconds_of_a_step(s, config, speeds(getattr(torch, dtype), s.shape.hidden, s.shape.intermediate))
        took = measure(work, "none", {})["ours"]
    return {
        "sampling": {"told": told["sampling"], "took": took["generation_s"]},
        "update": {"told": told["update"], "took": took["update_s"]},
    }


def make_model(name: str, folder: Path) -> None:
    from agrpo.config import ModelConfig, TokenizerConfig
    from agrpo.models import load_language_model, load_tokenizer, save_language_model

    hidden, intermediate, layers, heads, keys, vocabulary = _SIZES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": keys, "tie_word_embeddings": True}
    architecture = {"model_type": "llama", **sizes, "max_position_embeddings": 1024}
    config = ModelConfig(config=architecture, tokenizer=TokenizerConfig(kind="characters"))
    tokenizer, _ = load_tokenizer(config, ["0123456789"])
    lm = load_language_model(config, tokenizer, 0)
    lm.resize_token_embeddings(vocabulary)
    save_language_model(lm, tokenizer, folder)


if __name__ == "__main__":
    raise SystemExit(main())

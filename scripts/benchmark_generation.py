"""Tokens a second of the native sampler beside transformers' generate, and vLLM: same model, prompts and lengths.

    python scripts/benchmark_generation.py [--model NAME_OR_PATH | --gguf NAME] [--dtype bfloat16] [--vllm]

Without --model and --gguf a small Qwen2 with random weights. End tokens are ignored: every completion has the same
length, so all do the same work and only speed differs. `grouped` completes few prompts many times, as stage 3 does;
`distinct` completes every prompt once, where nothing can be shared.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from agrpo.config import ModelConfig, RolloutConfig, TokenizerConfig
from agrpo.engine.backends.native import NativeBackend, Sampling
from agrpo.engine.backends.vllm import VllmBackend
from agrpo.engine.modules import Policy, cast_weights
from agrpo.models import load_language_model, load_tokenizer, train_tokenizer
from agrpo.types import Prompt, RolloutBackend


class _NoTexts:
    """Stands for the tokenizer where texts do not matter."""

    all_special_ids: tuple[int, ...] = ()

    def batch_decode(self, rows: list[list[int]], **options: object) -> list[str]:
        return [""] * len(rows)


def load(
    name: str | None, gguf: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name is not None or gguf is not None:
        config = ModelConfig(name_or_path=name, gguf=gguf)
        tokenizer, _ = load_tokenizer(config)
        return cast_weights(load_language_model(config, tokenizer, 0), dtype).to(device).eval(), tokenizer
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), [string.printable])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval(), tokenizer


def seconds(call: Callable[[], int], repeats: int, expected: int, device: torch.device) -> float:
    """The shortest of some runs after one to warm up; `call` returns the tokens it made."""
    times = []
    for _ in range(repeats + 1):
        began = perf_counter()
        made = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
        if made != expected:
            raise RuntimeError(f"{made} tokens came, not {expected}: the two would not do the same work")
    return min(times[1:])


def measure(dtype: torch.dtype, workload: str, args: argparse.Namespace) -> dict[str, float | str | None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    each = args.group if workload == "grouped" else 1
    plain, tokenizer = load(args.model, args.gguf, dtype, device)
    generator = torch.Generator().manual_seed(0)
    distinct = args.sequences // each
    ids = torch.randint(0, plain.config.vocab_size, (distinct, args.prompt_length), generator=generator)
    rows = ids.repeat_interleave(each, 0).to(device)
    total = len(rows) * args.completion_length

    def by_transformers() -> int:
        made = plain.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            top_k=0,
            min_new_tokens=args.completion_length,
            max_new_tokens=args.completion_length,
            pad_token_id=0,
        )
        return made[:, args.prompt_length :].numel()

    theirs = total / seconds(by_transformers, args.repeats, total, device)
    policy = Policy(plain)  # from here on the model is routed through flat attention
    prompts = [Prompt(text="", ids=tuple(row), slot=slot, columns={}) for slot, row in enumerate(ids.tolist())]
    sampling = Sampling(args.completion_length)

    def speed(backend: RolloutBackend) -> float:
        backend.tokenizer = _NoTexts()
        backend.follow(0)
        return total / seconds(
            lambda: len(backend.generate(prompts, [each] * distinct, sampling, (0, 0)).tokens),
            args.repeats,
            total,
            device,
        )

    native = NativeBackend(
        plain, flat=policy.fallback_reason is None, tokenizer=tokenizer, stop=(), max_sequences=args.sequences
    )
    mine, vllms = speed(native), None
    if args.vllm:
        rollout = RolloutConfig(backend="vllm", max_sequences=args.sequences)
        longest = args.prompt_length + args.completion_length
        vllms = speed(VllmBackend(policy, tokenizer=tokenizer, stop=(), rollout=rollout, longest=longest))
    return {
        "workload": workload,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "sequences": len(rows),
        "prompts": distinct,
        "prompt_length": args.prompt_length,
        "completion_length": args.completion_length,
        "native_tokens_per_s": mine,
        "transformers_tokens_per_s": theirs,
        "vllm_tokens_per_s": vllms,
        "ratio": mine / theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model's directory or Hub id (default: a small one with random weights)")
    parser.add_argument("--gguf", help="a GGUF file, or the installed package that carries one")
    parser.add_argument("--vllm", action="store_true", help="vLLM too (scripts/setup.sh --vllm)")
    parser.add_argument("--workload", choices=("grouped", "distinct"), help="one of the two alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--sequences", type=int, default=32, help="completions that decode together")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt in the grouped workload")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--completion-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the measurements here too")
    args = parser.parse_args()
    if args.sequences % args.group:
        parser.error(f"--sequences {args.sequences} is not a multiple of --group {args.group}")
    workloads = [args.workload] if args.workload else ["grouped", "distinct"]
    results = [measure(getattr(torch, args.dtype), w, args) for w in workloads]
    name = args.model or args.gguf or "Qwen2, 4 layers of 256, random weights"
    print(f"{name}, {args.dtype}, {results[0]['device']}, {results[0]['threads']} threads")
    for r in results:
        print(
            f"{r['workload']:>8}: {r['sequences']} sequences of {r['prompts']} prompts, {r['prompt_length']} +"
            f" {r['completion_length']} tokens: native {r['native_tokens_per_s']:.0f} tokens/s,"
            f" transformers {r['transformers_tokens_per_s']:.0f}, ratio {r['ratio']:.2f}"
            + (f", vLLM {r['vllm_tokens_per_s']:.0f}" if args.vllm else "")
        )
    if args.json:
        args.json.write_text(
            json.dumps({"model": name, "dtype": args.dtype, "results": results}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()

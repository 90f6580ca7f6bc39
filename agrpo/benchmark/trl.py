"""The peer: TRL's GRPOTrainer on the same prompts, with the same reward, lengths, β, precision and optimiser."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch

from agrpo.benchmark.work import Clock, Shape, Turns, Work, prompt_ids, reward_of

PRECISIONS = {"amp": "float32 weights, bfloat16 autocast", "pure": "bfloat16 weights and optimiser", "float32": ""}


def run(work: Work, precision: str, batch: int, checkpointing: bool, vllm: bool) -> None:
    """Takes its turns inside TRL's own loop, in callbacks.

    Args:
        precision: one of PRECISIONS.
        batch: completions of one forward (`per_device_train_batch_size`); the rest is gradient accumulation.
        checkpointing: recompute activations in the backward pass, TRL's default.
        vllm: generate by vLLM in the same process.
    """
    clock = Clock()
    turns = Turns(work.steps, clock)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    lm = AutoModelForCausalLM.from_pretrained(
        work.model, dtype=torch.bfloat16 if precision == "pure" else torch.float32
    )
    shape = Shape.of(lm)
    ids = [i for step in range(work.steps) for i in prompt_ids(work, tokenizer, lm.config.vocab_size, step)]
    # TRL tokenises texts itself: these stand for the ids that ours reads, and _tokenize_prompts below hands them out.
    data = Dataset.from_list([{"prompt": str(n)} for n in range(len(ids))])
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {}
        if vllm:
            options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=work.rows // batch,
            num_generations=work.group,
            max_completion_length=work.completion_tokens,
            generation_kwargs={"ignore_eos": True} if vllm else {"min_new_tokens": work.completion_tokens},
            beta=work.beta,
            num_iterations=1,
            max_steps=work.steps,
            learning_rate=work.learning_rate,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            temperature=1.0,
            bf16=precision == "amp",
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=checkpointing,
            shuffle_dataset=False,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        trainer = GRPOTrainer(
            model=lm,
            reward_funcs=lambda completion_ids, **_: [reward_of(c) for c in completion_ids],
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
        )
        _read_ids(trainer, ids)
        _time(trainer, clock)
        lengths: list[list[int]] = []
        generate = trainer._generate_and_score_completions

        def noted(inputs: Any) -> Any:
            made = generate(inputs)
            lengths.append([made["prompt_mask"].sum(1).tolist(), made["completion_mask"].sum(1).tolist()])
            return made

        trainer._generate_and_score_completions = noted

        class Referee(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                turns.wait()

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                self.phase = clock.phase("optimiser")
                self.phase.__enter__()

            def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                self.phase.__exit__(None, None, None)

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                prompts, completions = lengths[-1]
                turns.done(prompts=prompts[:: work.group], lengths=completions, kept=work.rows)

        trainer.add_callback(Referee())
        settings = {"precision": precision, "batch": batch, "gradient_checkpointing": checkpointing, "vllm": vllm}
        turns.tell("ready", shape=vars(shape), name="TRL", settings=settings)
        print(f"TRL {settings}", file=sys.stderr)
        trainer.train()


def _read_ids(trainer: Any, ids: list[list[int]]) -> None:
    """Have the trainer read the same token ids as ours: both then do the same work, whatever a template adds."""

    if not hasattr(trainer, "_tokenize_prompts"):
        raise RuntimeError("this version of TRL tokenises prompts elsewhere; the benchmark knows TRL 1.16")
    trainer._tokenize_prompts = lambda prompts: ([ids[int(text)] for text in prompts], None, {})


def _time(trainer: Any, clock: Clock) -> None:
    clock.wrap(trainer, "_generate_single_turn", "generation")
    # Without gradient this is the reference's forward (and the old policy's, where TRL wants it).
    clock.wrap(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda: "forward" if torch.is_grad_enabled() else "reference",
    )
    clock.wrap(trainer, "_compute_loss", "forward")
    clock.wrap(trainer.accelerator, "backward", "backward")

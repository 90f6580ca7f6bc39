"""Tiny random models and ragged batches that the tests share."""

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
FAMILIES = {
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen2-untied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
}
FALLBACKS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
}


def ragged(seed, prompts=(5, 23, 1), groups=((7, 1, 30), (4,), (12, 12, 3, 9))):
    """Ragged prompts and groups of random tokens: prompts, group, lengths, tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([n for group in groups for n in group])
    group = torch.tensor([p for p, sizes in enumerate(groups) for _ in sizes])
    ids = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in prompts]
    return ids, group, lengths, torch.randint(0, 97, (int(lengths.sum()),), generator=generator)


def tokenizer():
    """One token for each of t0 … t96; t1 ends a text."""
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(97)}, unk_token="t0"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1", pad_token="t0")


def engine_of(
    lm,
    zero_stage=0,
    dtype="float32",
    with_reference=False,
    offload="none",
    checkpointing=False,
    critic=False,
    scorer=False,
    rollout=None,
    longest=None,
    **training,
):
    """A HybridEngine around a language model, with a value or a score head where asked for."""
    from agrpo.config import EngineConfig, TrainingConfig
    from agrpo.engine.hybrid import HybridEngine
    from agrpo.engine.modules import ActorCritic, Policy, Scorer

    policy = (ActorCritic if critic else Policy)(lm)
    return HybridEngine(
        Scorer(policy) if scorer else policy,
        engine=EngineConfig(zero_stage=zero_stage, offload=offload, activation_checkpointing=checkpointing),
        training=TrainingConfig(max_steps=1, **training),
        tokenizer=tokenizer(),
        stop=[1],
        rollout=rollout,
        longest=longest,
        dtype=dtype,
        with_reference=with_reference,
    )

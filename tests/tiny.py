"""Tiny random models and ragged batches that the tests share."""

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
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
HEADS_OF_32 = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # the least vLLM takes on a CPU


def _family(model, config, tied, **own):
    """Makes models of one family; other sizes than SIZES where asked for."""
    return lambda **other: model(config(**{**SIZES, **own, **other}, tie_word_embeddings=tied))


FAMILIES = {
    "llama-tied": _family(LlamaForCausalLM, LlamaConfig, True),
    "llama-untied": _family(LlamaForCausalLM, LlamaConfig, False),
    "qwen2-tied": _family(Qwen2ForCausalLM, Qwen2Config, True),
    "qwen2-untied": _family(Qwen2ForCausalLM, Qwen2Config, False),
    "qwen3-tied": _family(Qwen3ForCausalLM, Qwen3Config, True, head_dim=12),
    "qwen3-untied": _family(Qwen3ForCausalLM, Qwen3Config, False, head_dim=12),
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


def tokenizer(pad="t0"):
    """One token for each of t0 … t96; t1 ends a text."""
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(97)}, unk_token="t0"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1", pad_token=pad)


def warped(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution that transformers' own generate samples from, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return warpers(None, logits).softmax(-1)


def follows(tokens, p):
    """Pearson's chi-square test of token counts at the level 0.001; tokens expected less than 5 times count as one."""
    seen, expected = torch.bincount(tokens, minlength=len(p)), p.double() * len(tokens)
    rare = expected < 5
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] == 0:
        assert seen[-1] == 0
        seen, expected = seen[:-1], expected[:-1]
    if len(expected) == 1:
        return True
    chi_square = ((seen - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), chi_square / 2) > 1e-3


def engine_of(
    lm,
    zero_stage=0,
    dtype="float32",
    with_reference=False,
    offload="none",
    offload_path=None,
    sample_from="auto",
    persistence=100_000,
    checkpointing=False,
    critic=False,
    scorer=False,
    flat=True,
    max_sequences=256,
    pad="t0",
    rollout=None,
    longest=None,
    fast=True,
    note=print,
    **training,
):
    """A HybridEngine around a language model, with a value or a score head where asked for."""
    from agrpo.config import EngineConfig, RolloutConfig, TrainingConfig
    from agrpo.engine.hybrid import HybridEngine
    from agrpo.engine.modules import ActorCritic, Policy, Scorer

    policy = (ActorCritic if critic else Policy)(lm, flat)
    return HybridEngine(
        Scorer(policy) if scorer else policy,
        engine=EngineConfig(
            zero_stage=zero_stage,
            offload=offload,
            offload_path=offload_path,
            sample_from=sample_from,
            param_persistence_threshold=persistence,
            activation_checkpointing=checkpointing,
            fast=fast,
        ),
        training=TrainingConfig(max_steps=1, **training),
        tokenizer=tokenizer(pad),
        stop=[1],
        rollout=rollout or RolloutConfig(max_sequences=max_sequences),
        longest=longest,
        dtype=dtype,
        with_reference=with_reference,
        note=note,
    )

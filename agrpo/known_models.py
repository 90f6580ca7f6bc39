"""The architectures of the models that `configs/` names, for where the Hub cannot be asked: sizes without weights."""

from __future__ import annotations

from typing import Any

_QWEN2 = {"model_type": "qwen2", "rope_theta": 1_000_000.0, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
_QWEN2_0_5B = {
    **_QWEN2,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
_QWEN2_1_5B = {
    **_QWEN2,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
_QWEN2_7B = {
    **_QWEN2,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
_LLAMA_3_2_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _QWEN2_0_5B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_0_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_1_5B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2_7B,
    # Qwen2.5-Math-1.5B with a head of its own.
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {**_QWEN2_1_5B, "tie_word_embeddings": False, "rope_theta": 10_000.0},
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_3_2_1B,
}


def scaled_down(architecture: dict[str, Any], head: int = 8) -> dict[str, Any]:
    """The same architecture at a toy's size: two layers, heads of `head`, at most two key-value heads.

    What makes code behave differently stays: model type, queries a key-value head, tied or untied embeddings, rope.
    """
    keys = min(2, architecture["num_key_value_heads"])
    heads = keys * architecture["num_attention_heads"] // architecture["num_key_value_heads"]
    sizes = {"hidden_size": head * heads, "intermediate_size": 2 * head * heads, "num_hidden_layers": 2}
    wide = {"head_dim": head} if "head_dim" in architecture else {}
    return {**architecture, **sizes, **wide, "num_attention_heads": heads, "num_key_value_heads": keys}

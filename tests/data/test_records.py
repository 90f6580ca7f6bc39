import json
import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agrpo.data.records import (
    DataError,
    Records,
    demonstrations,
    in_turns,
    leak_notes,
    leaked,
    preference_groups,
    prompts,
    vote_confidence,
)
from agrpo.data.sources import load_rows


def rows(*values):
    return Records(tuple((f"data.jsonl:{number}", value) for number, value in enumerate(values, 1)))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row, prompt, completion, columns",
    [
        ({"text": "Once upon a time."}, "", "Once upon a time.", {}),
        ({"prompt": "2+2=", "completion": "4", "id": 7}, "2+2=", "4", {"id": 7}),
        ({"prompt": [user("Hi")], "completion": [assistant("Hello")]}, [user("Hi")], "Hello", {}),
        ({"prompt": [user("Hi")], "completion": "Hello"}, [user("Hi")], "Hello", {}),
        ({"prompt": "Hi", "completion": [assistant("Hello")]}, [user("Hi")], "Hello", {}),
        ({"messages": [SYSTEM, user("Hi"), assistant("Hello")]}, [SYSTEM, user("Hi")], "Hello", {}),
        (
            {"messages": [user("Hi"), assistant("Hello"), user("Bye"), assistant("Ciao")], "prompt": "Hi"},
            [user("Hi")],
            (assistant("Hello"), user("Bye"), assistant("Ciao")),
            {"prompt": "Hi"},
        ),
        (
            {"messages": [assistant("Welcome"), user("Hi"), assistant("Hello")]},
            [assistant("Welcome"), user("Hi")],
            "Hello",
            {},
        ),
        (
            {"prompt": "2+2?", "completion": [assistant("calc"), tool("4"), assistant("Four.")]},
            [user("2+2?")],
            (assistant("calc"), tool("4"), assistant("Four.")),
            {},
        ),
        (
            {"messages": [{**user("Hi"), "name": None}, assistant("Hello")], "text": None},
            [user("Hi")],
            "Hello",
            {"text": None},
        ),
    ],
)
def test_each_form_of_a_demonstration(row, prompt, completion, columns):
    (made,) = demonstrations(rows(row), {})
    assert (made.prompt, made.completion, made.columns) == (prompt, completion, columns)


def test_columns_rename_and_the_rest_is_kept_for_the_rewards():
    row = {"question": "1+1", "answer": "2", "metadata": {"level": 3}}
    (made,) = prompts(rows(row), {"prompt": "question", "solution": "answer"})
    assert made.text == "1+1" and made.columns == {"solution": "2", "metadata": {"level": 3}}
    openrlhf = {"input": "Q", "good": "A", "bad": "B"}
    (group,) = preference_groups(rows(openrlhf), {"prompt": "input", "chosen": "good", "rejected": "bad"})
    assert (group.prompt, group.completions, group.columns) == ("Q", ("A", "B"), {})


SHARED = [user("Hi"), assistant("Hello"), user("Sing")]


@pytest.mark.parametrize(
    "row, prompt, completions",
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q", ("A", "B")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is", (" blue.", " black.")),
        ({"chosen": "Say it:\n\nyes", "rejected": "Say it:\n\nno"}, "Say it:", ("\n\nyes", "\n\nno")),
        ({"chosen": "One two three", "rejected": "One two"}, "One", (" two three", " two")),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: The end.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: The world.",
            },
            "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:",
            (" The end.", " The world."),
        ),
        ({"chosen": [*SHARED, assistant("La")], "rejected": [*SHARED, assistant("No")]}, SHARED, ("La", "No")),
        ({"prompt": SHARED, "chosen": [assistant("La")], "rejected": [assistant("No")]}, SHARED, ("La", "No")),
        ({"prompt": SHARED, "chosen": "La", "rejected": "No"}, SHARED, ("La", "No")),
        ({"prompt": "Sing", "chosen": [assistant("La")], "rejected": [assistant("No")]}, [user("Sing")], ("La", "No")),
        # UltraFeedback repeats the prompt as a string beside whole conversations.
        (
            {"prompt": "Sing", "chosen": [user("Sing"), assistant("La")], "rejected": [user("Sing"), assistant("No")]},
            [user("Sing")],
            ("La", "No"),
        ),
    ],
)
def test_each_form_of_a_preference(row, prompt, completions):
    (group,) = preference_groups(rows(row), {})
    assert (group.prompt, group.completions, group.levels) == (prompt, completions, (1, 0))
    assert (group.confidences, group.margin) == ((), None)


words = st.lists(st.sampled_from(["the", "sky", "is", "blue", "\n", "not."]), min_size=1, max_size=5).map(" ".join)


@given(words, words, words)
def test_prompt_and_completion_put_together_are_what_the_data_said(beginning, one, other):
    row = {"chosen": f"{beginning} {one}", "rejected": f"{beginning} {other}"}
    try:
        (group,) = preference_groups(rows(row), {})
    except DataError:
        assume(False)
    assert group.prompt + group.completions[0] == row["chosen"]
    assert group.prompt + group.completions[1] == row["rejected"]
    assert group.prompt.strip() and all(c.strip() and c[0].isspace() for c in group.completions)


def test_confidence_margin_votes_and_a_csvs_empty_cells():
    base = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    made = preference_groups(
        rows(
            {**base, "confidence": 0.3, "margin": 2, "id": 1},
            {**base, "confidence": "0.3", "margin": ""},
            {**base, "votes_chosen": 3, "votes_rejected": 1},
            {**base, "votes_chosen": 2, "votes_rejected": 2},
            {**base, "confidence": None, "margin": None},
        ),
        {},
    )
    assert [group.confidences for group in made] == [(0.3, 0.3), (0.3, 0.3), (0.625, 0.625), (0.0, 0.0), ()]
    assert [group.margin for group in made] == [2.0, None, None, None, None]
    assert made[0].columns == {"id": 1}


@given(st.integers(0, 40), st.integers(0, 40))
def test_vote_confidence_is_the_posterior_that_most_prefer_it(a, b):
    # The posterior Beta(1 + a, 1 + b) integrated by the midpoint rule.
    grid = [(i + 0.5) / 4000 for i in range(4000)]
    density = [math.exp(a * math.log(x) + b * math.log(1 - x)) for x in grid]
    above = sum(d for x, d in zip(grid, density, strict=True) if x > 0.5) / sum(density)
    assert vote_confidence(a, b) == pytest.approx(abs(2 * above - 1), abs=1e-3)


def test_vote_confidence_with_very_many_votes():
    assert vote_confidence(6000, 4000) == pytest.approx(1.0)


def test_ranked_groups():
    row = {
        "prompt": "Q",
        "completions": ["A", [assistant("B")], "C"],
        "levels": [2, 0, 0],
        "confidences": [1, 0.5, 0],
        "n": 3,
    }
    (group,) = preference_groups(rows(row), {})
    assert (group.prompt, group.completions, group.levels) == ("Q", ("A", "B", "C"), (2, 0, 0))
    assert (group.confidences, group.margin, group.columns) == ((1.0, 0.5, 0.0), None, {"n": 3})
    (group,) = preference_groups(
        rows({"prompt": "Q", "completions": [[assistant(c)] for c in "AB"], "levels": [0, 1]}), {}
    )
    assert group.prompt == [user("Q")]


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
GROUP = {"prompt": "Q", "completions": ["A", "B"], "levels": [1, 0]}
BAD = [
    # make, row, what the message says after the location
    (
        demonstrations,
        {"prompt": "Q", "complétion": "A"},
        "no key 'completion'; the row has prompt, complétion; did you mean",
    ),
    (
        demonstrations,
        {"question": "Q", "answer": "A"},
        "no key 'messages'; the row has question, answer; a demonstration needs",
    ),
    (demonstrations, {}, "no key 'messages'; the row is empty"),
    (demonstrations, {"prompt": "Q", "completion": " \n"}, "completion: is empty; fill it"),
    (demonstrations, {"prompt": "", "completion": "A"}, "prompt: is empty; fill it"),
    (demonstrations, {"prompt": "Q", "completion": 4}, "completion: is a number (4); give a string or a list"),
    (demonstrations, {"prompt": "Q", "completion": None}, "completion: is null; fill it"),
    (
        demonstrations,
        {"prompt": "Q", "completion": [user("A")]},
        "completion: has the turns user; give one assistant turn",
    ),
    (demonstrations, {"text": None}, "text: is null; fill it"),
    (demonstrations, {"text": [user("A")]}, "text: has the turns user"),
    (demonstrations, {"messages": "Hi"}, "messages: is a string; give a list of {role, content}"),
    (demonstrations, {"messages": []}, "messages: is an empty conversation; give at least one"),
    (
        demonstrations,
        {"messages": [user("Hi")]},
        "messages: ends with the turn of the user; end it with the assistant's",
    ),
    (
        demonstrations,
        {"messages": [assistant("Hi")]},
        "messages: has no turn before the assistant's; begin with the user's",
    ),
    (demonstrations, {"messages": [user("Hi"), assistant("")]}, "messages: is empty; fill it"),
    (
        demonstrations,
        {"messages": [user("Hi"), assistant("a"), user("b"), assistant(" "), user("c"), assistant("d")]},
        "messages: message 3, the assistant's, is empty; fill it",
    ),
    (
        demonstrations,
        {"prompt": "Hi", "completion": [assistant("a"), tool("b")]},
        "completion: ends with the turn of the tool; give turns from the assistant's first to its last",
    ),
    (
        demonstrations,
        {"prompt": "Hi", "completion": [user("a"), assistant("b")]},
        "completion: begins with the turn of the user; give turns from the assistant's first to its last",
    ),
    (
        demonstrations,
        {"messages": [user(""), assistant("Hi")]},
        "messages: has an empty user turn at the prompt's end; fill",
    ),
    (demonstrations, {"messages": ["Hi"]}, "messages: message 1 is a string ('Hi'); give {role, content} objects"),
    (
        demonstrations,
        {"messages": [{"speaker": "human", "value": "Hi"}]},
        "messages: message 1 has no role that is a string; it has speaker, value; write it as {role: one of",
    ),
    (
        demonstrations,
        {"messages": [{"role": "gpt", "content": "Hi"}]},
        "messages: message 1 has the role 'gpt'; use one of",
    ),
    (
        prompts,
        {"promt": "Q"},
        "no key 'prompt'; the row has promt; did you mean 'promt'?; rename it or set data.columns",
    ),
    (
        prompts,
        {"prompt": [user("Hi"), assistant("Ho")]},
        "prompt: has a prompt that ends with the assistant's turn; end",
    ),
    (preference_groups, {"prompt": "Q", "chosen": "A"}, "no key 'rejected'; the row has prompt, chosen"),
    (preference_groups, {**PAIR, "rejected": "A"}, "rejected: is identical to chosen; give two different answers"),
    (
        preference_groups,
        {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), {**assistant("A"), "id": "7"}]},
        "rejected: is identical to chosen; give two different answers",
    ),
    (preference_groups, {"chosen": "Q A", "rejected": "Q A"}, "rejected: is identical to chosen; give two different"),
    (preference_groups, {**PAIR, "chosen": ""}, "chosen: is empty; fill it"),
    (preference_groups, {**PAIR, "rejected": [assistant(" ")]}, "rejected: and chosen are a string and"),
    (
        preference_groups,
        {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant(" ")]},
        "rejected: is empty; fill it",
    ),
    (
        preference_groups,
        {**PAIR, "rejected": [assistant("B")]},
        "rejected: and chosen are a string and a conversation; make",
    ),
    (
        preference_groups,
        {"chosen": "Yes", "rejected": "No"},
        "prompt: is missing, and chosen and rejected do not begin alike",
    ),
    (
        preference_groups,
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant:"},
        "rejected: has nothing after the prompt that it shares with the other; add the answer",
    ),
    (
        preference_groups,
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B", "rejected": "\n\nHuman: Hi\n\nAssistant: C"},
        "chosen: differs before the last assistant turn; let only the last turn differ",
    ),
    (
        preference_groups,
        {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Ho"), assistant("B")]},
        "rejected: differs from chosen before the last turn; let only",
    ),
    (
        preference_groups,
        {"chosen": [assistant("A")], "rejected": [assistant("B")]},
        "prompt: is missing, and chosen holds only the assistant's turn; add a prompt column",
    ),
    (
        preference_groups,
        {"prompt": "Sing", "chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]},
        "prompt: is not what chosen's turns begin with; leave the prompt out",
    ),
    (preference_groups, {**PAIR, "confidence": 1.2}, "confidence: is 1.2, outside [0, 1]; give a confidence between 0"),
    (preference_groups, {**PAIR, "confidence": math.nan}, "confidence: is a number (nan); give a finite number"),
    (preference_groups, {**PAIR, "confidence": "high"}, "confidence: is a string ('high'); give a finite number"),
    (preference_groups, {**PAIR, "margin": True}, "margin: is a boolean (True); give a finite number"),
    (preference_groups, {**PAIR, "margin": -1}, "margin: is -1.0: the rejected one scored higher; swap"),
    (preference_groups, {**PAIR, "votes_chosen": 1, "votes_rejected": 4}, "votes_chosen: has 1 votes against 4; swap"),
    (preference_groups, {**PAIR, "votes_chosen": 1}, "no key 'votes_rejected'; the row has prompt, chosen"),
    (
        preference_groups,
        {**PAIR, "votes_chosen": 1.5, "votes_rejected": 1},
        "votes_chosen: is 1.5; give a whole number",
    ),
    (
        preference_groups,
        {**PAIR, "votes_chosen": 1, "votes_rejected": -1},
        "votes_chosen: and votes_rejected are [1, -1]",
    ),
    (preference_groups, {**GROUP, "levels": [1, 0, 2]}, "levels: has 3 values for 2 completions; give each one level"),
    (preference_groups, {**GROUP, "levels": [1, 1]}, "levels: are all 1; a group needs two levels"),
    (preference_groups, {**GROUP, "levels": 1}, "levels: is a number (1); give a list"),
    (preference_groups, {**GROUP, "levels": ["good", "bad"]}, "levels: is a string ('good'); give a finite number"),
    (preference_groups, {**GROUP, "completions": ["A"]}, "completions: has 1; a group needs at least 2"),
    (preference_groups, {**GROUP, "completions": ["A", ""]}, "completions: is empty; fill it"),
    (preference_groups, {**GROUP, "completions": ["A", "A"]}, "completions: has 'A' at levels 1 and 0; give equal"),
    (preference_groups, {**GROUP, "confidences": [1]}, "confidences: has 1 values for 2 completions; give each"),
    (preference_groups, {**GROUP, "confidences": [1, -0.1]}, "confidences: is -0.1, outside [0, 1]"),
]
GOOD = {demonstrations: {"prompt": "Q", "completion": "A"}, prompts: {"prompt": "Q"}, preference_groups: PAIR}


@pytest.mark.parametrize("make, row, message", BAD, ids=[f"{make.__name__}-{text[:40]}" for make, _, text in BAD])
def test_a_bad_row_is_refused_with_place_key_and_mend_or_skipped_and_told(make, row, message):
    data = rows(GOOD[make], row)
    with pytest.raises(DataError) as caught:
        make(data, {})
    assert str(caught.value).startswith(f"data.jsonl:2: {message}")
    assert str(caught.value).endswith("data.on_bad_row: skip)")
    skipped = make(data, {}, "skip")
    assert len(skipped) == 1 and len(skipped.skipped) == 1
    assert str(caught.value).startswith(skipped.skipped[0])
    with pytest.raises(DataError, match=r"none of 1 rows is usable; the first: data\.jsonl:1"):
        make(rows(row), {}, "skip")


def test_a_mapped_column_that_is_not_there_is_named_as_the_user_wrote_it():
    with pytest.raises(
        DataError, match=r"no key 'qestion'; .* mean 'question'\?; correct data.columns: \{prompt: qestion\}"
    ):
        prompts(rows({"question": "Q"}), {"prompt": "qestion"})
    with pytest.raises(DataError, match=r"data\.jsonl:1: question: is empty"):
        prompts(rows({"question": ""}), {"prompt": "question"})


def test_duplicates_are_told_with_the_row_that_they_repeat_and_stay():
    made = demonstrations(rows(*[{"prompt": "Q", "completion": c, "id": i} for i, c in enumerate("AABA")]), {})
    told = ("data.jsonl:2 says the same as data.jsonl:1", "data.jsonl:4 says the same as data.jsonl:1")
    assert len(made) == 4 and made.duplicates == told
    assert made.summary() == f"4 rows, 2 duplicates (first: {'; '.join(told)})"
    pair, swapped = {"prompt": "Q", "chosen": "A", "rejected": "B"}, {"prompt": "Q", "chosen": "B", "rejected": "A"}
    assert preference_groups(rows(pair, swapped, {**pair, "margin": 2}), {}).duplicates == (
        "data.jsonl:3 says the same as data.jsonl:1",
    )


def test_a_summary_names_three_duplicates_however_many_there_are():
    made = prompts(rows(*[{"prompt": "Q"}] * 1000), {})
    assert re.fullmatch(r"1000 rows, 999 duplicates \(first: ([^;]*; ){2}[^;]*\)", made.summary())


def at(name, *values):
    return Records(tuple((f"{name}.jsonl:{number}", value) for number, value in enumerate(values, 1)))


def test_test_prompts_that_stand_in_the_training_data_are_found_by_row():
    pair = {"chosen": "A", "rejected": "B"}
    train = preference_groups(
        at(
            "train",
            {"prompt": "What is\n 2 + 2?", **pair},
            {"prompt": [SYSTEM, user("Sing")], "chosen": "La", "rejected": "No"},
            {"prompt": "what is 2 + 2?", "completions": ["4", "5"], "levels": [1, 0]},
        ),
        {},
    )
    test = preference_groups(
        at(
            "test",
            {"prompt": "What is 2 + 3?", **pair},
            {"prompt": [user("What is 2 + 2?")], **pair},
            {"prompt": [user("Sing")], **pair},
            {"prompt": [SYSTEM, user("sing ")], **pair},
            {"prompt": "WHAT IS 2 + 2?", "chosen": "C", "rejected": "D"},
        ),
        {},
    )
    found = ("test.jsonl:2, as train.jsonl:1", "test.jsonl:4, as train.jsonl:2", "test.jsonl:5, as train.jsonl:1")
    assert leaked(train, test) == found
    (note,) = leak_notes("test", train, test)
    assert note.startswith(f"test: 3 of 5 prompts stand in the training data (first: {'; '.join(found)})")
    assert leaked(train, preference_groups(at("test", {"prompt": "Other", **pair}), {})) == ()
    assert leak_notes("test", train, preference_groups(at("test", {"prompt": "Other", **pair}), {})) == []


def test_leaks_are_found_across_kinds_of_data_and_plain_text_has_no_prompt_to_leak():
    learnt = demonstrations(at("sft", {"text": "Once"}, {"prompt": "Q", "completion": "A"}), {})
    assert leaked(learnt, prompts(at("test", {"prompt": "Once"}, {"prompt": "q"}), {})) == (
        "test.jsonl:2, as sft.jsonl:2",
    )
    assert leaked(learnt, demonstrations(at("test", {"text": "Twice"}), {})) == ()


def test_places_are_those_of_the_rows_that_are_left():
    made = prompts(rows({"prompt": "Q"}, {"prompt": ""}, {"prompt": "R"}), {}, "skip")
    assert made.places == ("data.jsonl:1", "data.jsonl:3")


def test_the_summary_counts_what_files_and_records_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q"}\nnonsense\n{"prompt": ""}\n')
    made = prompts(load_rows(path=tmp_path / "a.jsonl", on_bad_row="skip"), {}, "skip")
    assert re.fullmatch(r"1 rows, 2 skipped \(first: .*a\.jsonl:2: column 1: .*\)", made.summary())


def test_ds_chats_local_json_is_read_as_it_is(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"prompt": "Human: Hi Assistant:", "chosen": " Hello", "rejected": " Go away"}]))
    (group,) = preference_groups(load_rows(path=path), {})
    assert (group.prompt, group.completions) == ("Human: Hi Assistant:", (" Hello", " Go away"))


def test_turns_in_sharegpts_words_are_turns():
    row = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
    }
    (plain,) = demonstrations(rows(row), {"messages": "conversations"})
    assert (plain.prompt, plain.completion, plain.columns) == ([user("Hi")], "Hello", {"system": "Be brief."})
    (after,) = demonstrations(rows(row), {"messages": "conversations", "system": "system"})
    assert after.prompt == [SYSTEM, user("Hi")]
    with pytest.raises(DataError, match="message 1 has the role 'bot'"):
        demonstrations(rows({"messages": [{"from": "bot", "value": "Hi"}]}), {})


def test_a_finished_conversation_is_a_prompt_and_its_solution():
    row = {"messages": [user("2+2?"), assistant("So \\boxed{4}")], "id": 3}
    (prompt,) = prompts(rows(row), {})
    assert (prompt.text, prompt.columns) == ([user("2+2?")], {"solution": "So \\boxed{4}", "id": 3})
    (own,) = prompts(rows({**row, "solution": "4"}), {})
    assert own.columns["solution"] == "4"
    (asked,) = prompts(rows({**row, "prompt": "2+3?"}), {})
    assert asked.text == "2+3?" and "solution" not in asked.columns
    (later,) = prompts(rows({"messages": [user("Hi"), assistant("Yes?"), *row["messages"]]}), {})
    assert later.text == [user("Hi"), assistant("Yes?"), user("2+2?")]
    assert later.columns["solution"] == "So \\boxed{4}"


def test_a_mapped_system_column_stands_before_every_kind_of_prompt():
    said = {"said": "Be brief."}
    columns = {"system": "said"}
    assert prompts(rows({"prompt": "Hi", **said}), columns)[0].text == [SYSTEM, user("Hi")]
    assert prompts(rows({"prompt": [user("Hi")], **said}), columns)[0].text == [SYSTEM, user("Hi")]
    assert prompts(rows({"prompt": [user("Hi")], "said": " "}), columns)[0].text == [user("Hi")]
    group = preference_groups(rows({"chosen": "Hi Ann", "rejected": "Hi Bob", **said}), columns)[0]
    assert (group.prompt, group.completions) == ([SYSTEM, user("Hi")], (" Ann", " Bob"))
    with pytest.raises(DataError, match="said: is a number"):
        prompts(rows({"prompt": "Hi", "said": 1}), columns)


def test_prompts_become_conversations_where_asked():
    def made(*values, **how):
        return in_turns(prompts(Records(rows(*values).items), {}), **how)

    assert made({"prompt": "Hi"}, chat=False, system=None)[0].text == "Hi"
    assert made({"prompt": "Hi"}, chat=True, system=None)[0].text == [user("Hi")]
    assert made({"prompt": "Hi"}, chat=True, system="Be brief.")[0].text == [SYSTEM, user("Hi")]
    own = [{"role": "system", "content": "Be long."}, user("Hi")]
    assert made({"prompt": own}, chat=False, system="Be brief.")[0].text == own
    with pytest.raises(DataError, match=r"data.jsonl:1: prompt: is a string.*set data.chat: true"):
        made({"prompt": "Hi"}, chat=False, system="Be brief.")
    with pytest.raises(DataError, match="no prompt to make a turn of"):
        in_turns(demonstrations(rows({"text": "Hi"}), {}), chat=True, system=None)
    (shown,) = in_turns(demonstrations(rows({"prompt": "Hi", "completion": "Hello"}), {}), chat=True, system=None)
    assert (shown.prompt, shown.completion) == ([user("Hi")], "Hello")

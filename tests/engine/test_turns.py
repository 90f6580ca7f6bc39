"""Conversations with an environment: what is sampled, heard and read, by a real engine, and what a broken one does."""

import importlib.util
import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from rollout_servers import serving
from tiny import FALLBACKS, FAMILIES, SIZES, engine_of, ragged
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM

from agrpo.config import EnvironmentConfig, RolloutConfig
from agrpo.engine.backends.native import Sampling
from agrpo.engine.calls import Failed, call_together
from agrpo.engine.turns import Conversations, EnvironmentFailed
from agrpo.training.batches import Sequences
from agrpo.types import InputError, Prompt, Step

PROMPTS = [Prompt(f"p{slot}", tuple(ids), slot, {"row": slot}) for slot, ids in enumerate(ragged(9)[0])]
COUNTS = [4, 1, 3]
SAMPLING = Sampling(60, temperature=1.2, stop=("t2",))  # t2 and t20 to t29 end a turn, as the end token t1 does
KEY = (3, 7)


class Counting:
    """Answers the n-th turn with n + 1 tokens, and is done after some turns that its seed draws."""

    def reset(self, row, seed):
        self.row, self.turn, self.last = row["row"], 0, 1 + seed % 4

    def step(self, said):
        self.turn += 1
        observation = " ".join(f"t{20 * self.turn + n}" for n in range(self.turn + 1))
        return Step(observation, reward=0.5, done=self.turn == self.last)


def model(family="llama-tied"):
    torch.manual_seed(0)
    return {**FAMILIES, **FALLBACKS}[family]()


def talking(make=Counting, lm=None, engine=None, note=print, strict=False, **config):
    engine = engine or engine_of(lm or model(), max_sequences=3)
    engine.tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    how = EnvironmentConfig(target="agrpo.environments.calculator:Calculator", **config)
    return Conversations(engine, how, make, engine.tokenizer, note=note, strict=strict)


def sequences(rollout):
    """Of each completion: its own tokens and, by its gaps, what was heard before each, one after the other."""
    tokens, gaps, heard = rollout.tokens.tolist(), rollout.gaps.tolist(), rollout.heard.tolist()
    found = []
    for length in rollout.lengths.tolist():
        row = []
        for _ in range(length):
            gap = gaps.pop(0)
            row += [(heard.pop(0), False) for _ in range(gap)]
            row.append((tokens.pop(0), True))
        found.append(row)
    assert not heard and not gaps and not tokens
    return found


@pytest.fixture(scope="module")
def talked():
    speaker = talking()
    return speaker, speaker.generate(PROMPTS, COUNTS, SAMPLING, KEY)


def test_a_conversation_is_its_turns_token_by_token(talked):
    _, rollout = talked
    assert rollout.group.tolist() == [0] * 4 + [1] + [2] * 3
    several = 0
    for n, row in enumerate(sequences(rollout)):
        turns, expected = rollout.turns[n], []
        for number, turn in enumerate(turns):
            ids = [int(word) for word in turn["content"].replace(" ", "").split("t")[1:]]
            own = turn["role"] == "assistant"
            cut = number == len(turns) - 1 and own  # the length limit ended it
            by_string = bool(ids) and (ids[-1] == 2 or 20 <= ids[-1] < 30)
            expected += [(i, own) for i in ids] + [(1, True)] * (own and not cut and not by_string)
        while not expected[-1][1]:  # nobody reads what comes after the last turn
            expected.pop()
        assert [one for one in row if one != (0, True)] == expected  # t0 is padding, and in no text
        answers = [turn["content"] for turn in turns if turn["role"] == "tool"]
        assert answers == [" ".join(f"t{20 * k + i}" for i in range(k + 1)) for k in range(1, len(answers) + 1)]
        assert rollout.outcomes[n] == 0.5 * len(answers)
        assert rollout.finished[n] == (turns[-1]["role"] == "tool")
        several += len(answers) > 1
    assert several >= 3 and rollout.finished.any()
    assert len(rollout.gaps) == len(rollout.tokens) == len(rollout.logp) == int(rollout.lengths.sum())


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-tied", "gpt2"])
def test_log_probabilities_of_sampling_are_the_training_forwards(family):
    speaker = talking(lm=model(family))
    rollout = speaker.generate(PROMPTS, COUNTS, SAMPLING, KEY)
    assert len(rollout.heard) > 10
    layout = Sequences.of_rollout(rollout).layout(range(len(PROMPTS)))
    logp, _ = speaker.samples.evaluate(layout, SAMPLING.temperature)
    assert ((logp - rollout.logp).exp() - 1).abs().max() < 1e-4


def test_a_conversation_depends_on_its_own_prompt_and_number_alone(talked):
    speaker, whole = talked
    parts = [
        speaker.generate(PROMPTS[:1], [2], SAMPLING, KEY),
        speaker.generate(PROMPTS[:1], [2], SAMPLING, KEY, first=2),
        speaker.generate(PROMPTS[1:], [1, 3], SAMPLING, KEY),
    ]
    assert [turns for part in parts for turns in part.turns] == list(whole.turns)
    assert torch.cat([part.tokens for part in parts]).tolist() == whole.tokens.tolist()
    other = speaker.generate(PROMPTS, COUNTS, SAMPLING, (3, 8))
    assert other.turns != whole.turns


def test_servers_and_the_native_sampler_have_the_same_conversations(talked):
    rollout = RolloutConfig(backend="server", servers={"urls": [serving(model())[0], serving(model())[0]]})
    theirs = talking(engine=engine_of(model(), rollout=rollout)).generate(PROMPTS, COUNTS, SAMPLING, KEY)
    mine = talked[1]
    assert theirs.turns == mine.turns and theirs.tokens.tolist() == mine.tokens.tolist()
    assert theirs.gaps.tolist() == mine.gaps.tolist() and theirs.heard.tolist() == mine.heard.tolist()
    torch.testing.assert_close(theirs.logp, mine.logp, atol=1e-5, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_takes_turns_and_its_log_probabilities_are_the_training_forwards():
    torch.manual_seed(0)
    heads = {**SIZES, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # the least on a CPU
    lm = LlamaForCausalLM(LlamaConfig(**heads, tie_word_embeddings=False))
    rollout = RolloutConfig(backend="vllm", max_sequences=16)
    speaker = talking(engine=engine_of(lm, rollout=rollout, longest=160))
    talked = speaker.generate(PROMPTS, COUNTS, SAMPLING, KEY)
    sequences(talked)
    assert len(talked.heard) > 10 and talked.finished.any()
    layout = Sequences.of_rollout(talked).layout(range(len(PROMPTS)))
    logp, _ = speaker.samples.evaluate(layout, SAMPLING.temperature)
    assert ((logp - talked.logp).exp() - 1).abs().max() < 1e-4


@pytest.mark.parametrize("limit", [1, 5, 12, 30])
def test_nothing_is_longer_than_the_limit_and_what_it_cuts_is_not_finished(limit):
    rollout = talking().generate(PROMPTS, [8] * 3, replace(SAMPLING, max_completion_length=limit), KEY)
    whole = talking().generate(PROMPTS, [8] * 3, SAMPLING, KEY)
    for n, (row, longer) in enumerate(zip(sequences(rollout), sequences(whole), strict=True)):
        assert 1 <= len(row) <= limit and row == longer[: len(row)]
        if rollout.finished[n]:
            assert row == longer
    assert not rollout.finished.all()


def test_the_number_of_turns_is_bounded():
    class Endless(Counting):
        def step(self, said):
            return Step("t5", reward=1.0)

    rollout = talking(Endless, max_turns=2).generate(PROMPTS, COUNTS, SAMPLING, KEY)
    spoken = [[turn["role"] for turn in turns].count("assistant") for turns in rollout.turns]
    assert max(spoken) == 2 and not rollout.finished.any()
    assert rollout.outcomes.max() == 2  # the last turn is answered too


def test_a_conversation_in_turns_goes_on_through_the_chat_template():
    engine = engine_of(model())
    engine.tokenizer.chat_template = (
        "{% for m in messages %}{{ ('t2 ' if m['role'] == 'user' else 't3 ') + m['content'] + ' t1 ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 't4' }}{% endif %}"
    )
    prompt = Prompt([{"role": "user", "content": "t9"}], (2, 9, 1, 4), 0, {"row": 0})
    rollout = talking(engine=engine).generate([prompt], [60], Sampling(60, stop=("t7",)), KEY)
    assert all(
        turn["role"] == ("user", "assistant")[n % 2 == 0] for turns in rollout.turns for n, turn in enumerate(turns)
    )
    kinds = set()
    for row in sequences(rollout):
        first = next((n for n, (_, own) in enumerate(row) if not own), None)
        if first is not None:
            ended = row[first - 1] == (1, True)
            kinds.add(ended)
            between = [2, 20, 21, 1, 4] if ended else [1, 2, 20, 21, 1, 4]  # the end token stands in both
            assert row[first : first + len(between)] == [(token, False) for token in between]
            assert row[first + len(between)][1]
    assert kinds == {True, False}


class Breaking(Counting):
    """Fails on the second prompt in some way."""

    how = "raise"

    def step(self, said):
        if self.row != 1:
            return super().step(said)
        if self.how == "raise":
            raise KeyError("no such door")
        if self.how == "exit":
            raise SystemExit(0)
        if self.how == "hang":
            HANGING.wait()
        return {"tuple": ("t5", 1.0, False), "nan": Step("t5", reward=math.nan), "nothing": Step()}[self.how]


HANGING = threading.Event()
REASONS = {
    "raise": "KeyError: 'no such door'",
    "exit": "SystemExit: 0",
    "hang": "no answer within 0.3 s",
    "tuple": "TypeError: step gave a tuple, not an agrpo.types.Step",
    "nan": "ValueError: step gave the reward nan, not a finite number",
    "nothing": "ValueError: step gave no observation, and the conversation is not done",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_broken_environment_costs_its_own_conversation_and_is_named(how):
    told = []
    make = type("Own", (Breaking,), {"how": how})
    timeout = 0.3 if how == "hang" else 30.0
    rollout = talking(make, note=told.append, timeout_s=timeout).generate(PROMPTS, [3, 3, 3], SAMPLING, KEY)
    HANGING.set()
    assert rollout.outcomes.isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert int(rollout.lengths.min()) >= 1 and not rollout.finished[3:6].any()
    assert len(told) == 3 and told[2].endswith("further ones are only counted, in environment/errors")
    for n, line in enumerate(told):
        where = (
            f"environment agrpo.environments.calculator:Calculator: step failed on the prompt 'p1' (slot 1, sample {n})"
        )
        assert line.startswith(f"{where}: {REASONS[how]}; nothing is learnt")
    with pytest.raises(EnvironmentFailed, match="'p1'"):
        talking(make, note=told.append, strict=True, timeout_s=timeout).generate(PROMPTS, [1, 1, 1], SAMPLING, KEY)
    HANGING.clear()


def test_a_run_ends_where_no_conversation_comes_to_an_end_or_calls_hang_again_and_again():
    class Never(Counting):
        def reset(self, row, seed):
            return "the first observation"

    with pytest.raises(
        EnvironmentFailed, match=r"all 8 conversations failed.*the first observation is the row's prompt"
    ):
        talking(Never, note=lambda text: None).generate(PROMPTS, COUNTS, SAMPLING, KEY)

    class Hanging(Counting):
        def step(self, said):
            HANGING.wait()

    with pytest.raises(EnvironmentFailed, match="9 calls hang by now"):
        talking(Hanging, timeout_s=0.05, note=lambda text: None).generate(PROMPTS, [4] * 3, SAMPLING, KEY)
    HANGING.set()


def test_messages_behind_a_plain_prompt_are_refused():
    class Wrong(Counting):
        def step(self, said):
            return Step([{"role": "tool", "content": "t5"}])

    with pytest.raises(InputError, match="Calculator: answers a plain prompt with messages: give a string"):
        talking(Wrong).generate(PROMPTS, COUNTS, SAMPLING, KEY)


def test_calls_run_together_in_order_and_late_ones_are_left_behind():
    running, most, lock, free = [0], [0], threading.Lock(), threading.Event()

    def call(number):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        if number == 4:
            free.wait()
        if number == 2:
            raise ValueError("two")
        return number

    calls = [lambda n=n: call(n) for n in range(9)]
    expected = [0, 1, Failed("ValueError: two"), 3, Failed("no answer within 0.4 s", hung=True), 5, 6, 7, 8]
    assert call_together(calls, 0.4, concurrency=3) == expected and most[0] == 3
    assert call_together(calls[:3], 0.4, concurrency=1) == expected[:3]
    assert call_together([], 0.4, concurrency=1) == []
    free.set()

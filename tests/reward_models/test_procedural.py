"""Procedural tasks through the pool: the tasks' own answers score 1, others less, and a bad entry abstains."""

import json

import pytest

from reward_models.rules import reasoning_gym

library = pytest.importorskip("reasoning_gym")
TASKS = ["chain_sum", "countdown", "spell_backward", "leg_counting", "arc_agi", "knights_knaves"]


@pytest.mark.parametrize("as_json", [True, False])
def test_own_answers_score_one_in_tags_or_bare_and_another_row_s_answer_does_not(as_json):
    entries = [entry for task in TASKS for entry in library.create_dataset(task, size=2, seed=5)]
    rows = [json.dumps(entry) if as_json else entry for entry in entries]
    answers = [entry["answer"] for entry in entries]
    tagged = [f"<think>17</think>\n<answer>{answer}</answer>" for answer in answers]
    assert reasoning_gym([""] * len(rows), tagged, entry=rows) == [1.0] * len(rows)
    assert reasoning_gym([""] * len(rows), [f" {answer}\n" for answer in answers], entry=rows) == [1.0] * len(rows)
    other = [f"<answer>{answer}</answer>" for answer in answers[2:] + answers[:2]]
    assert max(reasoning_gym([""] * len(rows), other, entry=rows)) < 0.5


def test_what_is_no_entry_of_a_known_task_abstains():
    entry = dict(library.create_dataset("chain_sum", size=1, seed=1)[0])
    unknown = {**entry, "metadata": {**entry["metadata"], "source_dataset": "no_such_task"}}
    rows = [entry, None, "", "{", "[]", "4", {"answer": "4"}, unknown, json.dumps(unknown), entry]
    scores = reasoning_gym([""] * 10, [f"<answer>{entry['answer']}</answer>"] * 10, entry=rows)
    assert scores == [1.0] + [None] * 8 + [1.0]


def test_hostile_answers_leave_honest_scores_alone():
    entry = dict(library.create_dataset("countdown", size=1, seed=2)[0])
    hostile = ["9**9**9**9**9", "(" * 5000, "x" * 3_000_000, "__import__('os')._exit(1)", "\ud800"]
    completions = [f"<answer>{text}</answer>" for text in [*hostile, entry["answer"]]]
    scores = reasoning_gym([""] * 6, completions, entry=[entry] * 6)
    assert scores[-1] == 1.0 and max(scores[:-1]) < 0.1


def test_a_verifier_that_fails_on_the_answer_scores_it_zero_and_one_that_fails_on_its_entry_abstains():
    entry = library.create_dataset("prime_factorization", size=1, seed=2)[0]
    broken = {"answer": "1", "metadata": {"source_dataset": "n_queens"}}  # its verifier wants the board
    completions = [f"<answer>{answer}</answer>" for answer in ("x × x", entry["answer"], "1")]
    assert reasoning_gym([""] * 3, completions, entry=[entry, entry, broken]) == [0.0, 1.0, None]

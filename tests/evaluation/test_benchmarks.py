"""Every benchmark's rows become prompts that its grader can grade; what is wrong with a row is said."""

import base64
import json
import pickle
import zlib

import pytest

from agrpo.data.records import DataError
from agrpo.evaluation.benchmarks import BENCHMARKS, Benchmark, find_benchmark, read_benchmark, task_of
from agrpo.evaluation.livecodebench import cases_of, unpacked
from reward_models.loader import find_target, load_reward
from reward_models.rules.answers import vote

CASES = [{"input": "2\n3\n", "output": "5\n", "testtype": "stdin"}]
CALLS = [{"input": '[1, 2]\n"a"', "output": "true", "testtype": "functional"}]


def packed(cases):
    """As LiveCodeBench publishes its private cases."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


# A row with the columns that each data set has on the Hub, an answer that is right and one that is wrong.
ROWS = {
    "gsm8k": ({"question": "2 + 2?", "answer": "Two and two.\n#### 4"}, r"\boxed{4}", "5"),
    "math500": ({"problem": "1/2?", "answer": r"\frac{1}{2}", "subject": "Algebra"}, r"\boxed{0.5}", r"\boxed{2}"),
    "aime2024": ({"problem": "p", "answer": "204", "solution": "…", "year": "2024"}, r"\boxed{204}", r"\boxed{24}"),
    "amc2023": ({"question": "q", "answer": "27.0", "id": 0}, r"\boxed{27}", "28"),
    "livecodebench": (
        {
            "question_content": "Add two numbers.",
            "starter_code": "",
            "public_test_cases": json.dumps(CASES),
            "private_test_cases": packed([{**CASES[0], "input": "4\n4", "output": "8"}]),
            "metadata": "{}",
        },
        "```python\nprint(int(input()) + int(input()))\n```",
        "```python\nprint(5)\n```",
    ),
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_local_copy_of_a_benchmark_is_read_and_graded(tmp_path, name):
    row, right, wrong = ROWS[name]
    benchmark = BENCHMARKS[name]
    (prompt,) = read_benchmark(benchmark, path=write(tmp_path / "rows.jsonl", row))
    assert prompt.text[-1]["role"] == "user" and prompt.text[-1]["content"] != ""
    parameters = dict(benchmark.parameters_of_reward)
    reward = load_reward(benchmark.reward, parameters | ({"enabled": True} if name == "livecodebench" else {}))
    columns = {key: [value] * 2 for key, value in prompt.columns.items()}
    assert reward(prompts=[prompt.text] * 2, completions=[right, wrong], completion_ids=[[], []], **columns) == [1, 0]
    if benchmark.vote is not None:
        read = find_target(benchmark.vote)
        assert read(right, prompt.columns) != read(wrong, prompt.columns) is not None


def gpqa(n=0):
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    return {"Question": f"question {n}?", "Correct Answer": "right", **wrong}


def test_gpqas_choices_lie_in_an_order_that_the_question_decides(tmp_path):
    path = write(tmp_path / "rows.jsonl", *map(gpqa, range(40)))
    first, again = (read_benchmark(BENCHMARKS["gpqa_diamond"], path=path) for _ in range(2))
    letters = [row.columns["solution"] for row in first]
    assert letters == [row.columns["solution"] for row in again] and set(letters) == set("ABCD")
    for row in first:
        assert f"{row.columns['solution']}) right" in row.text[0]["content"]
        assert all(f"wrong {i}" in row.text[0]["content"] for i in (1, 2, 3))
    assert vote("The answer is (B).", first[letters.index("B")].columns) == "B"


def test_private_tests_are_read_without_running_the_pickle(tmp_path):
    assert unpacked(packed(CASES)) == CASES
    assert unpacked(json.dumps(CASES)) == CASES
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert unpacked(base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES), protocol))).decode()) == CASES

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    with pytest.raises(ValueError, match="pickle"):
        unpacked(base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode())
    assert not (tmp_path / "opened").exists()
    with pytest.raises(ValueError, match="private_test_cases"):
        unpacked("no base64!")


def test_calls_of_a_solution_become_assertions_that_hold_for_a_right_one():
    row = {
        "public_test_cases": json.dumps(CALLS),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": "first"}),
    }
    (test,) = cases_of(row)
    assert test == "assert Solution().first([1, 2], 'a') == True"
    reward = load_reward("reward_models.rules.code", {"enabled": True})
    right = (
        "```python\nclass Solution:\n    def first(self, numbers, word):\n        return len(numbers) > len(word)\n```"
    )
    wrong = right.replace(">", "<")
    assert reward(prompts=["", ""], completions=[right, wrong], tests=[[test], [test]]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="names the function"):
        cases_of({**row, "metadata": json.dumps({"func_name": "f(); import os"})})


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "q", "anwser": "4"}], {}, r"rows.jsonl:1: has no column 'answer', it has question, anwser; did"),
        ([{"question": "q", "answer": "4"}, {"question": "", "answer": "4"}], {}, r"rows.jsonl:2: prompt: is empty"),
        ([{"question": "q", "answer": "4"}, {"question": 7, "answer": "4"}], {}, r"rows.jsonl:2: prompt: is "),
        ([], {}, "holds no rows"),
        ([{"question": "q", "answer": "4"}], {"template": "no place"}, "--template"),
        ([{"question": "q", "answer": "4"}], {"chat": False, "system": "be brief"}, "--system"),
    ],
)
def test_bad_rows_are_told_with_their_place(tmp_path, rows, options, message):
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match=message) as caught:
        read_benchmark(BENCHMARKS["gsm8k"], path=path, **options)
    assert "data.on_bad_row" not in str(caught.value)


def test_bad_rows_are_skipped_and_told_where_asked(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", {"question": "q", "answer": "4"}, {"question": "q"}, {"question": "", "answer": "1"}
    )
    found = read_benchmark(BENCHMARKS["gsm8k"], path=path, skip_bad_rows=True)
    assert len(found) == 1 and len(found.skipped) == 2 and "rows.jsonl:2" in found.skipped[0]


def test_a_users_rows_stay_as_they_are_unless_asked(tmp_path):
    mine = Benchmark("mine", columns={"prompt": "q"}, chat=False)
    path = write(tmp_path / "rows.jsonl", {"q": "2+2=", "solution": "4"})
    (plain,) = read_benchmark(mine, path=path)
    assert plain.text == "2+2=" and plain.columns == {"solution": "4"}
    (asked,) = read_benchmark(mine, path=path, chat=True, system="Be brief.", template="{prompt} ?")
    assert asked.text == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2= ?"}]


def test_a_procedural_task_is_graded_by_its_own_verifier():
    pytest.importorskip("reasoning_gym")
    task = task_of("reasoning_gym:chain_sum")
    rows = read_benchmark(task, parameters={"size": 3})
    reward, read = load_reward(task.reward), find_target(task.vote)
    answers = [row.columns["answer"] for row in rows]
    scores = reward(
        prompts=["", "", ""], completions=[*answers[:2], "no"], entry=[row.columns["entry"] for row in rows]
    )
    assert scores[:2] == [1.0, 1.0] and scores[2] < 1
    assert read(f"so <answer> {answers[0]} </answer>", {}) == answers[0]


def test_names_are_forgiving_and_unknown_ones_have_a_neighbour():
    assert (
        find_benchmark("MATH-500").name == "math500"
        and find_benchmark("AIME 2024".replace(" ", "_")).name == "aime2024"
    )
    with pytest.raises(DataError, match="did you mean gsm8k"):
        find_benchmark("gsm8")


@pytest.mark.parametrize(
    ("completion", "solution", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", "1/2", "1/2"),
        ("so it is 0.50", "1/2", "1/2"),
        ("<answer>1,000</answer>", "1000", "1000"),
        ("The answer is C", "B", "C"),
        (r"\boxed{x^2}", "x^2", "x^2"),
        ("I do not know", "7", None),
        ("Monday", "tuesday", "monday"),
        ("", "7", None),
    ],
)
def test_votes_are_answers_as_the_rule_reads_them(completion, solution, expected):
    assert vote(completion, {"solution": solution}) == expected

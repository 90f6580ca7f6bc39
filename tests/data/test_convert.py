"""Published preference data become rows that stage 2 reads, split without a leak, or are refused by file and row."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrpo import cli
from agrpo.data.convert import convert, split
from agrpo.data.records import Records, leaked, preference_groups
from agrpo.data.sources import load_rows
from reward_models.rules import accuracy


def graded(question, answer, *solutions):
    """A row as GSM8K's model_solutions.jsonl has it; of each solution its last number and grade."""
    row = {"question": question, "ground_truth": f"It is {answer}.\nA: {answer}"}
    for number, (said, right) in enumerate(solutions):
        row[f"model_{number}"] = {"is_correct": right, "solution": f"So <<1*{said}={said}>>{said} apples\nA: {said}"}
    return row


def pair(*turns, chosen="Sure.", rejected="No."):
    shared = "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))
    return {key: f"{shared}\n\nAssistant: {said}" for key, said in (("chosen", chosen), ("rejected", rejected))}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(*values):
    return Records(tuple((f"data.jsonl:{number}", value) for number, value in enumerate(values, 1)))


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["agrpo", "preferences", "--convert", *map(str, arguments)])
    code = cli.main()
    return code, *capsys.readouterr()


def test_graded_solutions_become_ranked_groups_that_the_accuracy_rule_grades_alike():
    made = convert(
        rows(
            graded("Q1", "1,200", ("1200", True), ("12", False), ("1,200", True), ("12", False)),
            graded("Q2", "7", ("7", True), ("7", True)),
            graded("Q3", "7", ("8", False), ("9", False)),
            graded("Q4", "-3.50", ("3.5", False), ("-3.5", True)),
        ),
        "gsm8k",
    )
    assert not made.bad
    groups = preference_groups(Records(tuple(made.groups)), {})
    assert [(g.prompt, g.levels, g.columns) for g in groups] == [
        ("Q1", (1, 0, 1), {"solution": "1,200"}),
        ("Q4", (0, 1), {"solution": "-3.50"}),
    ]
    assert made.left_out == {
        "solutions that repeat another one of their question": 2,
        "questions with right solutions only": 1,
        "questions with wrong solutions only": 1,
    }
    for group in groups:
        solution = [group.columns["solution"]] * len(group.completions)
        assert accuracy([""] * len(solution), group.completions, solution=solution) == list(map(float, group.levels))


def test_transcripts_become_conversations_of_turns_that_alternate():
    twice = pair("Hi", "Yes?\n\nAssistant: Hello?", "Sing,\n\nplease", chosen="La", rejected="No\n\nAssistant: Never")
    made = convert(rows(pair("Hi"), twice, pair("Hi")), "hh")
    assert not made.bad and made.left_out == {"rows that repeat an earlier one": 1}
    first, second = preference_groups(Records(tuple(made.groups)), {})
    assert first.prompt == [{"role": "user", "content": "Hi"}] and first.completions == ("Sure.", "No.")
    assert [(turn["role"], turn["content"]) for turn in second.prompt] == [
        ("user", "Hi"),
        ("assistant", "Yes?\n\nHello?"),
        ("user", "Sing,\n\nplease"),
    ]
    assert second.completions == ("La", "No\n\nNever") and second.levels == (1, 0)


BAD = [
    (
        "gsm8k",
        {"question": "Q", "answer": "1"},
        "no key 'ground_truth'; it has question, answer; is this the right form?",
    ),
    ("gsm8k", {**graded("", "1", ("1", True))}, "question: is empty; fill it"),
    ("gsm8k", {**graded("Q", "1", ("1", True)), "ground_truth": "It is 1."}, "ground_truth: does not end in 'A: …'"),
    ("gsm8k", graded("Q", "1"), "no graded solution in question, ground_truth; a column such as"),
    ("gsm8k", {**graded("Q", "1"), "m": {"is_correct": 1, "solution": "1"}}, "m: is_correct: is 1; give true or false"),
    ("gsm8k", {**graded("Q", "1"), "m": {"is_correct": True}}, "m: no key 'solution'; it has is_correct"),
    ("gsm8k", {**graded("Q", "1"), "m": {"is_correct": True, "solution": " "}}, "m: solution: is empty; fill it"),
    ("gsm8k", graded("Q", "1", ("1", True), ("1", False)), "model_1: solution: is graded right and wrong in one row"),
    ("hh", {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho"}, "no key 'rejected'; it has chosen"),
    ("hh", {**pair("Hi"), "rejected": 4}, "rejected: is int, not a string; fill it"),
    ("hh", pair("Hi", chosen="A", rejected="A"), "rejected: is identical to chosen; give two different answers"),
    ("hh", pair("Hi", rejected=" "), "rejected: turn 2 is empty; fill it"),
    ("hh", pair(" "), "chosen: turn 1 is empty; fill it"),
    ("hh", {**pair("Hi"), "rejected": pair("Ho")["rejected"]}, "rejected: differs from chosen before the last turn"),
    ("hh", {**pair("Hi"), "chosen": "Human: Hi Assistant: Ho"}, "chosen: does not begin with '\\n\\nHuman:'"),
    ("hh", {**pair("Hi"), "chosen": "\n\nAssistant: Hi"}, "chosen: does not begin with '\\n\\nHuman:'"),
    ("hh", {**pair("Hi"), "chosen": "Note.\n\nHuman: Hi\n\nAssistant: Ho"}, "chosen: does not begin with"),
    (
        "hh",
        {**pair("Hi"), "chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: Hm"},
        "chosen: ends with the human's turn",
    ),
]
GOOD = {"gsm8k": graded("Good?", "1", ("1", True), ("2", False)), "hh": pair("Good?")}


@pytest.mark.parametrize("form, row, message", BAD, ids=[message for *_, message in BAD])
def test_a_bad_row_is_named_and_the_others_are_read(form, row, message):
    made = convert(rows(GOOD[form], row, GOOD[form]), form)
    (told,) = made.bad
    assert told.startswith(f"data.jsonl:2: {message}") and len(made.groups) == 1


@given(st.lists(st.text(max_size=4), min_size=1, max_size=3), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_one_opening_is_on_one_side_and_more_held_out_only_adds(turns, a, b):
    asked = [{"role": "user", "content": turn} for turn in turns]
    low, high = sorted((a, b))
    assert split({"prompt": asked}, a) == split({"prompt": asked[:1]}, a) == split({"prompt": f" {turns[0]}\n"}, a)
    assert (split({"prompt": asked}, low), split({"prompt": asked}, high)) != ("test", "train")


def test_the_share_that_is_held_out_is_about_the_one_asked_for():
    sides = Counter(split({"prompt": f"Question {number}?"}, 0.1) for number in range(4000))
    assert 320 < sides["test"] < 480  # 400 expected; the deviation is 19


def test_the_command_writes_what_stage_2_reads_and_nothing_leaks(tmp_path, monkeypatch, capsys):
    source = [graded(f"How many  of {n}?", "1", ("1", True), ("2", False)) for n in range(200)]
    source += [graded(f"how many of {n}?", "1", ("3", False), ("1", True)) for n in range(0, 200, 2)]
    out = tmp_path / "new" / "graded"
    code, said, _ = run(monkeypatch, capsys, "gsm8k", lines(tmp_path / "in.jsonl", source), out, "--held-out", "0.2")
    assert code == 0
    train, test = (
        preference_groups(load_rows(path=out, split=split), {}) for split in ("train", "test")
    )  # as data: {path: out}
    assert len(train) + len(test) == 300 and 20 < len(test) < 100
    assert leaked(train, test) == ()
    assert f"{out / 'train.jsonl'}: {len(train)} groups\n{out / 'test.jsonl'}: {len(test)} groups\n" in said
    written = {name: (out / name).read_bytes() for name in ("train.jsonl", "test.jsonl")}
    assert sorted(path.name for path in out.iterdir()) == sorted(written)

    lines(tmp_path / "in.jsonl", source[::-1])  # the order of the rows changes no row's side
    assert run(monkeypatch, capsys, "gsm8k", tmp_path / "in.jsonl", out, "--held-out", "0.2")[0] == 0
    for name, before in written.items():
        assert sorted((out / name).read_bytes().splitlines()) == sorted(before.splitlines())


def test_bad_rows_stop_the_conversion_unless_they_are_to_be_skipped(tmp_path, monkeypatch, capsys):
    source = tmp_path / "pairs.jsonl.gz"
    good = [pair(f"Question {number}?") for number in range(60)]
    text = "".join(json.dumps(row) + "\n" for row in [*good, pair("Hi", rejected="")]) + "nonsense\n"
    source.write_bytes(gzip.compress(text.encode()))
    out = tmp_path / "out"
    code, _, said = run(monkeypatch, capsys, "hh", source, out)
    assert code == 2 and not out.exists()
    assert f"{source}:61: rejected: turn 2 is empty" in said and f"{source}:62: column 1: not JSON" in said
    assert said.endswith(f"error: {source}: 2 bad rows; mend them, or leave them out with --on-bad-row skip\n")

    code, said, told = run(monkeypatch, capsys, "hh", source, out, "--on-bad-row", "skip", "--json")
    counts = json.loads(said)
    assert code == 0 and counts["train"] + counts["test"] == 60 and counts["bad"] == 2 and f"{source}:61" in told
    assert len(load_rows(path=out / "test.jsonl")) == counts["test"]


def test_a_file_of_another_form_names_some_rows_and_not_thousands(tmp_path, monkeypatch, capsys):
    source = lines(tmp_path / "in.jsonl", [{"question": "Q", "answer": "A"}] * 500)
    code, _, said = run(monkeypatch, capsys, "hh", source, tmp_path / "out")
    assert code == 2 and len(said.splitlines()) == 22 and "bad row: 480 more\n" in said


def test_an_empty_split_is_refused_and_what_stood_there_stays(tmp_path, monkeypatch, capsys):
    source = lines(tmp_path / "in.jsonl", [pair("Hi")])
    lines(tmp_path / "test.jsonl", [{"old": True}])
    code, _, said = run(monkeypatch, capsys, "hh", source, tmp_path)
    assert code == 2 and "of 1 groups none is for" in said
    assert (tmp_path / "test.jsonl").read_text() == '{"old": true}\n'


@pytest.mark.parametrize("arguments", [("tulu", "a", "b"), ("hh", "a"), ("hh", "a", "b", "--held-out", "1")])
def test_a_wrong_command_line_exits_2(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, *arguments)
    assert stopped.value.code == 2


def test_a_missing_file_exits_2_at_once_and_nothing_heavy_is_imported(tmp_path):
    program = (
        "import sys; from agrpo import cli; sys.argv[1:] = ['preferences', '--convert', 'hh', 'nowhere.jsonl', 'out'];"
        "code = cli.main(); print(code, [m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n" and "nowhere.jsonl: no such file" in done.stderr

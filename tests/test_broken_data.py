"""Data that cannot be used ends a stage with exit code 2 and says file, row or key, and the mend."""

import json

import pytest
from stage_runs import launch, run_tiny, tiny

GOOD = {
    "sft": {"prompt": "3+4=", "completion": "<answer>7</answer>", "solution": "7"},
    "reward": {"prompt": "3+4=", "chosen": "<answer>7</answer>", "rejected": "<answer>8</answer>"},
    "agrpo": {"prompt": "3+4=", "solution": "7"},
}

# what is wrong: (stage, the file's lines, what the message must say)
BROKEN = {
    "missing column": ("agrpo", [{"question": "3+4=", "solution": "7"}], ["data.jsonl:65", "'prompt'", "data.columns"]),
    "invalid JSON": (
        "sft",
        ['{"prompt": "3+4=", "completion": "7"'],
        ["data.jsonl:65", "not JSON", "one whole object"],
    ),
    "empty completion": (
        "sft",
        [{**GOOD["sft"], "completion": " "}],
        ["data.jsonl:65: completion: is empty", "fill it"],
    ),
    "chosen is rejected": (
        *("reward", [{**GOOD["reward"], "rejected": "<answer>7</answer>"}]),
        ["data.jsonl:65: rejected: is identical to chosen", "give two different"],
    ),
    "fewer rows than a batch": (
        "sft",
        3,
        ["training.batch_size: 16", "the 3 demonstrations", "lower it or bring more"],
    ),
}


@pytest.mark.parametrize(("stage", "lines", "says"), BROKEN.values(), ids=BROKEN)
def test_broken_data_exit_2_and_say_where_and_what_to_do(stage, lines, says, tmp_path):
    file = tmp_path / "data.jsonl"
    content = [GOOD[stage]] * lines if isinstance(lines, int) else [*[GOOD[stage]] * 64, *lines]
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in content))
    model = []
    if stage != "sft":
        (tmp_path / "model").mkdir()
        model = [f"model.name_or_path={tmp_path / 'model'}"]
    run = tmp_path / "run"
    data = ["data.source=null", "data.parameters={}", f"data.path={file}"]
    done = launch(stage, *tiny(stage, run, *model, *data))
    assert done.returncode == 2, done.stderr
    for words in says:
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / stage / "model").exists() and not (run / "summary.json").exists()


def test_rows_over_the_limit_are_counted_and_may_leave_too_few_for_a_batch(tmp_path):
    file, run = tmp_path / "data.jsonl", tmp_path / "run"
    long = {"prompt": "+".join("1" * 30) + "=", "completion": "30", "solution": "30"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [GOOD["sft"]] * 16 + [long] * 3))
    own = ["data.source=null", "data.parameters={}", f"data.path={file}", "max_length=20"]
    test = ["evaluation.data=null", "evaluation.test={path: " + str(file) + "}"]
    directory = run_tiny("sft", run, *own, *test, "training.max_steps=1")
    log = (directory / "log.txt").read_text()
    assert "left out 3 of 19 demonstrations: longer than 20 tokens (the longest: 63)" in log
    assert "left out 3 of 19 prompts: longer than 20 tokens (the longest: 60)" in log

    done = launch("sft", *tiny("sft", run, *own, "training.batch_size=17"))
    assert done.returncode == 2, done.stderr
    assert "training.batch_size: 17 is more than the 16 demonstrations" in done.stderr

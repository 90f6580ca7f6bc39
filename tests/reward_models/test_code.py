"""The code reward: right programs score 1, wrong ones less, and none scores by anything but right answers."""

import json
import os
import time
from pathlib import Path

import pytest

from reward_models.compose import RewardSet
from reward_models.loader import RewardError, load_reward
from reward_models.rules import code
from reward_models.rules.code import Case, program, read_tests
from reward_models.sandbox import Room, SandboxError, interpreter, landlock, why_unavailable

SQUARE = ["assert square(2) == 4", "assert square(-3) == 9", "assert square(0) == 0", "assert square(1.5) == 2.25"]
RIGHT = "def square(x):\n    return x * x"
HALF_RIGHT = "def square(x):\n    return x * 2"  # 2 and 0
DOUBLE = [{"input": f"{n}\n", "output": f"{2 * n}\n"} for n in (1, 5, -7)]
DOUBLING = "print(2 * int(input()))"


@pytest.fixture(scope="module")
def isolation():
    if (reason := why_unavailable()) is not None:
        pytest.skip(f"no sandbox here: {reason}")


@pytest.fixture(scope="module")
def share(isolation):
    return code(enabled=True, deadline_s=2.0, workers=2)


@pytest.fixture(scope="module")
def impatient(isolation):
    return code(enabled=True, deadline_s=0.7, workers=2)


@pytest.fixture(scope="module")
def strict(isolation):
    return code(enabled=True, deadline_s=2.0, workers=2, all_or_nothing=True)


def score(reward, source, tests, **columns):
    columns = {name: [value] for name, value in columns.items()}
    return reward([""], [source], tests=[tests], **columns)[0]


def test_it_is_off_unless_asked_for_and_says_how():
    for target in ("reward_models.rules.code", "reward_models.rules:code"):
        with pytest.raises(RewardError, match=r"executes programs that a model wrote.*enabled: true"):
            load_reward(target)
        for no in (False, None, "yes", 1):
            with pytest.raises(RewardError, match="off unless asked for"):
                load_reward(target, {"enabled": no})
    with pytest.raises(RewardError, match="did you mean 'deadline_s'"):
        load_reward("reward_models.rules.code", {"enabled": True, "deadline": 3})


def test_asked_for_it_is_made_from_its_import_path(isolation):
    for target in ("reward_models.rules.code", "reward_models.rules:code"):
        assert isinstance(load_reward(target, {"enabled": True}), code)


@pytest.mark.parametrize("limit", [{"deadline_s": 0}, {"deadline_s": "5"}, {"memory_mb": 1}, {"workers": 0}])
def test_senseless_limits_are_refused(limit):
    with pytest.raises(RewardError, match="code"):
        code(enabled=True, **limit)


def test_it_does_not_start_where_isolation_is_missing(monkeypatch):
    def missing():
        raise landlock.LandlockError("no Landlock (Operation not supported)")

    monkeypatch.setattr(landlock, "version", missing)
    with pytest.raises(RewardError, match=r"without isolation: .*Landlock"):
        code(enabled=True)


@pytest.mark.parametrize("as_text", [False, True])
def test_asserts_are_scored_by_the_share_that_passes(share, strict, as_text):
    tests = "\n".join(SQUARE) if as_text else SQUARE
    for reward, of_half in ((share, 0.5), (strict, 0.0)):
        assert score(reward, RIGHT, tests) == 1.0
        assert score(reward, HALF_RIGHT, tests) == of_half
        assert score(reward, "def square(x): return None", tests) == 0.0


@pytest.mark.parametrize("as_json", [False, True])
def test_cases_are_scored_by_what_is_printed(share, strict, as_json):
    tests = json.dumps(DOUBLE) if as_json else DOUBLE
    for reward, of_one in ((share, 1 / 3), (strict, 0.0)):
        assert score(reward, DOUBLING, tests) == 1.0
        assert score(reward, "print(1 + int(input()))", tests) == pytest.approx(of_one)
        assert score(reward, "print(0)", tests) == 0.0


def test_white_space_at_the_ends_of_lines_does_not_count_and_inside_it_does(share):
    case = [{"input": "", "output": "1 2\n3\n"}]
    assert score(share, "print('1 2 '); print('3\\n')", case) == 1.0
    assert score(share, "print('1  2'); print(3)", case) == 0.0
    assert score(share, "print('1 2 3')", case) == 0.0


def test_a_right_print_before_a_crash_is_wrong_and_before_an_exit_is_right(share):
    case = [{"input": "", "output": "1"}]
    assert score(share, "print(1)\nraise ValueError", case) == 0.0
    assert score(share, "import sys; print(1); sys.exit(3)", case) == 0.0
    assert score(share, "import sys; print(1); sys.exit()", case) == 1.0


HUMAN_EVAL = """
METADATA = {"author": "x"}

def check(candidate):
    assert candidate([1.0, 2.0], 0.5) == False
    assert candidate([1.0, 1.2], 0.5) == True, "close"
    assert abs(candidate([], 1.0) - 0.0) < 1e-6
    assert True, "This prints if this assert fails 1 (good for debugging!)"
"""
LOOPS = """
import random

def check(candidate):
    for _ in range(20):
        x = random.random()
        assert candidate([x, x], 0.5) is True
"""
CLOSE = "def close(xs, t):\n    return any(abs(a - b) < t for i, a in enumerate(xs) for b in xs[i + 1:])"


def test_a_check_function_is_called_with_the_entry_point(share, strict):
    assert score(share, CLOSE, HUMAN_EVAL, entry_point="close") == 1.0
    assert score(share, CLOSE, LOOPS, entry_point="close") == 1.0
    wrong = "def close(xs, t):\n    return False"
    assert score(share, wrong, HUMAN_EVAL, entry_point="close") == pytest.approx(2 / 3)
    assert score(strict, wrong, HUMAN_EVAL, entry_point="close") == 0.0
    assert score(share, wrong, LOOPS, entry_point="close") == 0.0
    assert score(share, CLOSE, HUMAN_EVAL, entry_point="no_such_name") == 0.0
    assert score(share, CLOSE, HUMAN_EVAL) is None  # a check that nobody calls is no test


@pytest.mark.parametrize(
    ("tests", "right", "wrong"),
    [
        (["import math", "assert math.isclose(f(1), 0.3333, abs_tol=1e-3)"], "return x / 3", "return x / 2"),
        (["assert set(f((1, 2))) == set([2, 1])"], "return list(x)", "return []"),
        (["xs = [3, 1]\nf(xs)\nassert xs == [1, 3]"], "x.sort()", "sorted(x)"),
        (["for n in range(5):\n    assert f(n) == n + 1"], "return x + 1", "return 1"),
        (["def both():\n    assert f(1) == 2\n    assert f(2) == 3\nboth()"], "return x + 1", "return 2"),
        (["assert f(1) == 1 == f(1)"], "return x", "return 2"),
        (["try:\n    f(0)\n    assert False\nexcept ZeroDivisionError:\n    pass"], "return 1 / x", "return 0"),
        (["assert f(1) is None"], "return None", "return 0"),
        (["assert f(2) != 4 and not f(3)"], "return 0", "return 1"),
        (
            ["assert f(1) == {'a': [(1, 2)], 'b': {3}}"],
            "return {'b': {3}, 'a': [(1, 2)]}",
            "return {'b': {3}, 'a': []}",
        ),
        (["assert f(60) == 1152921504606846976"], "return 2 ** x", "return 2.5 ** x"),
        (["assert f('é') == 'É'"], "return x.upper()", "return x"),
    ],
)
def test_tests_of_many_forms(strict, tests, right, wrong):
    assert score(strict, f"def f(x):\n    {right}", tests) == 1.0
    assert score(strict, f"def f(x):\n    {wrong}", tests) == 0.0


FAILING = {
    "does not compile": "def square(x) return x",
    "raises": "raise ValueError",
    "raises late": "def square(x): return 1 / 0",
    "loops": "def square(x):\n    while True: pass",
    "loops at once": "while True: pass",
    "sleeps": "import time\ndef square(x): time.sleep(60)",
    "is empty": "",
    "eats memory": "def square(x): return bytearray(4 << 30)",
    "floods": "def square(x):\n    while True: print('x' * 10000)",
    "returns a flood": "def square(x): return 'x' * 100_000_000",
    "crashes": "import ctypes\ndef square(x): ctypes.string_at(0)",
    "recurses": "def square(x): return square(x)",
    "returns nests": "def square(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "forks": "import os\nwhile True: os.fork()",
    "needs a file": "print(open('/etc/passwd').read())",
    "needs the net": "import socket; socket.socket()",
    "is not text": "\ud800\0",
}


@pytest.mark.parametrize("name", FAILING)
def test_a_program_that_fails_scores_zero(name, impatient):
    started = time.monotonic()
    users = Path("/etc/passwd").read_text()
    tests = SQUARE if name != "needs a file" else [{"input": "", "output": users}]
    assert score(impatient, FAILING[name], tests) == 0.0
    assert time.monotonic() - started < 5


def test_a_slow_program_keeps_what_it_passed_before_and_cases_end_with_the_first_that_is_late(impatient):
    assert score(impatient, "def square(x):\n    while x == 1.5: pass\n    return x * x", SQUARE) == 0.75
    slow = "n = int(input())\nwhile n == 5: pass\nprint(2 * n)"
    started = time.monotonic()
    assert score(impatient, slow, [DOUBLE[0], *[DOUBLE[1]] * 10]) == pytest.approx(1 / 11)
    assert time.monotonic() - started < 2


# A model that is rewarded for passing learns such things. None of these computes a square.
CHEATS = {
    "exits": "import os; os._exit(0)",
    "exits politely": "import sys; sys.exit(0)",
    "exits when called": "import os\ndef square(x): os._exit(0)",
    "raises SystemExit when called": "def square(x): raise SystemExit(0)",
    "says so": "print('passed')\nprint('4 passed')\ndef square(x): print('passed'); return 'passed'",
    "is equal to all": "class E:\n    def __eq__(s, o): return True\n    __hash__ = None\ndef square(x): return E()",
    "is an int equal to all": "class E(int):\n    def __eq__(s, o): return True\ndef square(x): return E(7)",
    "patches builtins": "import builtins\nbuiltins.exec = builtins.eval = builtins.compile = lambda *a, **k: None\n"
    "builtins.AssertionError = Warning\nsquare = print",
    "answers for the sandbox": "import os\nfor fd in range(9):\n    try: os.write(fd, b'loaded\\n' + b'true\\n' * 9)\n"
    "    except OSError: pass",
    "reads ahead": "import os, select\nfor fd in range(9):\n    if select.select([fd], [], [], 0)[0]: os.read(fd, 999)",
    "traces": "import sys\nsys.settrace(lambda *a: None)\nsquare = lambda x: sys._getframe(1).f_locals",
    "reads the frames": "import sys\ndef square(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for v in frame.f_locals.values():\n            if isinstance(v, str) and len(v) == 32: return v\n"
    "        frame = frame.f_back",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes_a_test_whose_expected_value_stays_outside(share, name):
    assert score(share, CHEATS[name], SQUARE) == 0.0
    assert score(share, CHEATS[name], [{"input": "3", "output": "9"}]) == 0.0


@pytest.mark.parametrize("name", [name for name in CHEATS if "equal" not in name])
def test_no_simple_cheat_passes_a_test_that_runs_beside_it(share, name):
    assert score(share, CHEATS[name], ["import math\nassert math.isclose(square(3), 9)"]) == 0.0


def test_the_expected_values_never_reach_the_program():
    tests = ["assert f(2) == 123456789, 'message 123456789'", "assert f(1) == [123456789]", "assert 123456789 == f(0)"]
    for test in read_tests([*tests, "assert set(f(3)) == set([123456789])"]):
        assert "123456789" not in test.source and test.expected
    for test in read_tests("def check(candidate):\n    assert candidate(2) == 123456789", "f"):
        assert "123456789" not in test.source


def test_tests_that_cannot_be_read_abstain_and_are_not_run(share):
    unreadable = [
        None,
        "",
        [],
        {},
        4,
        "def",
        ["assert f("],
        ["x = 1"],
        "import math",
        [{"input": "1"}],
        [{"input": 1, "output": 2}],
    ]
    unreadable += ["[1, 2", "[1]", ["assert True"], [["assert f(1)"]], [None], "\0", "f(1)", "assert 1, 'x'"]
    completions = ["open('ran', 'w')"] * len(unreadable)
    assert share([""] * len(unreadable), completions, tests=unreadable) == [None] * len(unreadable)
    assert not os.path.exists("ran")
    assert share([], [], tests=[]) == []


def test_a_batch_keeps_its_order_and_rows_their_own_tests(share):
    fenced = "Let me think.\n```python\n{}\n```\nDone."
    completions = [
        fenced.format(RIGHT),
        [{"role": "assistant", "content": fenced.format(HALF_RIGHT)}],
        DOUBLING,
        "no code",
    ]
    completions = completions * 4
    tests = [SQUARE, SQUARE, DOUBLE, SQUARE] * 4
    rewards = RewardSet([("code", share, 1.0)])
    columns = {"tests": tests, "entry_point": [None] * 16, "finished": [True] * 16, "task": ["x"] * 16}
    scores = rewards.score([""] * 16, completions, [[]] * 16, columns)
    assert scores[:, 0].tolist() == [1.0, 0.5, 1.0, 0.0] * 4 and not rewards.errors


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nor\n```python\nx = 2\ny = 3\n```\nDone.", "x = 2\ny = 3"),
        ("```python\nx = 1\n```\n```\nthe output\n```", "x = 1"),
        ("```py\nx = 1\n```", "x = 1"),
        ("  ```Python\nx = 1\n  ```", "x = 1"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 1"),  # the last one was cut off
        ("```python\nx = 1\n```python\nx = 2\n```", "x = 2"),
        ("<think>x = 0</think><answer>\nx = 1\n</answer>", "x = 1"),
        ("<answer>prose\n```python\nx = 1\n```\n</answer>", "x = 1"),
        ("```python\n```", ""),
        ("```python\nx = 'a\u2028b\\f'\n```", "x = 'a\u2028b\\f'"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("if x:\r\n\ty = 1", "if x:\r\n\ty = 1"),
    ],
)
def test_the_program_is_the_last_whole_block_else_the_answer_else_all(text, source):
    assert program(text) == source


def test_long_text_is_read_from_its_end_in_little_time():
    started = time.monotonic()
    for piece in ("```python\n", "```", "<answer>", "x\n", "```\n"):
        assert len(program(piece * 1_000_000)) <= 100_000
    assert program("y" * 1_000_000 + "\n```python\nx = 1\n```") == "x = 1"
    assert time.monotonic() - started < 2


def test_rows_may_share_their_tests_and_not_the_entry_point(share):
    source = "def right(xs, t): return any(abs(a - b) < t for i, a in enumerate(xs) for b in xs[i + 1:])\nwrong = max"
    scores = share([""] * 2, [source] * 2, tests=[HUMAN_EVAL] * 2, entry_point=["right", "wrong"])
    assert scores[0] == 1.0 and scores[1] < 1.0


def test_cases_are_read_as_they_are():
    assert read_tests(DOUBLE[:1]) == (Case("1\n", "2\n"),)


def test_a_sandbox_that_does_not_start_abstains_and_if_none_does_it_is_an_error(share, monkeypatch):
    monkeypatch.setattr(share._sandbox, "workers", 1)
    start = Room.script

    def script(room, source, stdin=""):
        if source == "lost":
            raise SandboxError("a sandboxed process was lost")
        return start(room, source, stdin)

    monkeypatch.setattr(Room, "script", script)
    assert share([""] * 3, ["lost", DOUBLING, RIGHT], tests=[DOUBLE, DOUBLE, SQUARE]) == [None, 1.0, 1.0]
    with pytest.raises(SandboxError, match="lost"):
        score(share, "lost", DOUBLE)
    monkeypatch.setattr(interpreter, "START", ("/bin/false",))
    with pytest.raises(SandboxError, match="did not start"):
        score(share, RIGHT, SQUARE)

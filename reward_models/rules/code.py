"""Programs in completions, scored by running them against the row's tests in a sandbox."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_models.loader import RewardError
from reward_models.rules.texts import MAX_CHARACTERS, completion_text, tagged_answer
from reward_models.sandbox import Limits, Room, Sandbox, same, why_unavailable

if TYPE_CHECKING:
    from agrpo.types import Text

_FENCES = ("```python", "```py", "```python3")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Case:
    """What a program reads, and what it must print then."""

    input: str
    output: str


@dataclass(frozen=True)
class Statement:
    """A piece of the tests' own code; `scored` if it can fail as a test, else it prepares others.

    With an expected value it is an expression, and its value is compared outside the program's process.
    """

    source: str
    scored: bool = True
    expected: tuple[()] | tuple[Any] = field(default=(), hash=False)  # may hold lists


Tests = tuple[Case, ...] | tuple[Statement, ...]


class code:
    """Does the completion's program pass the row's tests? It runs, so it runs in a sandbox, and only if enabled.

    The score is the share of tests passed, in [0, 1]. A program that does not compile, raises, prints too much, or is
    slow fails the tests that this costs it. None where the tests cannot be read, or the sandbox did not start.

    Args:
        enabled: this reward executes what the model wrote; nothing runs without this consent.
        all_or_nothing: 1 if every test passed, else 0.
        deadline_s: of one run of the program; of all its tests together where they are Python code.
        memory_mb: of one run.
        workers: runs at a time.

    Raises:
        RewardError: not enabled, a limit out of range, or this machine cannot isolate; the message says what to do.
    """

    while_sampling = "prompt"

    def __init__(
        self,
        *,
        enabled: bool = False,
        all_or_nothing: bool = False,
        deadline_s: float = 5.0,
        memory_mb: int = 512,
        workers: int = 4,
    ) -> None:
        if enabled is not True:
            raise RewardError(
                "the reward `code` executes programs that a model wrote, and is off unless asked for: "
                "write `enabled: true` beside its target; docs/rewards.md says what the sandbox keeps out"
            )
        try:
            self._sandbox = Sandbox(workers, Limits(deadline_s, memory_mb << 20))
        except (TypeError, ValueError) as error:
            raise RewardError(f"the reward `code`: {error}") from error
        if (reason := why_unavailable()) is not None:
            raise RewardError(f"the reward `code` does not run programs without isolation: {reason}")
        self._all_or_nothing = all_or_nothing

    def __call__(
        self,
        prompts: list[Text],
        completions: list[Text],
        completion_ids: list[list[int]] | None = None,
        *,
        tests: list[Any],
        entry_point: list[str | None] | None = None,
        **columns: list[Any],
    ) -> list[float | None]:
        """Scores in [0, 1]; None where the row's tests cannot be read, or the sandbox did not start.

        Args:
            tests: Python code, whole or in a list, or a list of {"input": …, "output": …}; or the JSON of a list.
            entry_point: the function that `check(candidate)` in the tests is for.

        Raises:
            SandboxError: no sandbox started at all.
        """
        names = entry_point or [None] * len(completions)
        keys = [(id(row), name) for row, name in zip(tests, names, strict=True)]  # a group shares its row's tests
        read = {key: read_tests(row, key[1]) for key, row in dict(zip(keys, tests, strict=True)).items()}
        jobs = [
            (program(completion_text(completion)), read[key]) for completion, key in zip(completions, keys, strict=True)
        ]
        unique = list(dict.fromkeys(job for job in jobs if job[1]))  # a group repeats itself
        scores = dict(zip(unique, self._sandbox.map(self._score, unique), strict=True))
        return [scores.get(job) for job in jobs]

    def cancel(self) -> None:
        """End the call that another thread is in: it raises there."""
        self._sandbox.cancel()

    def _score(self, room: Room, job: tuple[str, Tests]) -> float:
        source, tests = job
        passed = self._cases(room, source, tests) if isinstance(tests[0], Case) else _statements(room, source, tests)
        share = sum(passed) / sum(isinstance(test, Case) or test.scored for test in tests)
        return float(share == 1) if self._all_or_nothing else share

    def _cases(self, room: Room, source: str, cases: tuple[Case, ...]) -> list[bool]:
        """Which passed, up to where the rest cannot matter or would be as slow."""
        passed = []
        for case in cases:
            ending = room.script(source, case.input)
            passed.append(ending.well and _lines(ending.output.decode("utf-8", "replace")) == _lines(case.output))
            if ending.cause == "deadline" or (self._all_or_nothing and not passed[-1]):
                break
        return passed


def _statements(room: Room, source: str, statements: tuple[Statement, ...]) -> list[bool]:
    answers = room.answers(source, [(test.source, bool(test.expected)) for test in statements])
    return [
        (same(answer, test.expected[0]) if answer is not None else False) if test.expected else answer is True
        for test, answer in zip(statements, answers, strict=True)
        if test.scored
    ]


def _lines(text: str) -> list[str]:
    """Output as judges compare it: white space at the ends of lines and of the whole does not count."""
    return [line.strip() for line in text.strip().splitlines()]


def program(text: str) -> str:
    """The program in a completion: the last whole ```python block, else `<answer>…</answer>`, else all of it.

    Of long text only the end is read.
    """
    text = text[-MAX_CHARACTERS:]
    found, block = None, None
    for line in text.split("\n"):
        mark = line.strip()
        if mark.lower() in _FENCES:
            block = []
        elif block is not None and mark == "```":
            found, block = "\n".join(block), None
        elif block is not None:
            block.append(line)
    if found is None:
        answer = tagged_answer(text)
        found = text if answer is None else answer
    return found


def read_tests(tests: Any, entry_point: str | None = None) -> Tests:
    """The row's tests; () where there are none or they cannot be read, such as Python with a syntax error."""
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        try:
            tests = json.loads(tests)
        except ValueError:
            return ()
    if isinstance(tests, str):
        tests = [tests]
    if not isinstance(tests, list | tuple) or not tests:
        return ()
    if all(isinstance(test, str) for test in tests):
        return _read_code(tests, entry_point)
    try:
        cases = tuple(Case(test["input"], test["output"]) for test in tests)
    except (TypeError, KeyError):
        return ()
    return cases if all(isinstance(text, str) for case in cases for text in (case.input, case.output)) else ()


def _read_code(pieces: list[str], entry_point: str | None) -> tuple[Statement, ...]:
    try:
        nodes = [node for piece in pieces for node in ast.parse(piece).body]
        nodes = _with_check_called(nodes, entry_point) if entry_point else nodes
    except (SyntaxError, ValueError):  # ValueError: a null character
        return ()
    own = {node.name for node in nodes if isinstance(node, _DEFINITIONS)}
    statements = tuple(_statement(node, own) for node in nodes)
    return statements if any(statement.scored for statement in statements) else ()


def _with_check_called(nodes: list[ast.stmt], entry_point: str) -> list[ast.stmt]:
    """HumanEval's form: `check(candidate)` holds the tests. Where it only asserts, each of these is a test."""
    check = next((node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    if check is None:
        return nodes
    if len(check.args.args) == 1 and all(isinstance(node, ast.Assert) for node in check.body):
        named = ast.parse(f"{check.args.args[0].arg} = {entry_point}").body
        return [*(node for node in nodes if node is not check), *named, *check.body]
    return [*nodes, *ast.parse(f"check({entry_point})").body]


def _statement(node: ast.stmt, own: set[str]) -> Statement:
    """`assert value == literal` is split: the program's process computes the value and never sees the literal.

    Args:
        own: names of functions that the tests define; calling one is a test too.
    """
    if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.Eq):
        sides = [node.test.left, *node.test.comparators]
        for value, literal in (sides, sides[::-1]) if len(sides) == 2 else ():
            try:
                return Statement(ast.unparse(value), expected=(_literal(literal),))
            except (TypeError, ValueError):  # no literal
                pass
    scored = not isinstance(node, (*_DEFINITIONS, ast.Assign)) and any(
        (isinstance(inner, ast.Assert) and not _holds_anyway(inner.test))
        or (isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id in own)
        for inner in ast.walk(node)
    )
    return Statement(ast.unparse(node), scored)


def _holds_anyway(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)  # assert True, "…"


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of set(…) of one, as tests write it that ignore the order."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "set" and len(node.args) == 1:
        return set(ast.literal_eval(node.args[0]))
    return ast.literal_eval(node)

"""The calculator reads arithmetic and nothing else, and says what a conversation is worth."""

import ast
import contextlib
import operator
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrpo.config import EnvironmentConfig
from agrpo.environments.calculator import MOST_DIGITS, Calculator, NotArithmetic, calculate
from agrpo.environments.loading import load_environment
from agrpo.types import InputError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.USub: operator.neg}


def by_python(expression):
    """The value by Python's own parser, operations done here."""

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](value(node.operand))
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(expression, mode="eval").body)


numbers = st.integers(0, 9999).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", " * ", " - "]), inner).map("".join)
        | inner.map(lambda x: f"({x})")
        | inner.map(lambda x: f"-{x}")
    ),
    max_leaves=8,
)


@given(expressions)
def test_values_are_those_of_arithmetic(expression):
    expected = by_python(expression)
    if len(expression) <= 200 and abs(expected) < 10**20:
        assert calculate(expression) == expected


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "ends too early"),
        ("3+", "ends too early"),
        ("3 4", "cannot read '4'"),
        ("3+4)", "cannot read '\\)'"),
        ("(3+4", "a bracket is open"),
        ("*3", "cannot read '\\*'"),
        ("9**9**9**9", "cannot read '\\*'"),
        ("__import__('os').system('true')", "cannot read '_'"),
        ("1e9", "cannot read 'e'"),
        ("٣+٤", "cannot read '٣'"),
        ("9" * 31, "a number has more than 30 digits"),
        ("*".join(["99999999"] * 5), "a result has more than 30 digits"),
        ("(" * 60 + "1" + ")" * 60, "nested too deep"),
        ("-" * 60 + "1", "nested too deep"),
        ("1+" * 200 + "1", "longer than 200 characters"),
    ],
)
def test_anything_else_is_refused_at_once(expression, why):
    began = time.perf_counter()
    with pytest.raises(NotArithmetic, match=why):
        calculate(expression)
    assert time.perf_counter() - began < 0.1


@given(st.text(alphabet="0123456789+-*() ", max_size=200) | st.text(max_size=60))
def test_hostile_text_is_a_number_or_refused(text):
    with contextlib.suppress(NotArithmetic):
        assert abs(calculate(text)) < 10**MOST_DIGITS


def talk(*said, **parameters):
    calculator = Calculator(**parameters)
    calculator.reset({"solution": "17797", "prompt": "481*37"}, seed=0)
    return [calculator.step(one) for one in said]


def test_a_right_answer_behind_a_call_is_worth_one():
    call, answer = talk("<call>481*37</call>", "<answer>17797</answer>")
    assert call.observation == [{"role": "tool", "content": "17797"}] and not call.done and call.reward == 0
    assert answer.done and answer.reward == 1
    assert talk("<call>481*37</call>", "<answer>17798</answer>")[-1].reward == 0
    assert talk("<answer>17797</answer>")[-1].reward == 0
    assert talk("<answer>17797</answer>", right_without_call=0.5)[-1].reward == 0.5
    assert talk("I do not know.")[-1].done
    assert talk("I do not know.", right_without_call=0.5)[-1].reward == 0


def test_a_call_without_a_value_is_answered_and_does_not_count():
    error, answer = talk("<call>481*</call>", "<answer>17797</answer>")
    assert error.observation == [{"role": "tool", "content": "error"}] and answer.reward == 0


def test_a_row_without_a_solution_is_named():
    with pytest.raises(ValueError, match="the calculator reads the column solution; the row has prompt, answer"):
        Calculator().reset({"prompt": "1*1", "answer": "1"}, seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "agrpo.environments.calculator:Calculater"}, "has no 'Calculater'; did you mean 'Calculator'?"),
        ({"target": "agrpo.environments.abacus:Abacus"}, "'agrpo.environments' has no 'abacus'"),
        ({"target": "agrpo.environments.calculator:MOST_DIGITS"}, "is a int, not a class or function"),
        ({"target": "agrpo.environments.calculator:calculate"}, "missing a required argument: 'expression'"),
        ({"target": "builtins:list"}, "makes a list without reset and step"),
        (
            {"target": "agrpo.environments.calculator:Calculator", "right": 1},
            "got an unexpected keyword argument 'right'; its parameters: right_without_call",
        ),
    ],
)
def test_an_environment_that_cannot_be_made_is_an_error_in_words(values, message):
    with pytest.raises(InputError, match=r"environment\.target: ") as caught:
        load_environment(EnvironmentConfig(**values))
    assert message in str(caught.value)


def test_one_is_made_with_its_parameters_for_each_conversation():
    config = EnvironmentConfig(target="agrpo.environments.calculator.Calculator", right_without_call=0.25)
    make = load_environment(config)
    one, other = make(), make()
    assert one is not other and one.right_without_call == 0.25
    assert load_environment(None) is None

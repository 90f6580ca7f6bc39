"""Import paths to rewards: what a user may write, and what the error tells them."""

import sys

import pytest

from reward_models import rules
from reward_models.compose import RewardSet
from reward_models.loader import RewardError, load_reward

USERS = '''
def by_length(completions, completion_ids, **kwargs):
    """As TRL's documentation writes them."""
    return [float(len(ids)) for ids in completion_ids]

def scaled(prompts, completions, *, solution, factor, bonus=0.0, **kwargs):
    return [factor * len(text) + bonus for text in completions]

class Counting:
    def __init__(self, start=0):
        self.start = start
    def __call__(self, prompts, completions, completion_ids=None, **columns):
        return [float(self.start)] * len(completions)

def build(value):
    return Counting(value)

not_a_reward = 7
'''


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    """A module in the working directory that sys.path does not name, as with a console script."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "users_rewards_x7.py").write_text(USERS)
    (tmp_path / "users_broken_x7.py").write_text("import no_such_dependency_x7")
    monkeypatch.chdir(tmp_path)
    yield "users_rewards_x7"
    sys.modules.pop("users_rewards_x7", None)


def test_both_spellings_find_the_rule_itself():
    assert load_reward("reward_models.rules.accuracy") is rules.accuracy
    assert load_reward("reward_models.rules:accuracy", {}) is rules.accuracy


def test_a_trl_function_by_import_path_works_from_the_working_directory(users_module):
    reward = load_reward(f"{users_module}.by_length")
    rewards = RewardSet([("length", reward, 1.0)])
    assert rewards.score(["p"] * 2, ["a", "b"], [[1, 2, 3], [4]], {"solution": ["x", "y"]}).tolist() == [[3.0], [1.0]]


def test_parameters_are_bound_and_win_over_columns(users_module):
    reward = load_reward(f"{users_module}:scaled", {"factor": 2.0})
    assert reward(prompts=[""], completions=["abc"], completion_ids=[[1]], solution=["s"], factor=[99.0]) == [6.0]


def test_classes_are_made_and_modules_built_and_functions_without_completions_called(users_module):
    made = load_reward(f"{users_module}.build", {"value": 4})
    assert made([""], ["a"]) == [4.0]
    trls = load_reward("trl.rewards.get_soft_overlong_punishment", {"max_completion_len": 10, "soft_punish_cache": 4})
    ids = [[1] * n for n in (3, 8, 12)]
    assert trls(prompts=[""] * 3, completions=[""] * 3, completion_ids=ids) == [0.0, -0.5, -1.0]
    assert load_reward(f"{users_module}.Counting", {"start": 3})([""], ["a"]) == [3.0]
    assert load_reward(users_module, {"value": 5})([""], ["a"]) == [5.0]


@pytest.mark.parametrize(
    ("target", "parameters", "message"),
    [
        ("reward_models.rules.acuracy", {}, "did you mean 'accuracy'"),
        ("reward_models.rule.accuracy", {}, "did you mean 'rules'"),
        ("reward_models.rules.accuracy.x", {}, "has no 'x'"),
        ("no_such_package_x7.f", {}, "no module named 'no_such_package_x7'"),
        ("reward_models.rules.overlong", {"limt": 5}, "did you mean 'limit'.*limit, buffer"),
        ("reward_models.rules.format", {"think": 1}, "has: none"),
        ("reward_models.rules.overlong", {"prompts": []}, "no parameter 'prompts'"),
        ("reward_models.rules", {}, "module without a build"),
        ("not a path", {}, "no import path"),
        ("a:b:c", {}, "no import path"),
        ("", {}, "no import path"),
        ("{users}.not_a_reward", {}, "is a int"),
        ("{users}.Counting", {"stat": 1}, "did you mean 'start'"),
        ("{users}", {}, "missing a required argument: 'value'"),
        ("users_broken_x7.f", {}, "needs 'no_such_dependency_x7'"),
    ],
)
def test_errors_say_what_to_mend(users_module, target, parameters, message):
    with pytest.raises(RewardError, match=message):
        load_reward(target.format(users=users_module), parameters)

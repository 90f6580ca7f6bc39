"""Rewards that follow from a rule: the same text always gets the same score. All have TRL's signature."""

from reward_models.rules.answers import accuracy
from reward_models.rules.code import code
from reward_models.rules.constraints import begins_with, contains, exclamation, instructions, lowercase, max_words
from reward_models.rules.environment import environment
from reward_models.rules.formats import answer_format, format
from reward_models.rules.ifeval import ifeval
from reward_models.rules.lengths import cosine, length, overlong
from reward_models.rules.procedural import reasoning_gym
from reward_models.rules.style import reasoning_steps, repetition
from reward_models.rules.tags import tag_count

__all__ = [
    "accuracy",
    "answer_format",
    "begins_with",
    "code",
    "contains",
    "cosine",
    "environment",
    "exclamation",
    "format",
    "ifeval",
    "instructions",
    "length",
    "lowercase",
    "max_words",
    "overlong",
    "reasoning_gym",
    "reasoning_steps",
    "repetition",
    "tag_count",
]

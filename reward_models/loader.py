"""From an import path in the configuration to a reward."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from agrpo import import_paths
from agrpo.types import InputError, Reward

_GIVEN = ("prompts", "completions", "completion_ids")  # what every reward is handed; never a parameter


class RewardError(InputError):
    """A reward that the configuration names cannot be made; the message says which and what to do."""


def load_reward(target: str, parameters: Mapping[str, Any] | None = None) -> Reward:
    """The reward that `package.module.attr` or `package.module:attr` names.

    A function gets the parameters as keyword arguments at every call, where they win over columns of the same name; one
    that takes no completions makes a reward, as TRL's get_… do, and is called with them once; a class is instantiated
    with them; a module's `build(**parameters)` is called. The working directory is searched too.

    Raises:
        RewardError: no such module or attribute, nothing callable, or a parameter that the target does not name.
    """
    parameters = dict(parameters or {})
    found = find_target(target)
    if isinstance(found, ModuleType):
        build = getattr(found, "build", None)
        if not callable(build):
            raise RewardError(
                f"reward {target!r} is a module without a build(**parameters); name a function or class in it"
            )
        return _make(target, build, parameters)
    if inspect.isclass(found):
        return _make(target, found, parameters)
    if not callable(found):
        raise RewardError(f"reward {target!r} is a {type(found).__name__}, not a function, class or module")
    if _is_factory(found):
        return _make(target, found, parameters)
    _check_names(target, found, parameters)
    if not parameters:
        return found

    @functools.wraps(found)
    def bound(prompts, completions, completion_ids=None, **columns):
        return found(prompts=prompts, completions=completions, completion_ids=completion_ids, **(columns | parameters))

    return bound


def find_target(target: str) -> Any:
    """What the import path of a reward, or of a function beside it, names."""
    try:
        return import_paths.find_target(target, "reward")
    except InputError as error:
        raise RewardError(str(error)) from error


def _is_factory(found: Callable) -> bool:
    """Does the function make a reward, rather than being one? It has no place for completions then."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:
        return False
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return False
    return inspect.isfunction(found) and not any(p.name in _GIVEN for p in parameters)


def _make(target: str, factory: Callable, parameters: dict[str, Any]) -> Reward:
    _check_names(target, factory, parameters)
    try:
        inspect.signature(factory).bind(**parameters)
    except TypeError as error:
        raise RewardError(f"reward {target!r}: {error}") from error
    except ValueError:  # no signature to check
        pass
    reward = factory(**parameters)
    if not callable(reward):
        raise RewardError(f"reward {target!r} gave a {type(reward).__name__}, which cannot be called as a reward")
    return reward


def _check_names(target: str, function: Callable, parameters: dict[str, Any]) -> None:
    """Names only: **columns would swallow a misspelt parameter without a word."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables of extension modules have none
        return
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = [name for name, p in signature.parameters.items() if p.kind in by_name and name not in _GIVEN]
    for name in parameters:
        if name not in own:
            near = difflib.get_close_matches(name, own, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RewardError(f"reward {target!r} has no parameter {name!r}{hint}; it has: {', '.join(own) or 'none'}")
